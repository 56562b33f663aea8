import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vmoe
from vmoe.moe import SparseMoE
from vmoe.moe.dispatch import Capacity
from vmoe.moe.expert_choice import choose_tokens
from vmoe.moe.router import Routing

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "routing_expert_choice.json").read_text())


def routing_of(gates):
    return Routing(gates, gates, gates, gates)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_golden_choices(case):
    with np.load(GOLDEN / "routing_expert_choice.npz") as file:
        names = ("gates", "item_index", "combine_weights")
        gates, items, weights = (torch.from_numpy(file[f"{case['case']}/{name}"]) for name in names)
    capacity = Capacity(factor=case["capacity_factor"]).rows(case["num_items"], case["num_experts"], 1, None)
    assert capacity == (case["capacity"], case["capacity"])
    chosen = choose_tokens(routing_of(gates[None]), *capacity)
    assert torch.equal(chosen.token_R.view(items.shape), items.long())
    assert torch.equal(chosen.weight_R.view(weights.shape), weights)


@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 5), st.integers(1, 14), st.booleans(), st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_rows_are_the_best_real_tokens_of_each_modality(G, N, E, capacity, normalize, seed):
    generator = torch.Generator().manual_seed(seed)
    gates = torch.randn(G, N, E, generator=generator, dtype=torch.float64).round(decimals=1).softmax(-1)
    member = torch.randint(0, 3, (G, N), generator=generator)  # 2 is padding
    members = torch.stack([member == 0, member == 1], dim=1)
    chosen = choose_tokens(routing_of(gates), capacity, capacity, members, normalize)
    taken = torch.zeros(G, N, E, dtype=torch.bool)
    for g in range(G):
        for m in range(2):
            own = [n for n in range(N) if members[g, m, n]]
            for e in range(E):
                for n in sorted(own, key=lambda n: -gates[g, n, e].item())[:capacity]:
                    taken[g, n, e] = True
    assert torch.equal(chosen.taken_GNE, taken)
    assert (chosen.count_E == min(capacity, N) * G * 2).all()  # rows without a token are zero
    assert torch.equal(chosen.filled_R.view(E, -1).sum(1), taken.sum((0, 1)))

    x = torch.randn(G, N, 4, generator=generator, dtype=torch.float64)
    scale = torch.arange(1.0, E + 1, dtype=torch.float64).repeat_interleave(chosen.count_E)
    y = chosen.combine(chosen.dispatch(x) * scale[:, None])
    weights = torch.where(taken, gates, 0)
    if normalize:
        weights = torch.where(taken, weights / weights.sum(-1, keepdim=True).clamp(min=1e-300), 0)
    expected = (weights * torch.arange(1.0, E + 1)).sum(-1, keepdim=True) * x
    torch.testing.assert_close(y, expected)


def contrastive_layer(**kwargs) -> SparseMoE:
    torch.manual_seed(0)
    return SparseMoE(8, 8, modalities=("image", "text"), num_experts=4, noise_std=0.0, **kwargs)


@pytest.mark.parametrize("kwargs", [{"router": "expert_choice"}, {"router": "soft", "num_slots": 2}])
@pytest.mark.parametrize("train", [True, False])
def test_nothing_leaks_between_modalities_rows_or_from_padding(kwargs, train):
    layer = contrastive_layer(**kwargs).train(train)
    x = torch.randn(3, 10, 8)
    modality = (torch.arange(10) >= 6).long().expand(3, 10)
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[:, 8:] = False
    y = layer(x, mask, modality)
    assert (y[:, 8:] == 0).all()
    other = x.clone()
    other[:, 6:] = torch.randn(3, 4, 8)  # other captions, and other padding
    torch.testing.assert_close(layer(other, mask, modality)[:, :6], y[:, :6])
    longer = mask.clone()
    longer[:, 8:] = True  # longer captions do not change what the patches get
    torch.testing.assert_close(layer(x, longer, modality)[:, :6], y[:, :6])
    torch.testing.assert_close(layer(x[:, :6], mask[:, :6], modality[:, :6]), y[:, :6])
    torch.testing.assert_close(layer(x[1:2], mask[1:2], modality[1:2]), y[1:2])


def test_every_expert_is_full_and_tokens_differ():
    layer = contrastive_layer(router="expert_choice", capacity_factor=0.5).eval()
    with vmoe.record_routing(layer) as record:
        y = layer(torch.randn(4, 32, 8))
    routing = record.layers[""]
    assert (routing.load == 4 * 4).all()
    untouched = ~routing.tokens(routing.kept).any(-1)
    assert untouched.any()
    assert (y[untouched] == 0).all()
    assert routing.metrics["share_dropped"] == untouched.float().mean()


@pytest.mark.parametrize("normalize", [False, True])
def test_the_record_has_the_weights_that_were_used(normalize):
    layer = SparseMoE(8, 8, router="expert_choice", num_experts=4, normalize_weights=normalize).eval()
    with vmoe.record_routing(layer) as record:
        layer(torch.randn(1, 32, 8))
    routing = record.layers[""]
    assert (routing.combine_weights[~routing.kept] == 0).all()
    sums = routing.combine_weights.sum(-1)[routing.kept.any(-1)]
    if normalize:
        torch.testing.assert_close(sums, torch.ones_like(sums))
    else:
        assert (sums < 1).all()
