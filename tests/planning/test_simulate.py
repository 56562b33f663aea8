import math

import pytest
import torch
from torch import nn

from vmoe.models.factory import create_model
from vmoe.moe.dispatch import expert_capacity
from vmoe.planning.simulate import Tracker, optimizer_state, simulate_step
from vmoe.training.config import OptimConfig
from vmoe.utils.config import ConfigError


def meta_model(name="vmoe_tiny_patch8_48", **kwargs):
    with torch.device("meta"):
        return create_model(name, depth=2, **kwargs).train()


def activations(step):
    return max(peak for peak, _, _ in step.peaks)


def test_all_gradients_become_ready():
    model = meta_model()
    step = simulate_step(model, 4)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    everything = sum(p.numel() for p in model.parameters())
    assert step.peaks[-1][1:] == (4 * experts, 4 * (everything - experts))
    assert sum(step.peaks[0][1:]) < 0.01 * 4 * everything
    assert all(parameter.grad is None for parameter in model.parameters())


def test_activations_follow_the_batch_and_checkpointing_keeps_less_and_computes_more():
    model = meta_model()
    small, large = (simulate_step(model, size) for size in (16, 64))
    assert activations(large) == pytest.approx(4 * activations(small), rel=0.02)
    assert large.flops == pytest.approx(4 * small.flops, rel=0.02)
    model.set_grad_checkpointing()
    checkpointed = simulate_step(model, 64)
    assert activations(checkpointed) < 0.8 * activations(large)
    assert 1.2 < checkpointed.flops / large.flops < 1.4


@pytest.mark.parametrize("router", ["vmoe", "expert_choice", "soft"])
def test_experts_in_several_processes_send_their_rows(router):
    model = meta_model(num_experts=8, moe_layers=(1,), router_preset=router)
    layer = model.blocks[1].mlp
    step = simulate_step(model, 4)
    tokens = 37  # 36 patches and the class token
    rows = {
        "vmoe": lambda: expert_capacity(4 * tokens, 8, 2, 1.05) * 8,
        "expert_choice": lambda: 4 * expert_capacity(tokens, 8, 1, 2.0) * 8,
        "soft": lambda: 4 * math.prod(layer.router.slots.shape[:2]),
    }[router]()
    assert step.exchanges == [rows * 128 * 4] * 4  # there and back, forward and backward


def test_without_a_capacity_an_even_load_is_assumed():
    model = meta_model(num_experts=8, moe_layers=(1,), capacity_factor=math.inf)
    assert simulate_step(model, 4).exchanges[0] == 8 * math.ceil(4 * 37 / 8) * 128 * 4  # a row of each of 37 tokens


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_the_contrastive_loss_sees_all_processes(loss):
    model = meta_model("limoe_tiny_patch12_48", init_logit_bias=-10.0)
    one, many = (simulate_step(model, 8, loss, number) for number in (1, 64))
    # Logits of 8 pairs with the other processes' 504, and what their loss keeps.
    assert sum(peak for peak, _, _ in many.peaks[:1]) - sum(peak for peak, _, _ in one.peaks[:1]) >= 2 * 8 * 504 * 4


def test_optimizers_by_what_they_keep():
    model = meta_model(moe_layers=(1,))
    everything = 4 * sum(parameter.numel() for parameter in model.parameters())
    fused, sgd, factored, adam = (
        sum(optimizer_state(model, OptimConfig(name=name, kwargs=kwargs)).values())
        for name, kwargs in (("adamw", {}), ("sgd", {}), ("adafactor", {}), ("adamw", {"fused": False}))
    )
    assert fused == adam == pytest.approx(2 * everything, rel=1e-3)
    assert sgd == everything
    assert factored < 0.1 * everything
    with pytest.raises(ConfigError, match="optim.name 'kron' cannot be planned"):
        optimizer_state(model, OptimConfig(name="kron"))


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_live_and_peak_bytes(device):
    x, stack = torch.zeros(4, 8, device=device), torch.zeros(2, 4, 8, device=device)
    tracker = Tracker([x], [stack.numel()])
    with tracker:
        y = x + 1
        x += 1  # known
        stack * 2  # of experts' size
        z = (y * 2).sum()
        assert tracker.live == 128 + 4
        y.t()  # a view takes nothing
        del y
        assert tracker.live == 4
    assert [tracker.cut(), tracker.cut()] == [128 + 128 + 4, 4]
    del z
    assert tracker.live == 0


def test_flops_and_bytes_of_a_linear_layer():
    layer = nn.Linear(8, 16, device="meta")
    tracker = Tracker()
    with tracker:
        layer(torch.empty(4, 8, device="meta", requires_grad=True)).sum().backward()
    assert tracker.flops == 3 * 2 * 4 * 8 * 16  # forward, and the gradients of input and weight
    assert tracker.moved > 4 * 4 * 16  # the sum's input, among others
