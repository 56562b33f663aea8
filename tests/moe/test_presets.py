"""Each named router against the formula of its own paper, written out token by token in float64."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import vmoe
from vmoe.moe import PRESETS, RoutingSettings, SparseMoE, with_preset

N, D, HIDDEN = 24, 8, 12


def preset_layer(name: str, train: bool = False, **settings) -> SparseMoE:
    torch.manual_seed(0)
    layer = SparseMoE(D, HIDDEN, router_preset=name, num_tokens=N, **settings).double().train(train)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.7)
    return layer


def tokens() -> torch.Tensor:
    return torch.randn(1, N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def expert(layer: SparseMoE, e: int, x: torch.Tensor) -> torch.Tensor:
    """One expert by its formula: GELU, or gate and value."""
    fc1, fc2 = layer.experts.fc1, layer.experts.fc2
    h = fc1.weight[e] @ x + fc1.bias[e]
    kind = {2 * HIDDEN: h[:HIDDEN], HIDDEN: None}[len(h)]
    if kind is None:
        h = F.gelu(h)
    else:
        activation = F.silu if isinstance(layer.experts.act, torch.nn.SiLU) else F.gelu
        h = activation(h[:HIDDEN]) * h[HIDDEN:]
    return fc2.weight[e] @ h + fc2.bias[e]


def run(layer: SparseMoE, x: torch.Tensor):
    with vmoe.record_routing(layer) as record:
        y = layer(x)
    return y[0], record.layers[""]


def top(values: torch.Tensor, k: int) -> list[int]:
    return sorted(range(len(values)), key=lambda e: -values[e].item())[:k]


def logits_of(layer: SparseMoE, x: torch.Tensor) -> torch.Tensor:
    return x[0] @ layer.router.weight.T


def squared_cv(values: torch.Tensor) -> torch.Tensor:
    return values.var(correction=0) / values.mean() ** 2


def switch_loss(layer: SparseMoE, x: torch.Tensor) -> torch.Tensor:
    """E · sum_e f_e · P_e (Switch, eq. 4 to 6; GShard, algorithm 1 times E²/E)."""
    p = logits_of(layer, x).softmax(-1)
    E = p.shape[-1]
    share = torch.tensor([(p.argmax(-1) == e).double().mean() for e in range(E)])
    return E * (share * p.mean(0)).sum()


def softmax_first(logits, chosen):
    return logits.softmax(-1)[chosen]  # the weights do not sum to one


def softmax_of_the_chosen(logits, chosen):
    return logits[chosen].softmax(-1)


def normalised(logits, chosen):
    p = logits.softmax(-1)[chosen]
    return p / p.norm(p=1)


def importance(layer, x):
    return squared_cv(logits_of(layer, x).softmax(-1).sum(0))


def switch_and_z_loss(layer, x):  # eq. 5 of ST-MoE
    return switch_loss(layer, x) + 0.1 * logits_of(layer, x).exp().sum(-1).log().square().mean()


@pytest.mark.parametrize(
    ("name", "K", "weights", "loss_weight", "loss", "act"),
    [
        ("vmoe", 2, softmax_first, 0.005, importance, None),
        ("switch", 1, softmax_first, 0.01, switch_loss, None),
        ("gshard", 2, normalised, 0.01, switch_loss, None),
        ("glam", 2, normalised, 0.01, switch_loss, None),
        ("st_moe", 2, normalised, 0.01, switch_and_z_loss, torch.nn.GELU),
        ("mixtral", 2, softmax_of_the_chosen, 0.01, switch_loss, torch.nn.SiLU),
        ("dbrx", 4, normalised, 0.05, switch_loss, torch.nn.SiLU),
    ],
)
def test_outputs_and_losses(name, K, weights, loss_weight, loss, act):
    layer, x = preset_layer(name), tokens()
    y, routing = run(layer, x)
    for n, logits in enumerate(logits_of(layer, x)):
        chosen = top(logits, K)
        expected = sum(w * expert(layer, e, x[0, n]) for w, e in zip(weights(logits, chosen), chosen))
        torch.testing.assert_close(y[n], expected)
    torch.testing.assert_close(routing.auxiliary_loss, loss_weight * loss(layer, x))
    assert layer.num_experts == (16 if name == "dbrx" else 8)
    assert layer.experts.gated == (act is not None)
    assert act is None or isinstance(layer.experts.act, act)


def test_vmoe_load_loss():
    layer, x = preset_layer("vmoe", train=True), tokens()
    _, routing = run(layer, x)
    noisy, clean = routing.routing.noisy_logits_GNE[0], logits_of(layer, x)
    std = 1 / 8
    load = torch.zeros(8, dtype=torch.float64)
    for n in range(N):
        threshold = noisy[n].sort(descending=True).values[1]
        load += 0.5 * (1 + torch.erf((clean[n] - threshold) / std / math.sqrt(2)))
    expected = 0.005 * squared_cv(load) + 0.005 * squared_cv(clean.softmax(-1).sum(0))
    torch.testing.assert_close(routing.auxiliary_loss, expected)
    assert 0.05 < (noisy - clean).std() < 0.2


def test_switch_jitter_reaches_the_gate_alone():
    layer, x = preset_layer("switch", train=True, capacity_factor=None), tokens()
    y, routing = run(layer, x)
    ratio = routing.routing.logits_GNE[0] / logits_of(layer, x)
    assert (ratio != 1).all()
    assert routing.routing.logits_GNE.sub(logits_of(layer, x)).abs().max() < 0.02 * 0.7 * D * 3
    for n in range(N):
        e = int(routing.expert_index[0, n, 0])
        torch.testing.assert_close(y[n], routing.gates[0, n, e] * expert(layer, e, x[0, n]))


@pytest.mark.parametrize(("name", "threshold"), [("gshard", 0.5), ("glam", 0.5), ("st_moe", 0.2)])
def test_the_second_expert_is_kept_by_its_probability(name, threshold):
    layer = preset_layer(name, train=True, capacity_factor=None)
    x = tokens()[:, :4].repeat(1, 1500, 1)
    _, routing = run(layer, x)
    kept = routing.kept[0].view(1500, 4, 2).double().mean(0)
    weight = routing.combine_weights[0, :4, 1]
    assert (kept[:, 0] == 1).all()
    torch.testing.assert_close(kept[:, 1], (weight / threshold).clamp(max=1), atol=0.06, rtol=0)
    assert routing.routing.combine_weights_GNK.sum(-1).allclose(torch.ones(1, 6000, dtype=torch.float64))
    # What was not sent anywhere takes no room.
    assert routing.load.sum() == routing.kept.sum()


def test_noisy_topk():
    layer, x = preset_layer("noisy_topk", train=True), tokens()
    y, routing = run(layer, x)
    noisy = routing.routing.noisy_logits_GNE[0]
    clean, E, K = logits_of(layer, x), 8, 4
    std = torch.log1p((x[0] @ layer.router.noise_weight.T).exp())  # softplus, eq. 4
    assert 0.8 < ((noisy - clean) / std).std() < 1.2
    importance, load = torch.zeros(E, dtype=torch.float64), torch.zeros(E, dtype=torch.float64)
    for n in range(N):
        chosen = top(noisy[n], K)
        kept = torch.full((E,), -math.inf, dtype=torch.float64)
        kept[chosen] = noisy[n][chosen]
        g = kept.softmax(-1)  # eq. 3
        torch.testing.assert_close(y[n], sum(g[e] * expert(layer, e, x[0, n]) for e in chosen))
        importance += g
        for e in range(E):  # eq. 8 and 9
            others = sorted((noisy[n][j].item() for j in range(E) if j != e), reverse=True)
            load[e] += 0.5 * (1 + torch.erf((clean[n, e] - others[K - 1]) / std[n, e] / math.sqrt(2)))
    torch.testing.assert_close(routing.auxiliary_loss, 0.1 * squared_cv(importance) + 0.1 * squared_cv(load))
    (gradient,) = torch.autograd.grad(routing.auxiliary_loss, layer.router.noise_weight)
    assert gradient.abs().max() > 0


def test_noisy_topk_starts_without_signal():
    layer = SparseMoE(D, HIDDEN, router_preset="noisy_topk")
    assert not layer.router.weight.any()
    assert not layer.router.noise_weight.any()


def test_mixtral_drops_nothing():
    layer = preset_layer("mixtral", train=True)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[0] = 1
    assert run(layer, tokens().abs())[1].kept.all()  # in training and in the worst case


def test_deepseek():
    layer, x = preset_layer("deepseek"), tokens()
    bias = torch.randn(8).double()
    layer.router.expert_bias.copy_(bias)
    y, routing = run(layer, x)
    shared = layer.shared
    for n in range(N):
        s = logits_of(layer, x)[n].sigmoid()
        chosen = top(s + bias, 2)  # the bias chooses, it does not weigh
        h = shared.fc1.weight @ x[0, n] + shared.fc1.bias
        own = shared.fc2.weight @ (F.silu(h[:HIDDEN]) * h[HIDDEN:]) + shared.fc2.bias
        routed = sum(s[e] / s[chosen].sum() * expert(layer, e, x[0, n]) for e in chosen)
        torch.testing.assert_close(y[n], own + routed)
    assert routing.auxiliary_loss == 0


def test_deepseek_bias_moves_against_the_load():
    layer, x = preset_layer("deepseek", train=True), tokens()
    _, first = run(layer, x)
    _, second = run(layer, x)
    load = first.load + second.load
    assert not layer.router.expert_bias.any()
    vmoe.update_expert_bias(torch.nn.Sequential(layer))
    torch.testing.assert_close(layer.router.expert_bias, 0.001 * (load.double().mean() - load).sign().float())
    before = layer.router.expert_bias.clone()
    layer.eval()
    run(layer, x)
    vmoe.update_expert_bias(layer)  # nothing was counted: evaluation does not balance
    assert torch.equal(layer.router.expert_bias, before)
    assert "router.expert_bias" in layer.state_dict()
    assert "router.expert_load" not in layer.state_dict()


def test_deepseek_bias_balances():
    layer = preset_layer("deepseek", train=True, bias_update_rate=0.01)
    x = tokens() + 1.5

    def spread() -> float:
        load = run(layer, x)[1].load.double()
        return (load.max() / load.mean()).item()

    before = spread()
    for _ in range(200):
        layer(x)
        vmoe.update_expert_bias(layer)
    assert spread() < 0.6 * before


def test_a_bias_that_nobody_moves_is_told(monkeypatch):
    layer = preset_layer("deepseek", train=True)
    monkeypatch.setattr(type(layer.router), "CALLS_BEFORE_WARNING", 3)
    layer(tokens()), layer(tokens())
    with pytest.warns(UserWarning, match="update_expert_bias"):
        layer(tokens())


def test_recomputation_counts_the_load_once():
    layer, x = preset_layer("deepseek", train=True), tokens().requires_grad_()
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert layer.router.expert_load.sum() == 2 * N


def test_limoe():
    layer, x = preset_layer("limoe", train=True, noise_std=0.0, capacity_factor=0.4), tokens()
    y, routing = run(layer, x)
    p = logits_of(layer, x).softmax(-1)
    capacity = 4  # ceil(24 · 0.4 / 8) = 2, raised to a multiple of 4
    for e in range(8):  # the surest tokens first
        asking = [n for n in range(N) if int(p[n].argmax()) == e]
        kept = sorted(asking, key=lambda n: -p[n, e].item())[:capacity]
        for n in asking:
            expected = p[n, e] * expert(layer, e, x[0, n]) if n in kept else torch.zeros(D, dtype=torch.float64)
            torch.testing.assert_close(y[n], expected)
    mean = p.mean(0)
    expected = (
        0.005 * squared_cv(p.sum(0))
        + 0.001 * logits_of(layer, x).exp().sum(-1).log().square().mean()
        + 0.01 * (mean * mean.log()).sum()
    )
    torch.testing.assert_close(routing.auxiliary_loss, expected)


def test_expert_choice():
    layer, x = preset_layer("expert_choice"), tokens()
    y, routing = run(layer, x)
    s = logits_of(layer, x).softmax(-1)
    k = 8  # n · c / e = 24 · 2 / 8 = 6, raised to a multiple of 4
    expected = torch.zeros(N, D, dtype=torch.float64)
    for e in range(8):
        for n in top(s[:, e], k):
            expected[n] += s[n, e] * expert(layer, e, x[0, n])
    torch.testing.assert_close(y, expected)
    assert (routing.load == k).all()
    assert routing.auxiliary_loss == 0


def test_soft():
    layer, x = preset_layer("soft", num_experts=4), tokens()
    y, routing = run(layer, x)
    P = N // 4
    phi = F.normalize(layer.router.slots, dim=-1).flatten(0, 1)  # (S, D)
    similarity = layer.router.scale * F.normalize(x[0], dim=-1) @ phi.T
    dispatch, combine = similarity.softmax(0), similarity.softmax(1)  # algorithm 1 of the paper
    slots = dispatch.T @ x[0]
    outputs = torch.stack([expert(layer, s // P, slots[s]) for s in range(4 * P)])
    torch.testing.assert_close(y, combine @ outputs, atol=1e-5, rtol=1e-5)  # the reference's epsilon under the root
    torch.testing.assert_close(routing.gates[0], combine.view(N, 4, P).sum(-1), atol=1e-5, rtol=1e-5)


# --- presets as such


def test_every_preset_is_known_and_trains():
    expected = "vmoe switch gshard glam noisy_topk mixtral dbrx deepseek st_moe limoe expert_choice soft"
    assert set(PRESETS) == set(expected.split())
    for name in PRESETS:
        layer = preset_layer(name, train=True, num_experts=16)
        with vmoe.record_routing(layer) as record:
            loss = layer(tokens()).square().mean() + record.auxiliary_loss()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters()), name


def test_settings_beside_a_preset_win():
    layer = SparseMoE(D, HIDDEN, router_preset="mixtral", num_experts=3, num_selected_experts=1, expert_mlp="mlp")
    assert (layer.num_experts, layer.num_selected_experts, layer.experts.gated) == (3, 1, False)
    assert with_preset({"z_loss": 5.0}, {"router_preset": "switch"})["z_loss"] == 0
    assert with_preset({"z_loss": 5.0}, {})["z_loss"] == 5
    assert with_preset({"z_loss": 5.0}, {"router": "soft"})["z_loss"] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router_preset": "swich"}, "router_preset must be one of .*got 'swich'"),
        ({"router": "expert_choice", "batch_priority": True}, "batch_priority=True needs router='top_k'"),
        ({"router": "expert_choice", "load_loss": 0.1}, "load_loss=0.1 needs router='top_k'"),
        ({"router": "expert_choice", "capacity_factor": None}, "needs a finite capacity_factor"),
        ({"router": "soft", "capacity_factor": math.inf}, "needs a finite capacity_factor"),
        (
            {"router": "soft", "eval_capacity_factor": 1.0},
            "eval_capacity_factor=1.0 needs router='top_k' or 'expert_choice'",
        ),
        ({"router": "soft"}, "needs num_slots, or the number of tokens"),
        ({"router": "soft", "num_slots": 0}, "num_slots must be a whole number >= 1"),
        ({"num_slots": 4}, "num_slots=4 needs router='soft'"),
        ({"gate": "tanh"}, "gate must be one of"),
        ({"gate": "sigmoid", "learned_noise": True}, "learned_noise needs gate='softmax'"),
        ({"cosine_dim": 8}, "cosine_dim=8 needs gate='cosine', not 'softmax'; leave it out"),
        ({"load_importance_loss": 0.1, "noise_std": 0.0}, "load_importance_loss needs noise_std > 0"),
        ({"expert_mlp": "relu"}, "expert_mlp must be one of"),
        ({"random_threshold": 1.5}, "random_threshold must be in"),
        ({"expert_drop": 1.0}, "expert_drop must be >= 0 and < 1"),
        ({"capacity": 2.5}, "capacity must be a whole number"),
        ({"num_shared_experts": 1.5}, "num_shared_experts must be a whole number >= 0, got 1.5"),
        ({"num_selected_experts": "2"}, "num_selected_experts must be a whole number >= 1, got '2'"),
        ({"noise_std": "1"}, "noise_std must be a number, got '1'"),
        ({"z_loss": None}, "z_loss must be a number, got None"),
        ({"expert_drop": "a"}, "expert_drop must be a number, or None, got 'a'"),
        ({"batch_priority": "yes"}, "batch_priority must be true or false, got 'yes'"),
        ({"router": ["soft"]}, "router must be one of"),
        ({"router_preset": ["a"]}, "router_preset must be one of"),
    ],
)
def test_settings_that_do_not_go_together_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SparseMoE(D, HIDDEN, **settings)


def test_what_timm_cannot_pass_as_none_has_a_number():
    assert RoutingSettings(capacity_factor=math.inf).capacity_factor is None
    assert RoutingSettings(random_threshold=0).random_threshold is None


def test_whole_numbers_may_come_as_floats():
    layer = SparseMoE(D, HIDDEN, num_experts=4.0, num_selected_experts=2.0, capacity_multiple_of=2.0)
    assert layer(tokens().float()).shape == (1, N, D)


CAPACITIES = {  # of 240 tokens for 8 experts in training
    "vmoe": 64, "switch": 40, "gshard": 60, "glam": 60, "noisy_topk": None, "mixtral": None, "dbrx": None,
    "deepseek": None, "st_moe": 40, "limoe": 32, "expert_choice": 60, "soft": 30,
}  # fmt: skip


@pytest.mark.parametrize(("name", "capacity"), CAPACITIES.items())
def test_capacities_of_the_presets(name, capacity):
    layer = SparseMoE(D, HIDDEN, router_preset=name, num_experts=8, num_tokens=240)
    K = layer.num_selected_experts if layer.router_type == "top_k" else 1
    found = layer.router.slots.shape[1] if name == "soft" else layer._capacity().rows(240, 8, K, None)[0]
    assert found == capacity
    noise = {"vmoe": 1.0, "limoe": 1.0}.get(name, 0.0)
    jitter = 0.01 if name == "switch" else 0.0
    assert (layer.settings.noise_std, layer.settings.input_jitter) == (noise, jitter)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("how", ["to", "default", "load", "assign"])
def test_the_bias_stays_float32(dtype, how):
    build = partial(SparseMoE, D, HIDDEN, router_preset="deepseek", num_experts=4)
    if how == "default":
        torch.set_default_dtype(dtype)
        try:
            layer = build()
        finally:
            torch.set_default_dtype(torch.float32)
    else:
        layer = build() if how == "load" else build().to(dtype)
        if how != "to":
            state = {name: tensor.to(dtype) for name, tensor in layer.state_dict().items()}
            layer.load_state_dict(state, assign=how == "assign")
    router = layer.router
    assert router.expert_bias.dtype == torch.float32
    router.expert_bias.fill_(0.5)
    router.expert_load.copy_(torch.tensor([70000, 10, 40000, 40000]))
    router.update_bias()
    expected = 0.5 + 0.001 * torch.tensor([-1.0, 1.0, -1.0, -1.0])
    torch.testing.assert_close(router.expert_bias, expected, atol=1e-6, rtol=0)
    assert layer.half().double().router.expert_bias.dtype == torch.float32
    torch.testing.assert_close(router.expert_bias, expected, atol=1e-6, rtol=0)


def test_the_load_is_no_buffer_and_follows_the_device():
    """DistributedDataParallel overwrites buffers by those of the first process."""
    layer = preset_layer("deepseek", train=True)
    assert "router.expert_load" not in dict(layer.named_buffers())
    layer(tokens())
    assert layer.router.expert_load.sum() == 2 * N
    assert layer.to("meta").router.expert_load.is_meta
    assert not layer.to_empty(device="cpu").router.expert_load.any()


def test_assigned_weights_leave_nothing_on_the_meta_device():
    layer = preset_layer("deepseek", train=True)
    with torch.device("meta"):
        empty = preset_layer("deepseek", train=True)
    empty.load_state_dict(layer.state_dict(), assign=True)
    empty(tokens())
    assert empty.router.expert_load.sum() == 2 * N
    vmoe.update_expert_bias(empty)
    assert empty.router.expert_bias.any()


def test_a_frozen_router_keeps_its_bias():
    layer = preset_layer("deepseek", train=True)
    layer.router.requires_grad_(False)
    layer(tokens())
    vmoe.update_expert_bias(layer)
    assert not layer.router.expert_bias.any()
    assert not layer.router.expert_load.any()


def test_what_the_router_gave_up_is_not_dropped():
    layer = preset_layer("gshard", train=True, capacity_factor=None)
    _, routing = run(layer, tokens())
    assert not routing.kept.all()
    assert routing.metrics["share_dropped"] == 0
