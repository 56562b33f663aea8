"""torch.func on the layer: vmap, per-sample gradients, ensembles, forward mode, against loops and differences."""

import copy

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import vmoe
from vmoe.moe import SparseMoE

TIGHT = {"capacity_factor": 0.5, "eval_capacity_factor": 0.5, "capacity_multiple_of": 1}
SETTINGS = {
    "no capacity": {},
    "two experts": {**TIGHT, "num_selected_experts": 2},
    "priority": {**TIGHT, "batch_priority": True},
    "groups with padding": {**TIGHT, "group_size": 4},
    "expert choice": {"router": "expert_choice", "capacity_factor": 1.0},
    "soft": {"router": "soft", "num_slots": 2},
    "gated and shared": {"expert_mlp": "swiglu", "num_shared_experts": 1},
    "norm": {"norm_layer": torch.nn.LayerNorm},
}
V = 3


def make(name="no capacity", **settings):
    torch.manual_seed(0)
    settings = {"noise_std": 0.0, "load_loss": 0.0, **SETTINGS[name], **settings}
    return SparseMoE(6, 8, num_experts=4, **settings).double()


def batch():
    torch.manual_seed(1)
    return torch.randn(V, 2, 5, 6, dtype=torch.double)


def detached(layer):
    return {name: parameter.detach() for name, parameter in layer.named_parameters()}


def with_record(layer, parameters, x):
    """A loss with the auxiliary losses."""
    with vmoe.record_routing(layer) as record:
        loss = functional_call(layer, parameters, (x,)).square().sum()
    return loss + record.auxiliary_loss()


@pytest.mark.parametrize("name", SETTINGS)
def test_vmap_and_per_sample_gradients(name):
    layer, x_VBTD = make(name, importance_loss=0.3), batch()
    torch.testing.assert_close(vmap(layer)(x_VBTD), torch.stack([layer(x) for x in x_VBTD]))
    own = vmap(grad(lambda parameters, x: with_record(layer, parameters, x)), in_dims=(None, 0))(
        detached(layer), x_VBTD
    )
    for index, x in enumerate(x_VBTD):
        layer.zero_grad()
        with_record(layer, dict(layer.named_parameters()), x).backward()
        for key, parameter in layer.named_parameters():
            torch.testing.assert_close(own[key][index], parameter.grad, msg=key)


@pytest.mark.parametrize("name", SETTINGS)
def test_an_ensemble(name):
    layers, x = [make(name) for _ in range(V)], batch()[0]
    for layer in layers:
        torch.nn.init.normal_(next(layer.parameters()))
    stacked, _ = stack_module_state(layers)
    base = copy.deepcopy(layers[0]).to("meta")
    together = vmap(lambda parameters, x: functional_call(base, parameters, (x,)), in_dims=(0, None))(stacked, x)
    torch.testing.assert_close(together, torch.stack([layer(x) for layer in layers]))


@pytest.mark.parametrize("name", SETTINGS)
def test_forward_mode(name):
    layer, x, tangent = make(name), *batch()[:2]
    along = detached(layer)
    direction = {key: torch.randn_like(parameter) for key, parameter in along.items()}

    def call(parameters, x):
        return functional_call(layer, parameters, (x,))

    _, slope = jvp(call, (along, x), (direction, tangent))
    step = 1e-6
    ends = [
        call({key: along[key] + sign * step * direction[key] for key in along}, x + sign * step * tangent)
        for sign in (1, -1)
    ]
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-7)
    few = x[:1, :3]
    torch.testing.assert_close(jacfwd(layer)(few), jacrev(layer)(few))
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(vjp(layer, x)[1](tangent)[0], torch.autograd.grad(layer(leaf), leaf, tangent)[0])
    ours = hessian(lambda x: layer(x).square().sum())(few)
    torch.testing.assert_close(ours, torch.autograd.functional.hessian(lambda x: layer(x).square().sum(), few))
    torch.testing.assert_close(jacrev(jacrev(lambda x: layer(x).square().sum()))(few), ours)


def test_attached_losses_count_in_per_sample_gradients():
    layer, x_VBTD = make(importance_loss=0.3), batch()
    attached = make(importance_loss=0.3, auxiliary_loss="attach")
    losses = {
        layer: lambda parameters, x: with_record(layer, parameters, x),
        attached: lambda parameters, x: functional_call(attached, parameters, (x,)).square().sum(),
    }
    recorded, own = (vmap(grad(loss), in_dims=(None, 0))(detached(layer), x_VBTD) for loss in losses.values())
    torch.testing.assert_close(own, recorded)


def test_noise_needs_a_choice_of_randomness_and_a_bias_evaluation():
    noisy, biased = make(noise_std=1.0), make(bias_update_rate=0.1)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(noisy)(batch())
    assert vmap(noisy, randomness="different")(batch()).isfinite().all()
    with pytest.raises(RuntimeError, match=r"call model.eval\(\), or build the model with bias_update_rate=0"):
        vmap(biased)(batch())
    assert vmap(biased.eval())(batch()).isfinite().all()
