"""Matrix multiplication of rows sorted by expert, against a loop in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from vmoe.moe.grouped import grouped_linear

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def example(counts, unused, I, O, dtype, device="cpu"):
    """Rows, matrices, biases and counts; unused rows hold NaN."""
    torch.manual_seed(0)
    R = sum(counts) + unused
    x_RI = torch.randn(R, I, dtype=dtype, device=device)
    x_RI[sum(counts) :] = torch.nan
    weight_EOI = torch.randn(len(counts), O, I, dtype=dtype, device=device) / I**0.5
    bias_EO = torch.randn(len(counts), O, dtype=dtype, device=device)
    differentiable = (tensor.requires_grad_() for tensor in (x_RI, weight_EOI, bias_EO))
    return *differentiable, torch.tensor(counts, dtype=torch.long, device=device)


def loop(x_RI, weight_EOI, bias_EO, count_E):
    rows, start = [], 0
    for e, count in enumerate(count_E.tolist()):
        y_MO = x_RI[start : start + count] @ weight_EOI[e].T
        rows.append(y_MO if bias_EO is None else y_MO + bias_EO[e])
        start += count
    return torch.cat([*rows, x_RI.new_zeros(len(x_RI) - start, weight_EOI.shape[1])])


@settings(max_examples=80, deadline=None)
@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    unused=st.integers(0, 3),
    I=st.integers(1, 17),
    O=st.integers(1, 17),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    strides=st.booleans(),
)
def test_a_loop_over_the_experts_gives_the_same(counts, unused, I, O, dtype, bias, strides):
    x_RI, weight_EOI, bias_EO, count_E = example(counts, unused, I, O, dtype)
    if strides:  # as users may have them
        weight_EOI = weight_EOI.detach().mT.contiguous().mT.requires_grad_()
        bias_EO = bias_EO.detach().T.contiguous().T.requires_grad_()
    inputs = [x_RI, weight_EOI, *([bias_EO] if bias else [])]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    y_RO = grouped_linear(x_RI, weight_EOI, bias_EO if bias else None, count_E)
    expected_RO = loop(*exact, *([] if bias else [None]), count_E)
    upstream_RO = torch.randn(y_RO.shape, dtype=torch.float64).to(dtype)
    upstream_RO[sum(counts) :] = torch.nan  # nothing of an unused row may reach a gradient
    grads = torch.autograd.grad(y_RO, inputs, upstream_RO)
    used_RO = upstream_RO.double().clone()
    used_RO[sum(counts) :] = 0
    expected = torch.autograd.grad(expected_RO, exact, used_RO)
    used = sum(counts)
    if used:
        assert (y_RO[used:] == y_RO[0]).all()
    for own, other in zip((y_RO[:used], *grads), (expected_RO[:used], *expected)):
        assert own.dtype == dtype
        torch.testing.assert_close(own.double(), other.nan_to_num(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_is_eager_and_leaves_unused_rows_alone(dtype, filled_memory):
    arguments = example((3, 0, 4), 2, 12, 20, dtype)
    compiled = torch.compile(grouped_linear, fullgraph=True)
    outputs = []
    for function in (grouped_linear, compiled):
        y_RO = function(*arguments)
        assert (y_RO[7:] == y_RO[0]).all()
        grads = torch.autograd.grad(y_RO.square().sum(), arguments[:3])
        assert all(grad.isfinite().all() for grad in grads)
        outputs.append((y_RO, *grads))
    for eager, own in zip(*outputs):  # the bias of bfloat16 is added before or after rounding
        torch.testing.assert_close(own, eager, **({"rtol": 0.02, "atol": 0.05} if dtype == torch.bfloat16 else {}))


def test_derivatives_of_all_kinds():
    x_RI, weight_EOI, bias_EO, count_E = example((2, 0, 3), 1, 3, 4, torch.float64)
    x_RI = torch.randn_like(x_RI).requires_grad_()
    function = lambda *inputs: grouped_linear(*inputs, count_E)[:5]  # noqa: E731
    inputs = (x_RI, weight_EOI, bias_EO)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_row_costs_one_matrix(dtype):
    x_RI, weight_EOI, bias_EO, count_E = example((2, 4, 2), 0, 8, 16, dtype)
    y_RO = grouped_linear(x_RI, weight_EOI, bias_EO, count_E)
    with FlopCounterMode(display=False) as counter:
        grouped_linear(x_RI, weight_EOI, bias_EO, count_E)
    assert counter.get_total_flops() == 2 * 8 * 8 * 16
    with FlopCounterMode(display=False) as counter:
        y_RO.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 8 * 8 * 16


def test_it_is_seen_by_the_meta_device_and_by_export():
    arguments = [tensor.detach() for tensor in example((2, 4), 0, 8, 16, torch.float32)]
    assert grouped_linear(*(tensor.to("meta") for tensor in arguments)).shape == (6, 16)

    class Layer(torch.nn.Module):
        def forward(self, *arguments):
            return grouped_linear(*arguments)

    rows = {0: torch.export.Dim("rows")}
    exported = torch.export.export(Layer(), tuple(arguments), dynamic_shapes=((rows, None, None, None),))
    more = [tensor.detach() for tensor in example((5, 4), 0, 8, 16, torch.float32)]
    torch.testing.assert_close(exported.module()(*more), grouped_linear(*more))
