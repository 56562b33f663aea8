"""The sparse layer against a plain loop over groups, tokens and experts in float64, with random settings.

Outputs, decisions, losses and all gradients. A short form by default, thousands of layers with `-m exhaustive`.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import vmoe
from vmoe.moe import SparseMoE

D, HIDDEN = 4, 6
MODALITIES = ("image", "text")
LOSSES = ("importance_loss", "gshard_loss", "z_loss", "local_entropy_loss", "global_entropy_loss")


# --- the loop ---


def mlp(x_D, first, second, act, gated, norm=None):
    h = F.linear(x_D, *first)
    if gated:
        gate, value = h.chunk(2)
        h = act(gate) * value
    else:
        h = act(h)
    if norm is not None:
        h = F.layer_norm(h, h.shape, eps=norm[2]) * norm[0] + norm[1]
    return F.linear(h, *second)


def expert(layer, e, x_D):
    experts = layer.experts
    norm = None if experts.norm is None else (experts.norm.weight[e], experts.norm.bias[e], experts.norm.eps)
    first, second = ((linear.weight[e], linear.bias[e]) for linear in (experts.fc1, experts.fc2))
    return mlp(x_D, first, second, experts.act, experts.gated, norm)


def capacity_of(s, num_tokens, num_choices, training):
    if s.capacity is not None:
        return s.capacity
    factor = s.capacity_factor if training else s.eval_capacity_factor
    if s.router == "expert_choice" and factor is None:
        factor = s.capacity_factor
    if factor is None:
        return num_tokens
    exact = num_tokens * num_choices * factor / s.num_experts
    if s.capacity_rounding == "tutel":
        exact = num_choices * math.floor(factor * math.ceil(num_tokens / s.num_experts))
    number = round(exact) if s.capacity_rounding == "round" else math.ceil(exact)
    return math.ceil(number / s.capacity_multiple_of) * s.capacity_multiple_of


def route_group(layer, s, tokens, real, modality, T):
    """(outputs, {(token, expert)} kept, gates, logits) of one group; tokens (N, D), lists of bool and int."""
    N, E = len(tokens), s.num_experts
    y = [torch.zeros(layer.out_features, dtype=tokens.dtype) for _ in range(N)]
    own = [[n for n in range(N) if real[n] and modality[n] == m] for m in range(len(MODALITIES))]
    everyone = [n for n in range(N) if real[n]]
    kept = set()
    if s.router == "soft":
        unit = lambda v: v / (v.square().sum() + 1e-6).sqrt()  # noqa: E731
        slots = [unit(slot) * layer.router.scale for each in layer.router.slots for slot in each]
        P = len(slots) // E
        score = torch.stack([torch.stack([unit(token) @ slot for slot in slots]) for token in tokens])
        for members in filter(None, own):
            shares = score[members].softmax(0)
            inputs = [sum(shares[i, j] * tokens[n] for i, n in enumerate(members)) for j in range(E * P)]
            results = torch.stack([expert(layer, j // P, z) for j, z in enumerate(inputs)])
            for n in members:
                y[n] = y[n] + score[n].softmax(0) @ results
                kept |= {(n, e) for e in range(E)}
        logits = torch.stack([score[:, e * P : (e + 1) * P].logsumexp(1) for e in range(E)], 1)
        return y, kept, logits.softmax(1), logits
    seen, units = tokens, [[n] for n in everyone]  # what the gate sees, and what goes to an expert together
    if s.per_image:
        images = [[n for n in range(first, first + T) if real[n]] for first in range(0, N, T)]
        seen = torch.stack([tokens[own].mean(0) if own else 0 * tokens[0] for own in images for _ in range(T)])
        units = [own for own in images if own]
    if s.gate == "cosine":
        z = F.normalize(seen @ layer.router.projection.T + layer.router.projection_bias, dim=1)
        scale = layer.router.temperature.clamp(max=math.log(100)).exp()
        logits = z @ F.normalize(layer.router.weight, dim=1).T * scale
    else:
        logits = seen @ layer.router.weight.T
    scores = logits.sigmoid() if s.gate == "sigmoid" else logits.softmax(1)
    gates = scores / scores.sum(1, keepdim=True)
    if s.router == "expert_choice":
        for members in own:
            C = capacity_of(s, len(members), 1, layer.training)
            for e in range(E):
                kept |= {(n, e) for n in sorted(members, key=lambda n: (-gates[n, e].item(), n))[:C]}
        for n in everyone:
            mine = [e for e in range(E) if (n, e) in kept]
            total = sum(gates[n, e] for e in mine) if s.normalize_weights else 1
            for e in mine:
                y[n] = y[n] + gates[n, e] / total * expert(layer, e, tokens[n])
        return y, kept, gates, logits
    choice = scores + (layer.router.expert_bias if s.bias_update_rate > 0 else 0)
    chosen = [sorted(range(E), key=lambda e: (-choice[n, e].item(), e))[: s.num_selected_experts] for n in range(N)]
    turn = units
    if s.batch_priority:
        turn = sorted(units, key=lambda own: (-gates[own[0], chosen[own[0]][0]].item(), own[0]))
    C = capacity_of(s, len(units), s.num_selected_experts, layer.training)
    rows = [0] * E
    for k in range(s.num_selected_experts):
        for own in turn:
            e = chosen[own[0]][k]
            rows[e] += 1
            for n in own if rows[e] <= C else ():
                kept.add((n, e))
                total = sum(scores[n, other] for other in chosen[n]) if s.normalize_weights else 1
                y[n] = y[n] + scores[n, e] / total * expert(layer, e, tokens[n])
    return y, kept, gates, logits


def entropy(p):
    return -sum(value * value.log() for value in p)


def losses_of(s, gates, logits, members):
    """{name: value} of the tokens in `members`: all of them, and for each modality its own."""
    everyone, own = members
    E = s.num_experts
    found = {}
    if everyone:
        mean = gates[everyone].mean(0)
        found["importance_loss"] = mean.var(correction=0) / mean.mean() ** 2
        first = torch.tensor([[float(gates[n].argmax() == e) for e in range(E)] for n in everyone]).double().mean(0)
        found["gshard_loss"] = (first * mean).mean() * E**2
        found["z_loss"] = torch.stack([logits[n].logsumexp(0) ** 2 for n in everyone]).mean()
    for m, name in enumerate(MODALITIES):
        if own[m]:
            found[f"{name}/local_entropy_loss"] = torch.stack([entropy(gates[n]) for n in own[m]]).mean()
            found[f"{name}/global_entropy_loss"] = -entropy(gates[own[m]].mean(0))
    return found


def loop(layer, x_BTD, mask_BT, modality_BT):
    """(output, {(group, token, expert)} kept, auxiliary loss)."""
    s, (B, T) = layer.settings, x_BTD.shape[:2]
    tokens = x_BTD.flatten(0, 1)
    real = mask_BT.flatten().tolist()
    modality = modality_BT.flatten().tolist()
    size = min(s.group_size or (B * T if s.router == "top_k" else T), B * T)
    outputs, all_kept, by_group = [], set(), []
    gates, logits = [], []
    for g, start in enumerate(range(0, B * T, size)):
        missing = start + size - min(start + size, B * T)
        group = torch.cat([tokens[start : start + size], tokens.new_zeros(missing, D)])
        group_real = real[start : start + size] + [False] * missing
        group_modality = modality[start : start + size] + [0] * missing
        group = torch.stack([token if is_real else token * 0 for token, is_real in zip(group, group_real)])
        y, kept, group_gates, group_logits = route_group(layer, s, group, group_real, group_modality, T)
        if layer.shared is not None:
            shared = layer.shared
            first, second = ((linear.weight, linear.bias) for linear in (shared.fc1, shared.fc2))
            for n in range(size):
                if group_real[n]:
                    y[n] = y[n] + mlp(group[n], first, second, shared.act, shared.gated)
        outputs += y
        all_kept |= {(g, n, e) for n, e in kept}
        everyone = [n for n in range(size) if group_real[n]]
        own = [[n for n in everyone if group_modality[n] == m] for m in range(len(MODALITIES))]
        by_group.append((everyone, own))
        gates.append(group_gates)
        logits.append(group_logits)
    if s.auxiliary_loss_scope == "batch":
        shift = lambda groups: [g * size + n for g, group in enumerate(groups) for n in group]  # noqa: E731
        merged = (shift([e for e, _ in by_group]), [shift([own[m] for _, own in by_group]) for m in range(2)])
        found = [losses_of(s, torch.cat(gates), torch.cat(logits), merged)]
    else:
        found = [losses_of(s, *each) for each in zip(gates, logits, by_group)]
    total = 0 * x_BTD.sum()  # with a graph, also where there is no token
    for name in {name for each in found for name in each}:
        weight = getattr(s, name.rpartition("/")[2])
        values = [each[name] for each in found if name in each]
        total = total + weight * torch.stack(values).mean()
    return torch.stack(outputs)[: B * T].view(B, T, -1), all_kept, total


# --- random layers ---


@st.composite
def cases(draw):
    """(settings of a layer, what its call is like)."""
    router = draw(st.sampled_from(["top_k", "top_k", "expert_choice", "soft"]))
    E = draw(st.integers(1, 5))
    B, T = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    per_image = router == "top_k" and draw(st.booleans())
    kwargs = {
        "router": router,
        "num_experts": E,
        "num_selected_experts": draw(st.integers(1, E)),
        "noise_std": 0.0,
        "load_loss": 0.0,
        "capacity_factor": draw(st.sampled_from([0.3, 0.6, 1.0, 1.5] + [None] * (router == "top_k"))),
        "capacity_rounding": draw(st.sampled_from(["ceil", "round", "tutel"])),
        "capacity_multiple_of": draw(st.sampled_from([1, 4])),
        "per_image": per_image,
        "group_size": draw(st.sampled_from([None, None, 2 * T] if per_image else [None, None, 3, 5, 100])),
        "expert_mlp": draw(st.sampled_from(["mlp", "swiglu", "geglu", "relu2glu"])),
        "num_shared_experts": draw(st.sampled_from([0, 0, 1])),
        "auxiliary_loss": draw(st.sampled_from(["record", "attach"])),
        "auxiliary_loss_scope": draw(st.sampled_from(["group", "batch"])),
        **{name: draw(st.sampled_from([0.0, 0.3])) for name in LOSSES},
    }
    if router == "top_k":
        kwargs |= {
            "batch_priority": draw(st.booleans()),
            "normalize_weights": draw(st.booleans()),
            "gate": draw(st.sampled_from(["softmax", "sigmoid", "cosine"])),
            "bias_update_rate": draw(st.sampled_from([0.0, 0.1])),
            "eval_capacity_factor": draw(st.sampled_from([None, 0.5])),
            "capacity": draw(st.sampled_from([None, None, 1, 3])),
        }
        if kwargs["gate"] == "cosine":
            kwargs["cosine_dim"] = 3
    elif router == "expert_choice":
        kwargs |= {"normalize_weights": draw(st.booleans()), "capacity": draw(st.sampled_from([None, None, 2]))}
    else:
        kwargs |= {"num_slots": draw(st.integers(1, 3))}
    call = {
        "act_layer": draw(st.sampled_from([nn.GELU, lambda: nn.GELU("tanh"), nn.SiLU])),
        "norm_layer": draw(st.sampled_from([None, None, nn.LayerNorm])),
        "train": draw(st.booleans()),
        "shape": (B, T),
        "masked": draw(st.booleans()),
        "modalities": draw(st.booleans()),
        "checkpointing": draw(st.booleans()),
        "seed": draw(st.integers(0, 10**6)),
    }
    return kwargs, call


def check(case, run=lambda layer, *inputs: layer(*inputs)):
    kwargs, call = case
    torch.manual_seed(call["seed"])
    layer = SparseMoE(D, HIDDEN, act_layer=call["act_layer"], norm_layer=call["norm_layer"], modalities=MODALITIES,
                      **kwargs).double().train(call["train"])  # fmt: skip
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.7)
        if layer.settings.bias_update_rate > 0:
            layer.router.expert_bias.normal_(std=0.3)
    (B, T), masked, several = call["shape"], call["masked"], call["modalities"]
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(B, T) < 0.7 if masked else None
    modality = torch.randint(0, 2, (B, T)) if several else None
    inputs = (x, mask, modality)
    with vmoe.record_routing(layer) as record:
        try:
            if call["checkpointing"]:
                y = checkpoint(lambda *arguments: run(layer, *arguments), *inputs, use_reentrant=False)
            else:
                y = run(layer, *inputs)
        except ValueError as error:
            assume("gives no capacity" not in str(error))
            raise
    every = torch.ones(B, T, dtype=torch.bool)
    expected, kept, expected_loss = loop(
        layer, x, every if mask is None else mask, (~every).long() if modality is None else modality
    )
    routing = record.layers[""]
    listed = routing.kept & routing.mask[..., None]
    assert {(g, n, int(routing.expert_index[g, n, k])) for g, n, k in listed.nonzero().tolist()} == kept
    assert routing.load.tolist() == [sum(e == other for *_, other in kept) for e in range(layer.num_experts)]
    loss = record.auxiliary_loss()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(loss, expected_loss)
    wanted = [x, *layer.parameters()]
    direction = torch.randn_like(y)
    # An attached loss comes with the gradient of the output.
    attached = layer.auxiliary_loss == "attach" and layer.training
    own = torch.autograd.grad((y * direction).sum() + (0 if attached else loss), wanted, allow_unused=True,
                              materialize_grads=True)  # fmt: skip
    other = torch.autograd.grad((expected * direction).sum() + expected_loss, wanted, allow_unused=True,
                                materialize_grads=True)  # fmt: skip
    for name, grad, expected_grad in zip(["x", *(name for name, _ in layer.named_parameters())], own, other):
        torch.testing.assert_close(grad, expected_grad, msg=lambda text, name=name: f"{name}: {text}")


SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much]


@given(cases())
@settings(max_examples=50, deadline=None, suppress_health_check=SLOW)
def test_a_loop_gives_the_same(case):
    check(case)


@pytest.mark.exhaustive
@pytest.mark.timeout(7200)
@given(cases())
@settings(max_examples=4000, deadline=None, suppress_health_check=SLOW)
def test_a_loop_gives_the_same_for_thousands_of_layers(case):
    check(case)
