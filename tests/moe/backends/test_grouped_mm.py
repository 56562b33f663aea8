"""Matrix multiplication of rows sorted by expert, against a loop in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from vmoe.moe.backends.grouped_mm import grouped_mm

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def example(counts, unused, I, O, dtype, device="cpu"):
    """Rows, matrices and ends; unused rows hold NaN."""
    torch.manual_seed(0)
    R = sum(counts) + unused
    x_RI = torch.randn(R, I, dtype=dtype, device=device)
    x_RI[sum(counts) :] = torch.nan
    weight_EOI = torch.randn(len(counts), O, I, dtype=dtype, device=device) / I**0.5
    end_E = torch.tensor(counts, device=device).cumsum(0)
    return x_RI.requires_grad_(), weight_EOI.requires_grad_(), end_E


def loop(x_RI, weight_EOI, end_E):
    rows, start = [], 0
    for weight_OI, end in zip(weight_EOI, end_E.tolist()):
        rows.append(x_RI[start:end] @ weight_OI.T)
        start = end
    return torch.cat([*rows, x_RI.new_zeros(len(x_RI) - start, weight_EOI.shape[1])])


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    unused=st.integers(0, 3),
    I=st.integers(1, 17),
    O=st.integers(1, 17),
    dtype=st.sampled_from(DTYPES),
)
def test_a_loop_over_the_experts_gives_the_same(counts, unused, I, O, dtype):
    x_RI, weight_EOI, end_E = example(counts, unused, I, O, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x_RI, weight_EOI)]
    y_RO, expected_RO = grouped_mm(x_RI, weight_EOI, end_E), loop(*exact, end_E)
    upstream_RO = torch.randn(y_RO.shape, dtype=torch.float64).to(dtype)
    upstream_RO[sum(counts) :] = torch.nan  # nothing of an unused row may reach a gradient
    grads = torch.autograd.grad(y_RO, (x_RI, weight_EOI), upstream_RO)
    used_RO = upstream_RO.double().clone()
    used_RO[sum(counts) :] = 0
    expected = torch.autograd.grad(expected_RO, exact, used_RO)
    for own, other in zip((y_RO, *grads), (expected_RO, *expected)):
        assert own.dtype == dtype
        torch.testing.assert_close(own.double(), other.nan_to_num(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_is_eager_and_leaves_unused_rows_alone(dtype, filled_memory):
    arguments = example((3, 0, 4), 2, 12, 20, dtype)
    compiled = torch.compile(grouped_mm, fullgraph=True)
    outputs = []
    for function in (grouped_mm, compiled):
        y_RO = function(*arguments)
        assert (y_RO[7:] == 0).all()
        grads = torch.autograd.grad(y_RO.square().sum(), arguments[:2])
        assert all(grad.isfinite().all() for grad in grads)
        outputs.append((y_RO, *grads))
    for eager, own in zip(*outputs):
        torch.testing.assert_close(own, eager)


def test_second_derivatives():
    x_RI, weight_EOI, end_E = example((2, 0, 3), 1, 3, 4, torch.float64)
    x_RI = torch.randn_like(x_RI).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, w: grouped_mm(x, w, end_E), (x_RI, weight_EOI))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_row_costs_one_matrix(dtype):
    x_RI, weight_EOI, end_E = example((2, 4, 2), 0, 8, 16, dtype)
    import vmoe.inspection.profile  # noqa: F401  (completes PyTorch's table of costs)

    with FlopCounterMode(display=False) as counter:
        grouped_mm(x_RI, weight_EOI, end_E).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 8 * 8 * 16  # the product, and one for each gradient


def test_it_is_seen_by_the_meta_device_and_by_export():
    x_RI, weight_EOI, end_E = (tensor.detach().to("meta") for tensor in example((2, 4), 0, 8, 16, torch.float32))
    assert grouped_mm(x_RI, weight_EOI, end_E).shape == (6, 16)

    class Layer(torch.nn.Module):
        def forward(self, x_RI, weight_EOI, end_E):
            return grouped_mm(x_RI, weight_EOI, end_E)

    arguments = tuple(tensor.detach() for tensor in example((2, 4), 0, 8, 16, torch.float32))
    exported = torch.export.export(Layer(), arguments, dynamic_shapes=({0: torch.export.Dim("rows")}, None, None))
    more = tuple(tensor.detach() for tensor in example((5, 4), 0, 8, 16, torch.float32))
    torch.testing.assert_close(exported.module()(*more), grouped_mm(*more))
