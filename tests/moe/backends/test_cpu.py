"""The fused experts for CPUs against the reference backend."""

from contextlib import nullcontext
from copy import deepcopy

import pytest
import timm
import torch
from timm.layers import Mlp
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import vmoe.inspection.profile  # noqa: F401  (completes PyTorch's table of FLOPs)
from vmoe.moe import Experts, SparseMoE, use_backend


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
    """Both backends give the same; returns what the fused one gives."""
    with use_backend("cpu"):
        y, gradients = result_and_gradients(run, model, x, autocast)
    with use_backend("reference"):
        expected, expected_gradients = result_and_gradients(run, model, x, autocast)
    tolerance = 1e-2 if autocast else {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-2}[x.dtype]
    assert_close(y, expected, tolerance)
    for name, gradient in gradients.items():
        assert (gradient is None) == (expected_gradients[name] is None), name
        if gradient is not None:
            assert_close(gradient, expected_gradients[name], tolerance, name)
    with use_backend("cpu"), torch.no_grad():
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            assert_close(run(x.detach()), expected, tolerance, "result without gradients")
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
def test_a_layer_is_that_of_the_reference(kwargs, dtype, autocast):
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
@pytest.mark.parametrize("unused", [0, 3])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_rows_of_any_number(counts, unused, dtype, autocast):
    torch.manual_seed(0)
    model = Experts(len(counts), 6, 10, out_features=4).to(dtype)
    count = torch.tensor(counts)
    x = torch.randn(sum(counts), 6).to(dtype).requires_grad_()
    _, gradients = assert_same(lambda x: model(x, count), model, x, autocast)
    for name, gradient in gradients.items():
        if name != "x":
            assert not gradient[count == 0].any(), name
    if unused:  # rows beyond those of the experts
        longer = torch.cat([x.detach(), torch.full((unused, 6), torch.nan, dtype=dtype)]).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            y = model(longer, count)
            assert not y[sum(counts) :].any()
            assert torch.equal(y[: sum(counts)], model(x, count))
        y.float().square().sum().backward()
        assert not longer.grad[sum(counts) :].any()


@TYPES
@pytest.mark.parametrize(
    "activation", [nn.GELU, lambda: nn.GELU("tanh"), nn.SiLU, nn.ReLU, timm.layers.GELU, timm.layers.GELUTanh]
)
def test_activations(activation, dtype, autocast):
    model = layer(dtype, act_layer=activation)
    assert_same(model, model, torch.randn(2, 9, 8).to(dtype).requires_grad_(), autocast)


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
def test_parameters_with_strides(bias_EO, dtype, autocast):
    model, count = Experts(3, 8, 10).to(dtype), torch.tensor([5, 0, 7])
    model.fc1.bias = nn.Parameter(bias_EO.to(dtype))
    model.fc1.weight = nn.Parameter(torch.randn(3, 8, 10, dtype=dtype).transpose(1, 2))
    x = torch.randn(12, 8, dtype=dtype, requires_grad=True)
    assert_same(lambda x: model(x, count), model, x, autocast)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_of_no_width(dtype):
    model, count = Experts(3, 8, 0, out_features=6).to(dtype), torch.tensor([2, 0, 3])
    nn.init.ones_(model.fc2.bias)
    x = torch.randn(5, 8, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(model(x, count), torch.ones(5, 6, dtype=dtype))
    assert torch.equal(model(x, count), torch.ones(5, 6, dtype=dtype))


def test_operations_of_the_backward_pass_alone_are_counted():
    model, count = Experts(3, 8, 10), torch.tensor([5, 0, 7])
    y = model(torch.randn(12, 8, requires_grad=True), count).sum()
    with FlopCounterMode(display=False) as counter:
        y.backward()
    assert counter.get_total_flops() == 4 * 2 * 12 * 8 * 10


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
    experts = Experts(3, 8, 4).double()
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
