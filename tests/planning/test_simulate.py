import math

import pytest
import torch
from torch import nn

from vmoe.models.factory import create_model
from vmoe.moe.dispatch import expert_capacity
from vmoe.planning.hardware import HARDWARE, Hardware
from vmoe.planning.simulate import Tracker, simulate_optimizer, simulate_step
from vmoe.training.config import OptimConfig
from vmoe.utils.config import ConfigError

H100 = HARDWARE["h100"]
# A byte and an operation take a second each, so that seconds are counts.
COUNTING = Hardware(1, 1e-12, 1e-12, 1e-9, 1, 1, matmul_efficiency=1.0, memory_efficiency=1.0, launch=0.0)


def meta_model(name="vmoe_tiny_patch8_48", **kwargs):
    with torch.device("meta"):
        return create_model(name, depth=2, **kwargs).train()


def most(step, label):
    labels = [label, "expert_rows"] if label == "activations" else [label]
    return max(sum(peak.get(each, 0) for each in labels) for peak in step.peaks)


def test_all_gradients_become_ready():
    model = meta_model()
    step = simulate_step(model, 4, H100)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    everything = sum(p.numel() for p in model.parameters())
    assert step.peaks[-1]["expert_gradients"] == 4 * experts
    assert step.peaks[-1]["gradients"] == 4 * (everything - experts)
    assert step.peaks[0].get("gradients", 0) == 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_activations_follow_the_batch():
    model = meta_model()
    small, large = (simulate_step(model, size, H100) for size in (16, 64))
    assert most(large, "activations") == pytest.approx(4 * most(small, "activations"), rel=0.02)
    assert large.flops == pytest.approx(4 * small.flops, rel=0.02)


def test_checkpointing_keeps_less_and_computes_more():
    model = meta_model()
    plain = simulate_step(model, 64, H100)
    model.set_grad_checkpointing()
    checkpointed = simulate_step(model, 64, H100)
    assert most(checkpointed, "activations") < 0.8 * most(plain, "activations")
    assert 1.2 < checkpointed.flops / plain.flops < 1.4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lower_precision_copies_the_weights_and_halves_tensors_of_matmuls(checkpointing):
    model = meta_model()
    model.set_grad_checkpointing(checkpointing)
    full, half = (simulate_step(model, 64, H100, precision) for precision in ("float32", "bf16"))
    weights = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name and p.ndim == 3)
    assert most(full, "copies") == most(full, "expert_copies") == 0
    assert most(half, "expert_copies") == pytest.approx(2 * weights, rel=0.01)  # and biases
    assert 0.5 < most(half, "activations") / most(full, "activations") < 0.85
    assert half.flops == full.flops
    assert half.peaks[-1]["gradients"] == full.peaks[-1]["gradients"]  # of the float32 weights


# Rows are the norm's output, in float32 under autocast too; those of slots come from a matrix multiplication.
@pytest.mark.parametrize(
    ("router", "precision", "size"),
    [("vmoe", "float32", 4), ("vmoe", "bf16", 4), ("expert_choice", "float32", 4), ("soft", "bf16", 2)],
)
def test_experts_in_several_processes_send_their_rows(router, precision, size):
    model = meta_model(num_experts=8, moe_layers=(1,), router_preset=router)
    layer = model.blocks[1].mlp
    step = simulate_step(model, 4, H100, precision)
    tokens = 37  # 36 patches and the class token
    rows = {
        "vmoe": lambda: expert_capacity(4 * tokens, 8, 2, 1.05) * 8,
        "expert_choice": lambda: 4 * expert_capacity(tokens, 8, 1, 2.0) * 8,
        "soft": lambda: 4 * math.prod(layer.router.slots.shape[:2]),
    }[router]()
    assert len(step.exchanges) == 4  # there and back, forward and backward
    assert step.exchanges[0] == rows * 128 * size


def test_without_a_capacity_an_even_load_is_assumed():
    model = meta_model(num_experts=8, moe_layers=(1,), capacity_factor=math.inf)
    step = simulate_step(model, 4, H100)
    assert step.exchanges[0] == 8 * math.ceil(4 * 37 / 8) * 128 * 4  # a row of each of 37 tokens


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_the_contrastive_loss_sees_all_processes(loss):
    with torch.device("meta"):
        model = create_model("limoe_tiny_patch12_48", depth=2, init_logit_bias=-10.0).train()
    one, many = (simulate_step(model, 8, H100, loss=loss, num_processes=number) for number in (1, 64))
    assert most(many, "loss") > 16 * most(one, "loss")
    assert most(many, "loss") >= 2 * 8 * 512 * 4  # logits and what their loss keeps


def test_optimizers_by_what_they_keep():
    model = meta_model()
    everything = 4 * sum(parameter.numel() for parameter in model.parameters())
    adam = simulate_optimizer(model, OptimConfig(name="adamw"), foreach=True)
    sgd = simulate_optimizer(model, OptimConfig(name="sgd"), foreach=True)
    factored = simulate_optimizer(model, OptimConfig(name="adafactor"), foreach=True)
    fused = simulate_optimizer(model, OptimConfig(name="adamw", kwargs={"fused": True}), foreach=True)
    assert sum(adam.state.values()) == pytest.approx(2 * everything, rel=1e-3)
    assert sum(sgd.state.values()) == everything
    assert sum(factored.state.values()) < 0.1 * everything
    assert fused.state == adam.state
    assert fused.step == 0
    assert adam.step > 0.9 * everything  # all tensors at once
    largest = 4 * max(parameter.numel() for parameter in model.parameters())
    assert simulate_optimizer(model, OptimConfig(name="adamw"), foreach=False).step == 3 * largest


def test_an_optimizer_that_reads_values_is_refused():
    with pytest.raises(ConfigError, match="optim.name 'kron' cannot be planned"):
        simulate_optimizer(meta_model(), OptimConfig(name="kron"), foreach=False)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_live_and_peak_bytes_by_label(device):
    tracker = Tracker(COUNTING)
    x = torch.zeros(4, 8, device=device)
    with tracker:
        y = x + 1
        with tracker.labelled("loss"):
            z = (y * 2).sum()
        assert tracker.live == {"activations": 128, "loss": 4}
        y.t()  # a view takes nothing
        del y
        assert tracker.live["activations"] == 0
    assert tracker.cut() == {"activations": 128, "loss": 128 + 4}
    assert tracker.cut() == {"activations": 0, "loss": 4}
    del z
    assert sum(tracker.live.values()) == 0


def test_owned_storages_change_their_label():
    tracker = Tracker(COUNTING)
    with tracker:
        x = torch.empty(10, device="meta")
    tracker.own([x, x.view(2, 5)], "gradients")
    assert tracker.live["gradients"] == 40
    assert tracker.live["activations"] == 0


def test_flops_of_a_linear_layer():
    layer = nn.Linear(8, 16, device="meta")
    tracker = Tracker(COUNTING)
    with tracker:
        layer(torch.empty(4, 8, device="meta", requires_grad=True)).sum().backward()
    assert tracker.flops == 3 * 2 * 4 * 8 * 16  # forward, and the gradients of input and weight
    assert tracker.seconds["matmul"] >= tracker.flops * 2 / 3  # those bound by matmul, not by bytes


def test_bytes_of_experts_weights_are_counted_apart():
    weight = torch.empty(2, 4, 8, device="meta")
    tracker = Tracker(COUNTING, [weight.numel()])
    with tracker:
        copy = weight.to(torch.bfloat16)
        torch.empty(64, device="meta") + 1  # of as many elements, but no stack of matrices
    assert tracker.live["expert_weights"] == copy.numel() * 2
    assert tracker.expert_bytes == 64 * 4 + 64 * 2
    assert tracker.seconds["memory"] == 3 * 64 * 4  # made, read and written, without experts
