"""An ensemble in one layer (E3, arXiv 2110.03360) is a layer for each member, with that member's experts and gate."""

import pytest
import torch

import vmoe
from vmoe.moe import SparseMoE
from vmoe.moe.config import RoutingSettings

D, E, T, B = 6, 6, 5, 4
LOSSES = {"gshard_loss": 0.1, "z_loss": 0.01, "local_entropy_loss": 0.02, "global_entropy_loss": 0.03}
CASES = {
    "plain": {"num_selected_experts": 2},
    "groups": {"num_selected_experts": 2, "group_size": 12, "eval_capacity_factor": 0.7, "capacity_multiple_of": 1},
    "bpr": {"batch_priority": True, "eval_capacity_factor": 0.5, "capacity_rounding": "round"},
    "fixed": {"num_selected_experts": 1, "capacity": 3, "normalize_weights": True},
    "sigmoid": {"gate": "sigmoid", "bias_update_rate": 0.1, "num_selected_experts": 2, "num_shared_experts": 1},
    "learned": {"learned_noise": True, "num_selected_experts": 2},
    "choice": {"router": "expert_choice", "load_loss": 0.0, "capacity_multiple_of": 1},
    "choice_groups": {"router": "expert_choice", "load_loss": 0.0, "group_size": 18, "capacity_factor": 1.5},
}


def member(layer, m):
    """The layer of one member alone."""
    M = layer.ensemble_size
    settings = {**vars(layer.settings), "ensemble_size": 1, "num_experts": E // M}
    settings["group_size"] = layer.group_size and layer.group_size // M
    own = SparseMoE(D, 8, **settings).double().eval()
    state = layer.state_dict()
    for name, tensor in own.state_dict().items():
        whole = state[name]
        tensor.copy_(whole if whole.shape == tensor.shape else whole.chunk(M)[m])
    return own


@pytest.mark.parametrize("M", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_a_layer_for_each_member(case, M):
    torch.manual_seed(0)
    settings = {**CASES[case], **LOSSES, "num_experts": E, "ensemble_size": M}
    layer = SparseMoE(D, 8, **settings).double().eval()
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.copy_(torch.randn_like(tensor))
    x = torch.randn(B * M, T, D, dtype=torch.double, requires_grad=True)
    mask = torch.rand(B, T).repeat_interleave(M, 0) < 0.8 if case in ("bpr", "choice") else None
    with vmoe.record_routing(layer) as record:
        y = layer(x, mask)
    call = record.layers[""]
    (y.square().sum() + call.auxiliary_loss).backward()
    loss, gates = 0.0, {name: torch.zeros_like(p) for name, p in layer.named_parameters()}
    x_grad = torch.zeros_like(x)
    for m in range(M):
        own, x_m = member(layer, m), x[m::M].detach().requires_grad_()
        with vmoe.record_routing(own) as record:
            y_m = own(x_m, None if mask is None else mask[m::M])
        torch.testing.assert_close(y[m::M], y_m)
        alone = record.layers[""]
        # Decisions and gates, among all experts.
        first = m * E // M
        assert torch.equal(call.tokens(call.expert_index)[m::M], alone.tokens(alone.expert_index) + first)
        assert torch.equal(call.tokens(call.kept)[m::M], alone.tokens(alone.kept))
        gate = call.tokens(call.gates)[m::M]
        torch.testing.assert_close(gate[..., first : first + E // M], alone.tokens(alone.gates))
        assert gate.count_nonzero() == alone.tokens(alone.gates).count_nonzero()
        assert torch.equal(call.load[first : first + E // M], alone.load)
        loss = loss + alone.auxiliary_loss / M
        (y_m.square().sum() + alone.auxiliary_loss / M).backward()
        x_grad[m::M] = x_m.grad
        for name, parameter in own.named_parameters():
            if parameter.grad is not None:
                whole = gates[name]
                (whole if whole.shape == parameter.shape else whole.chunk(M)[m]).add_(parameter.grad)
    torch.testing.assert_close(call.auxiliary_loss, loss)
    torch.testing.assert_close(x.grad, x_grad)
    for name, parameter in layer.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gates[name], msg=name)


def test_noise_and_capacity_are_those_of_a_member():
    layer = SparseMoE(D, 8, num_experts=E, ensemble_size=2, noise_std=3.0, capacity_factor=1.0, capacity_multiple_of=1)
    with vmoe.record_routing(layer.train()) as record:
        layer(torch.randn(2 * B, 6, D))
    call = record.layers[""]
    assert call.routing.noise_std == 1.0  # 3 / (E / M)
    assert call.load.max() <= 8  # B * 6 tokens of a copy for three experts
    assert "load_loss" in call.losses


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 8, "ensemble_size": 3}, r"ensemble_size must divide num_experts \(8\), got 3"),
        ({"ensemble_size": 2, "group_size": 5}, r"ensemble_size must divide group_size \(5\), got 2"),
        ({"ensemble_size": 4, "num_selected_experts": 3}, r"1\.\.num_experts / ensemble_size \(2\), got 3"),
        ({"ensemble_size": 0}, "ensemble_size must be a whole number >= 1"),
        ({"ensemble_size": 2, "router": "soft", "num_slots": 1}, "ensemble_size=2 needs router='top_k' or"),
        ({"ensemble_size": 2, "auxiliary_loss_scope": "batch"}, "needs auxiliary_loss_scope='group'"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        RoutingSettings(**settings)


def test_a_batch_without_copies_is_refused():
    with pytest.raises(ValueError, match="must hold ensemble_size=2 copies of each image"):
        SparseMoE(D, 8, ensemble_size=2)(torch.randn(3, T, D))
    assert SparseMoE(D, 8, ensemble_size=2).eval()(torch.randn(0, T, D)).shape == (0, T, D)
