import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vmoe.moe import combine, dispatch, expert_capacity, plan_dispatch, top_k_experts

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "routing_topk.json").read_text())


@st.composite
def routings(draw, ties: bool = True):
    """Gates (G, N, E), K, capacity or None, batch priority, mask or None."""
    G, N = draw(st.integers(1, 3)), draw(st.integers(1, 24))
    E = draw(st.integers(1 if ties else 2, 6))  # a single expert gives every token the weight 1: ties
    K = draw(st.integers(1, E))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(G, N, E, generator=generator, dtype=torch.float64) * 2
    if ties and draw(st.booleans()):
        logits = logits.round()
    capacity = draw(st.none() | st.integers(1, N))
    mask = None
    if draw(st.booleans()):
        mask = torch.rand(G, N, generator=generator) < draw(st.sampled_from([0.0, 0.5, 0.9]))
    return logits.softmax(-1), K, capacity, draw(st.booleans()), mask


def plan_of(gates, K, capacity, priority, mask):
    index = top_k_experts(gates, K)
    weights = gates.gather(-1, index)
    return index, weights, plan_dispatch(index, gates.shape[-1], capacity, weights[..., 0] if priority else None, mask)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_golden_routing(case):
    with np.load(GOLDEN / "routing_topk.npz") as file:
        figures = {
            name: torch.from_numpy(file[f"{case['case']}/{name}"])
            for name in ("gates", "expert_index", "buffer_index", "kept", "combine_weights")
        }
    K = case["num_selected_experts"]
    capacity = expert_capacity(case["num_items"], case["num_experts"], K, case["capacity_factor"])
    assert capacity == case["capacity"]
    index, weights, plan = plan_of(figures["gates"][None], K, capacity, case["batch_priority"], None)
    assert torch.equal(index[0], figures["expert_index"].long())
    assert torch.equal(plan.position_GNK[0], figures["buffer_index"].long())
    assert torch.equal(plan.kept_GNK[0], figures["kept"])
    torch.testing.assert_close(weights[0], figures["combine_weights"], atol=0, rtol=0)


PRIORITIES = [-math.inf, -2.5, -1.0, -1e-40, -0.0, 0.0, 1e-40, 0.25, 1.0, 1.0 + 1e-12, 1.0 + 2**-23, 3e38, math.inf]


@given(st.data())
@settings(max_examples=150)
def test_one_sort_is_the_plain_order(data):
    G, N, E = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12)), data.draw(st.integers(1, 5))
    K = data.draw(st.integers(1, E))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    index = torch.rand(G, N, E, generator=generator).argsort(-1)[..., :K]
    values = torch.tensor(data.draw(st.sampled_from([PRIORITIES, [-0.0, 0.0, 0.25]])), dtype=torch.float64)
    priority = values[torch.randint(len(values), (G, N), generator=generator)].to(dtype)
    mask = torch.rand(G, N, generator=generator) < 0.7 if data.draw(st.booleans()) else None
    chosen = torch.rand(G, N, K, generator=generator) < 0.8 if data.draw(st.booleans()) else None
    capacity = data.draw(st.none() | st.integers(0, 4))

    rows, position, count = [], {}, []
    for e in range(E):
        count.append(0)
        for g in range(G):
            waiting = [
                (k, -priority[g, n].item(), n)
                for n in range(N)
                for k in range(K)
                if index[g, n, k] == e and (mask is None or mask[g, n]) and (chosen is None or chosen[g, n, k])
            ]
            for place, (k, _, n) in enumerate(sorted(waiting)):
                position[g, n, k] = place
                if capacity is None or place < capacity:
                    rows.append((g * N + n) * K + k)
                    count[e] += 1
    plan = plan_dispatch(index, E, capacity, priority, mask, capacity, chosen)
    assert plan.assignment_R.tolist() == rows
    assert plan.count_E.tolist() == count
    assert {key: plan.position_GNK[key].item() for key in position} == position
    kept = torch.zeros(G * N * K, dtype=torch.bool)
    kept[rows] = True
    assert torch.equal(plan.kept_GNK.flatten(), kept)


@given(routings())
@settings(max_examples=150, deadline=None)
def test_no_expert_above_capacity_and_rows_are_consistent(routing):
    gates, _, capacity, _, mask = routing
    G, N, E = gates.shape
    index, _, plan = plan_of(*routing)
    kept = plan.kept_GNK
    real = torch.ones(G, N, dtype=torch.bool) if mask is None else mask
    assert not (kept & ~real[..., None]).any()
    for g in range(G):
        for e in range(E):
            wanted = int(((index[g] == e) & real[g, :, None]).sum())
            taken = int(((index[g] == e) & kept[g]).sum())
            # As many as there is room for, and no more.
            assert taken == (wanted if capacity is None else min(wanted, capacity))
    assert int(plan.count_E.sum()) == int(kept.sum()) == len(plan.assignment_R)
    # Each row holds the assignment that points to it, and rows lie expert by expert.
    assert torch.equal(plan.row_A[plan.assignment_R], torch.arange(len(plan.assignment_R)))
    expert_of_row = index.flatten()[plan.assignment_R]
    assert torch.equal(expert_of_row, torch.arange(E).repeat_interleave(plan.count_E))


@given(routings())
@settings(max_examples=100, deadline=None)
def test_room_for_all_drops_nothing(routing):
    gates, K, _, priority, mask = routing
    for capacity in (None, gates.shape[1] * K):
        _, _, plan = plan_of(gates, K, capacity, priority, mask)
        kept = plan.kept_GNK if mask is None else plan.kept_GNK[mask]
        assert kept.all()


@given(routings())
@settings(max_examples=150, deadline=None)
def test_batch_priority_never_drops_the_more_important(routing):
    gates, K, capacity, _, mask = routing
    index, weights, plan = plan_of(gates, K, capacity, True, mask)
    kept = plan.kept_GNK
    real = torch.ones(gates.shape[:2], dtype=torch.bool) if mask is None else mask
    for g in range(gates.shape[0]):
        for k in range(K):
            for e in range(gates.shape[-1]):
                here = (index[g, :, k] == e) & real[g]
                dropped, taken = here & ~kept[g, :, k], here & kept[g, :, k]
                if dropped.any() and taken.any():
                    assert weights[g, dropped, 0].max() <= weights[g, taken, 0].min()
                    # and a full queue of first choices leaves nothing to second ones
                    assert not (kept[g, :, k + 1 :] & (index[g, :, k + 1 :] == e)).any()


@given(routings(ties=False), st.randoms(use_true_random=False))
@settings(max_examples=80, deadline=None)
def test_permuting_tokens_permutes_the_decisions_under_batch_priority(routing, random):
    gates, K, capacity, _, mask = routing
    order = list(range(gates.shape[1]))
    random.shuffle(order)
    _, _, plan = plan_of(gates, K, capacity, True, mask)
    _, _, permuted = plan_of(gates[:, order], K, capacity, True, None if mask is None else mask[:, order])
    assert torch.equal(plan.kept_GNK[:, order], permuted.kept_GNK)


@given(routings())
@settings(max_examples=80, deadline=None)
def test_masked_tokens_change_nothing(routing):
    gates, K, capacity, priority, mask = routing
    if mask is None:
        return
    _, _, plan = plan_of(gates, K, capacity, priority, mask)
    for g in range(gates.shape[0]):
        alone = gates[g : g + 1, mask[g]]
        if alone.shape[1]:
            _, _, without = plan_of(alone, K, capacity, priority, None)
            assert torch.equal(plan.kept_GNK[g, mask[g]], without.kept_GNK[0])


@given(routings())
@settings(max_examples=60, deadline=None)
def test_dispatch_and_combine_are_the_weighted_sum(routing):
    gates, *_ = routing
    index, weights, plan = plan_of(*routing)
    G, N, E = gates.shape
    x = torch.randn(G, N, 5, dtype=torch.float64)
    scale = torch.arange(1, E + 1, dtype=torch.float64)  # expert e multiplies by e + 1
    rows = dispatch(x, plan)
    rows = rows * scale.repeat_interleave(plan.count_E)[:, None]
    expected = ((weights * plan.kept_GNK * scale[index]).sum(-1))[..., None] * x
    torch.testing.assert_close(combine(rows, weights, plan), expected)


def test_gradients_of_dispatch_and_combine():
    torch.manual_seed(0)
    gates = torch.randn(2, 7, 3, dtype=torch.float64).softmax(-1)
    for capacity, mask in ((None, None), (2, None), (3, torch.rand(2, 7) < 0.7)):
        _, weights, plan = plan_of(gates, 2, capacity, True, mask)
        x = torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True)
        w = weights.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda x, w, p=plan: combine(dispatch(x, p).sin(), w, p), (x, w))


@given(st.integers(1, 10**5), st.integers(1, 64), st.integers(1, 4), st.floats(0.01, 8), st.sampled_from([1, 4, 8]))
def test_capacity_is_enough_and_rounded_up(num_tokens, num_experts, num_selected, factor, multiple):
    capacity = expert_capacity(num_tokens, num_experts, num_selected, factor, multiple_of=multiple)
    exact = num_tokens * num_selected * factor / num_experts
    assert capacity % multiple == 0
    assert exact <= capacity < math.ceil(exact) + multiple
    each = expert_capacity(torch.tensor([num_tokens]), num_experts, num_selected, factor, multiple_of=multiple)
    assert each.tolist() == [capacity]


@pytest.mark.parametrize(("factor", "rounding"), [(0, "ceil"), (-1.0, "ceil"), (float("nan"), "ceil"), (1.0, "floor")])
def test_capacity_refuses_nonsense(factor, rounding):
    with pytest.raises(ValueError, match="must be"):
        expert_capacity(16, 4, 1, factor, rounding)
