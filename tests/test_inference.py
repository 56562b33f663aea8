"""What docs/inference.md says: compiled evaluation, single images, and layers that never wait for the device."""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import vmoe
from vmoe.moe import SparseMoE

LAYERS = {
    "one": {},
    "two": {"num_selected_experts": 2},
    "priority": {"num_selected_experts": 2, "batch_priority": True},
    "groups": {"group_size": 10, "batch_priority": True},
    "dropless": {"capacity_factor": None, "eval_capacity_factor": None},
    "given up": {"router_preset": "st_moe"},
    "gated": {"router_preset": "mixtral"},
    "balanced": {"router_preset": "deepseek"},
    "expert choice": {"router": "expert_choice"},
    "soft": {"router": "soft", "num_slots": 2},
}


def make_layer(settings: dict) -> SparseMoE:
    torch.manual_seed(0)
    capacity = {} if settings.get("router") == "soft" else {"capacity_factor": 1.0, "eval_capacity_factor": 1.0}
    return SparseMoE(16, 32, modalities=("image", "text"), **{"num_experts": 4, **capacity, **settings})


def without_numbers(layer: nn.Module, device: str) -> dict[str, Tensor]:
    """The layer's tensors, only their shapes, on a device that need not exist: who asks for a number gets an error."""
    return {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device=device, requires_grad=tensor.requires_grad)
        for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]
    }


def inputs(masked: bool, device: str, requires_grad: bool = False) -> tuple[Tensor, Tensor | None, Tensor | None]:
    x = torch.empty(2, 13, 16, device=device, requires_grad=requires_grad)
    if not masked:
        return x, None, None
    return x, torch.empty(2, 13, device=device, dtype=torch.bool), torch.empty(2, 13, device=device, dtype=torch.long)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("how", ["train", "eval", "int8"])
@pytest.mark.parametrize("settings", LAYERS.values(), ids=LAYERS)
def test_a_layer_on_a_gpu_asks_the_device_nothing(settings, how, masked):
    layer = make_layer(settings).train(how == "train")
    if how == "int8":
        vmoe.quantize_experts(layer, "int8")
    with FakeTensorMode(), torch.no_grad():
        y = torch.func.functional_call(layer, without_numbers(layer, "cuda"), inputs(masked, "cuda"))
    assert y.shape == (2, 13, 16)
    assert y.device.type == "cuda"


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("settings", LAYERS.values(), ids=LAYERS)
def test_nor_do_its_losses_and_its_backward_pass(settings, masked):
    layer = make_layer(settings)
    tensors, arguments = without_numbers(layer, "meta"), inputs(masked, "meta", requires_grad=True)
    with vmoe.record_routing(layer) as record:
        y = torch.func.functional_call(layer, tensors, arguments)
        (y.sum() + record.auxiliary_loss()).backward()
    assert arguments[0].grad.shape == arguments[0].shape
    assert all(tensor.grad is not None for tensor in tensors.values() if tensor.requires_grad)


@pytest.mark.parametrize("question", [lambda x: x.sum().item(), lambda x: x.tolist(), lambda x: x[x > 0]])
def test_a_question_would_be_an_error(question):
    with pytest.raises((RuntimeError, NotImplementedError)):
        question(torch.empty(3, device="meta"))
    with FakeTensorMode(), pytest.raises((DataDependentOutputException, RuntimeError)):
        question(torch.empty(3, device="cuda"))


def check_compiled(mode: dict, factor: float | None, batches: tuple[int, ...] = (1, 8, 8, 1), **model_settings) -> None:
    """Compiled evaluation is eager evaluation, with one graph for each size of batch."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    settings = {"embed_dim": 32, "depth": 2, "num_heads": 2, "eval_capacity_factor": factor, "batch_priority": True}
    model = vmoe.create_model("vmoe_tiny_patch8_48", num_classes=10, **{**settings, **model_settings}).eval()
    nn.init.normal_(model.head.weight)
    compiled = torch.compile(model, fullgraph=True, **mode)
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for batch in batches:
            x = torch.randn(batch, 3, 48, 48)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(set(batches))


@pytest.mark.parametrize("factor", [1.0, None])
def test_a_second_batch_of_the_same_size_is_not_compiled_again(factor):
    check_compiled({"backend": "eager"}, factor)


@pytest.mark.slow  # a compiler for C++ takes the time
def test_compiled_to_reduce_overhead():
    # One sparse block: a dense one beside it would only be more to compile.
    check_compiled({"mode": "reduce-overhead"}, 1.0, batches=(8, 8), depth=1, moe_layers="every1")


@pytest.mark.exhaustive
@pytest.mark.parametrize("factor", [1.0, None])
def test_two_sizes_compiled_to_reduce_overhead(factor):
    check_compiled({"mode": "reduce-overhead"}, factor)


@pytest.mark.parametrize("factor", [1.0, None])
def test_one_image_is_what_it_is_in_a_batch_where_nothing_is_dropped(factor):
    torch.manual_seed(0)
    model = vmoe.create_model("vmoe_tiny_patch8_48", num_classes=10, depth=2, eval_capacity_factor=factor).eval()
    nn.init.normal_(model.head.weight)
    x = torch.randn(8, 3, 48, 48)
    with torch.no_grad():
        together, alone = model(x), torch.cat([model(image) for image in x.split(1)])
    if factor is None:
        torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
    else:  # the tokens of a call compete for the same capacity
        assert not torch.allclose(alone, together, rtol=1e-2)
