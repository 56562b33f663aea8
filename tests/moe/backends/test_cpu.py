"""The experts' operation for CPUs against the plain products that it stands for."""

import math
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Mlp
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from vmoe.moe import Experts, SparseMoE
from vmoe.moe import experts as experts_module
from vmoe.moe.backends import cpu as module
from vmoe.moe.backends.cpu import CHUNK_ROWS, ROWS_PER_PRODUCT, make_chunks, rounded


class QuickGELU(nn.Module):
    """An activation that nobody knows by name."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


@contextmanager
def calls_of_the_operation(allowed: bool = True):
    """Counts them; `allowed=False`: the experts go the plain way."""
    calls, operation = [], experts_module.routed_mlp

    def counted(*args):
        calls.append(args)
        return operation(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts_module, "routed_mlp", counted)
        if not allowed:
            patch.setattr(Experts, "_are_plain", lambda self, x: False)
        yield calls


def result_and_gradients(run, model, x, autocast):
    """The result and {name: gradient} of what learns, with another weight for each entry of the result."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_(x.requires_grad)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        y = run(x)
    learns = any(parameter.requires_grad for parameter in model.parameters())
    if learns or x.requires_grad:
        weight = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
        (y * weight).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return y.detach(), {**gradients, "x": x.grad}


def assert_same(run, model, x, autocast=False):
    """Both ways give the same; returns what they give."""
    with calls_of_the_operation() as calls:
        y, gradients = result_and_gradients(run, model, x, autocast)
    assert len(calls) == 1
    with calls_of_the_operation(allowed=False) as calls:
        expected, expected_gradients = result_and_gradients(run, model, x, autocast)
    assert not calls
    tolerance = 1e-2 if autocast else {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-2}[x.dtype]
    assert_close(y, expected, tolerance)
    for name, gradient in gradients.items():
        assert (gradient is None) == (expected_gradients[name] is None), name
        if gradient is not None:
            assert_close(gradient, expected_gradients[name], tolerance, name)
    with calls_of_the_operation() as calls, torch.no_grad():
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            assert_close(run(x.detach()), expected, tolerance, "result without gradients")
    assert len(calls) == 1
    return y, gradients


def assert_close(a, b, tolerance, name="result"):
    assert (a.dtype, a.shape) == (b.dtype, b.shape), name
    assert torch.isfinite(a).all(), name
    distance = (a.double() - b.double()).norm()
    assert distance <= tolerance * (b.double().norm() + 0.1), (name, float(distance))


TYPES = pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float64, False), (torch.float32, False), (torch.bfloat16, False), (torch.float32, True)],
    ids=["float64", "float32", "bfloat16", "autocast"],
)
ALONE = pytest.mark.parametrize("alone", [0, module.ALONE], ids=["alone", "together"])


def layer(dtype=torch.float64, **kwargs):
    torch.manual_seed(1)
    model = SparseMoE(8, 12, **{"num_experts": 5, "noise_std": 0.0, **kwargs}).to(dtype)
    for name, parameter in model.experts.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


@TYPES
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"num_selected_experts": 2, "capacity_factor": 0.6, "batch_priority": True},
        {"num_selected_experts": 3, "group_size": 7, "normalize_weights": True},
        {"capacity_factor": 0.2, "bias": False, "out_features": 6},
        {"expert_mlp": "swiglu", "num_selected_experts": 2, "capacity_factor": 1.0},
        {"expert_mlp": "geglu", "bias": False},
        {"router": "expert_choice", "capacity_factor": 2.0},
        {"router": "soft", "num_slots": 2},
        {"num_experts": 40, "num_selected_experts": 2},
    ],
    ids=lambda kwargs: ",".join(f"{name}={value}" for name, value in kwargs.items()) or "K=1",
)
@ALONE
def test_a_layer_is_that_of_plain_products(kwargs, dtype, autocast, alone, monkeypatch):
    monkeypatch.setattr(module, "ALONE", alone)
    model = layer(dtype, **kwargs)
    x = torch.randn(3, 11, 8).to(dtype).requires_grad_()
    mask = torch.rand(3, 11) < 0.8
    x.data[~mask] = torch.nan
    y, gradients = assert_same(lambda x: model(x, mask), model, x, autocast)
    assert not y[~mask].any()
    assert not gradients["x"][~mask].any()


COUNTS = {
    "even": [4, 4, 4, 4],
    "empty": [0, 5, 0, 3],
    "one": [0, 0, 19, 0],
    "none": [0, 0, 0, 0],
    "ends": [17, 0, 0, 16],
    "many": [3, 1, 0, 2, 5, 4, 0, 0, 1, 1, 2, 30, 2, 1, 3, 3, 0, 1],
}


@TYPES
@pytest.mark.parametrize("chunk_rows", [8, CHUNK_ROWS])
@pytest.mark.parametrize("unused", [0, 3])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@ALONE
def test_rows_of_any_number(alone, counts, unused, chunk_rows, dtype, autocast, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ROWS", chunk_rows)
    monkeypatch.setattr(module, "ALONE", alone)
    torch.manual_seed(0)
    model = Experts(len(counts), 6, 10, 4).to(dtype)
    count = torch.tensor(counts)
    x = torch.randn(sum(counts), 6).to(dtype).requires_grad_()
    _, gradients = assert_same(lambda x: model(x, count), model, x, autocast)
    for name, gradient in gradients.items():
        if name != "x":
            assert not gradient[count == 0].any(), name
    if unused:  # rows beyond those of the experts: the plain way for CPUs knows none
        longer = torch.cat([x.detach(), torch.full((unused, 6), torch.nan, dtype=dtype)]).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            y = model(longer, count)
            assert not y[sum(counts) :].any()
            assert torch.equal(y[: sum(counts)], model(x, count))
        y.float().square().sum().backward()
        assert not longer.grad[sum(counts) :].any()


@TYPES
@pytest.mark.parametrize(
    "activation", [nn.GELU, lambda: nn.GELU("tanh"), nn.SiLU, nn.ReLU, nn.Identity, QuickGELU, lambda: nn.Softmax(-1)]
)
def test_activations(activation, dtype, autocast):
    model = layer(dtype, act_layer=activation)
    assert_same(model, model, torch.randn(2, 9, 8).to(dtype).requires_grad_(), autocast)


@pytest.mark.parametrize(
    "activation",
    [
        lambda: nn.SiLU(inplace=True),
        lambda: nn.Sequential(nn.Hardswish(inplace=True)),
        lambda: nn.RReLU(0.1, 0.9),
        lambda: nn.Sequential(nn.GELU(), nn.Dropout(0.5)),
        lambda: nn.PReLU(dtype=torch.float64),
    ],
    ids=["in place", "in place within", "random", "random within", "learned"],
)
def test_activations_that_can_not_be_repeated_go_the_plain_way(activation):
    model = layer(act_layer=activation)
    x = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True)
    with calls_of_the_operation() as calls:
        torch.manual_seed(0)
        y = model(x)
        assert not calls
    weight = model.experts.fc1.weight
    (gradient,) = torch.autograd.grad(y.sum(), weight)
    step = 1e-6 * torch.randn_like(weight)
    with torch.no_grad():
        weight.add_(step)
        torch.manual_seed(0)  # what is random is the same once more
        change = (model(x) - y).sum()
    torch.testing.assert_close((gradient * step).sum(), change, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("x_learns", [True, False])
@pytest.mark.parametrize(
    "frozen",
    [
        ("experts.fc1.weight", "experts.fc1.bias"),
        ("experts.fc2.weight", "experts.fc2.bias"),
        ("experts.fc1.bias", "experts.fc2.weight"),
        ("experts.fc1.weight", "experts.fc2.bias", "router.weight"),
        ("router.weight",),
        ("experts.fc1.weight", "experts.fc1.bias", "experts.fc2.weight", "experts.fc2.bias"),
        ("experts.fc1.weight", "experts.fc1.bias", "experts.fc2.weight", "experts.fc2.bias", "router.weight"),
    ],
)
def test_frozen_parts(frozen, x_learns):
    model = layer(num_selected_experts=2, capacity_factor=0.5)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    x = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=x_learns)
    _, gradients = assert_same(model, model, x)
    assert {name for name, gradient in gradients.items() if gradient is None} == {*frozen, *([] if x_learns else ["x"])}


@given(
    st.lists(st.integers(0, 3000) | st.integers(0, 20), min_size=1, max_size=40),
    st.booleans(),
    st.sampled_from([0, 29, 300, math.inf]),
)
@settings(max_examples=200)
def test_chunks(counts, round_rows, alone):
    chunks = make_chunks(counts, round_rows, alone)
    inside = [e for chunk in chunks for e in range(chunk.experts.start, chunk.experts.stop)]
    assert inside == [e for e, count in enumerate(counts) if count]
    end = 0
    for chunk in chunks:
        own = counts[chunk.experts]
        M, C = chunk.num_rows, chunk.num_experts
        assert (chunk.rows.start, chunk.rows.stop) == (end, end + C * M)
        end = chunk.rows.stop
        assert (rounded(max(own)) if round_rows else max(own)) == M
        assert C == 1 or (C * M <= CHUNK_ROWS and alone > M)
        assert C * M - sum(own) <= ROWS_PER_PRODUCT * C + (sum(own) / 16 if round_rows else 0)


@given(st.integers(1, 100_000))
def test_oneDNN_sees_few_numbers_of_rows(rows):
    more = rounded(rows) - rows
    assert 0 <= more <= min(15, 0.06 * rows)
    # the same number again, and one of at most 16 between two powers of two up to 512, where sixteens begin
    assert rounded(rounded(rows)) == rounded(rows)
    assert len({rounded(n) for n in range(129, 257)}) == 16


def test_rows_that_fill_up():
    x = torch.randn(340, 6)
    counts = [7, 0, 333]
    chunks = make_chunks(counts, round_rows=True)
    rows = module._Rows.of(chunks, None, None, None, counts, 340, torch.float32)
    assert [chunk.num_rows for chunk in chunks] == [7, 336]
    taken = torch.cat([rows.take(x, chunk) for chunk in chunks])
    assert torch.equal(taken[rows.weight_P > 0], x)
    assert torch.equal(taken[rows.weight_P == 0], x[-1:].expand(3, -1))


@pytest.mark.parametrize("act_layer", [nn.GELU, partial(nn.GELU, approximate="tanh"), nn.ReLU])
@pytest.mark.parametrize("enabled", [True, False])
def test_products_in_oneDNN_and_without_it(enabled, act_layer, monkeypatch):
    """Against float64, with and without GELU inside the product."""
    calls, linear = [], module.linear
    monkeypatch.setattr(module, "linear", lambda *args: calls.append(args) or linear(*args))
    monkeypatch.setattr(module, "ALONE", 0)
    torch.manual_seed(0)
    model = Experts(3, 32, 128, 32, act_layer=act_layer)
    exact = deepcopy(model).double()
    count = torch.tensor([500, 409, 410])
    x = torch.randn(int(count.sum()), 32)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", enabled)
    with torch.no_grad():
        y = model(x, count)
    assert len(calls) == (6 if enabled and torch.backends.mkldnn.is_available() else 0)
    torch.testing.assert_close(y.double(), exact(x.double(), count), rtol=1e-5, atol=1e-5)


@TYPES
@pytest.mark.parametrize(
    "bias_EO",
    [
        torch.randn(10, 3).T,
        torch.randn(3, 1).expand(3, 10),
        torch.randn(3, 10, 2)[..., 0],
        torch.randn(10).expand(3, -1),
    ],
    ids=["transposed", "one for all", "strided", "shared"],
)
def test_parameters_with_strides(bias_EO, dtype, autocast, monkeypatch):
    monkeypatch.setattr(module, "ALONE", 0)
    model, count = Experts(3, 8, 10, 8).to(dtype), torch.tensor([5, 0, 7])
    model.fc1.bias = nn.Parameter(bias_EO.to(dtype))
    model.fc1.weight = nn.Parameter(torch.randn(3, 8, 10, dtype=dtype).transpose(1, 2))
    x = torch.randn(12, 8, dtype=dtype, requires_grad=True)
    assert_same(lambda x: model(x, count), model, x, autocast)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_of_no_width(dtype):
    model, count = Experts(3, 8, 0, 6).to(dtype), torch.tensor([2, 0, 3])
    nn.init.ones_(model.fc2.bias)
    x = torch.randn(5, 8, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(model(x, count), torch.ones(5, 6, dtype=dtype))
    assert torch.equal(model(x, count), torch.ones(5, 6, dtype=dtype))


def test_operations_of_the_backward_pass_alone_are_counted(monkeypatch):
    monkeypatch.setattr(module, "ALONE", 0)
    model, count = Experts(3, 8, 10, 8), torch.tensor([5, 3, 7])
    y = model(torch.randn(15, 8, requires_grad=True), count).sum()
    with FlopCounterMode(display=False) as counter:
        y.backward()
    assert counter.get_total_flops() == 4 * 2 * 15 * 8 * 10


def saved_bytes(model, x) -> int:
    """Of all that a forward pass keeps for the backward pass, but for the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    total = sum(size for size, _ in storages.values())
    assert y.requires_grad
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_that_of_the_dense_twin_and_one_gathered_copy(dtype):
    torch.manual_seed(0)
    S, D, F = 1024, 64, 256
    x = torch.randn(S, D).to(dtype).requires_grad_()
    dense = saved_bytes(Mlp(D, F).to(dtype), x)
    assert dense >= (D + 2 * F) * S * dtype.itemsize  # the measure sees the tokens and the hidden layer
    sparse = SparseMoE(D, F, num_experts=4, capacity_factor=1.0, batch_priority=True).to(dtype)
    assert saved_bytes(sparse, x) <= 1.15 * dense + S * D * dtype.itemsize


@pytest.mark.parametrize("kwargs", [{}, {"num_selected_experts": 2}, {"router": "expert_choice"}, {"router": "soft"}])
def test_the_result_may_be_changed_in_place(kwargs):
    model = layer(num_slots=2, **kwargs) if "soft" in kwargs.values() else layer(**kwargs)
    x = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True)

    def changed(x):
        y = model(x)
        y *= 2
        return y.add_(x)

    assert_same(changed, model, x)
    experts = Experts(3, 8, 4, 8).double()
    assert_same(lambda x: experts(x[0], torch.tensor([4, 0, 5])).mul_(2), experts, x)


def test_gradient_checkpointing_copies_and_inference_mode():
    model = layer(num_selected_experts=2, capacity_factor=0.8)
    x = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True)
    y, gradients = result_and_gradients(model, model, x, False)
    again = result_and_gradients(lambda x: checkpoint(model, x, use_reentrant=False), model, x, False)
    copy = deepcopy(model)
    copied = result_and_gradients(copy, copy, x, False)
    for other, other_gradients in (again, copied):
        assert torch.equal(other, y)
        assert all(torch.equal(other_gradients[name], gradient) for name, gradient in gradients.items())
    with torch.inference_mode():
        assert torch.equal(model(x), y)
    with torch.no_grad():
        assert torch.equal(model(x), y)


def test_the_default_device_changes_nothing():
    model, x = layer(), torch.randn(2, 9, 8, dtype=torch.float64)
    y = model(x)
    with torch.device("meta"):
        assert torch.equal(model(x), y)
        assert torch.equal(model.bfloat16()(x.bfloat16()).isfinite(), torch.ones(2, 9, 8, device="cpu").bool())


@pytest.mark.parametrize("part", ["fc1", "act", "fc2", "drop"])
def test_who_listens_hears_the_parts(part):
    model, x = layer(), torch.randn(2, 9, 8, dtype=torch.float64)
    heard = []
    listened = getattr(model.experts, part)
    handle = listened.register_forward_hook(lambda *_: heard.append("hook"))
    model(x)
    handle.remove()
    own = listened.forward

    def forward(*args):
        heard.append("forward")
        return own(*args)

    listened.forward = forward
    model(x)
    del listened.forward
    model(x)
    assert heard == ["hook", "forward"]
