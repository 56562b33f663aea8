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
@settings(max_examples=80, deadline=None)
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
            for rank, (k, _, n) in enumerate(sorted(waiting)):
                position[g, n, k] = rank
                if capacity is None or rank < capacity:
                    rows.append((g * N + n) * K + k)
                    count[e] += 1
    plan = plan_dispatch(index, E, capacity, priority, mask, capacity, chosen)
    assert plan.assignment_R.tolist() == rows
    assert plan.count_E.tolist() == count
    assert {key: plan.position_GNK[key].item() for key in position} == position
    kept = torch.zeros(G * N * K, dtype=torch.bool)
    kept[rows] = True
    assert torch.equal(plan.kept_GNK.flatten(), kept)
    assert torch.equal(plan.row_A[plan.assignment_R], torch.arange(len(rows)))


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-3)])
def test_many_terms_are_not_rounded_one_by_one(dtype, error):
    torch.manual_seed(0)
    plan = plan_dispatch(top_k_experts(torch.randn(1, 64, 16).softmax(-1), 8), 16)
    x, weights = torch.randn(1, 64, 32, dtype=dtype), torch.rand(1, 64, 8, dtype=dtype)
    found, exact = combine(dispatch(x, plan), weights, plan), x.double() * weights.double().sum(-1, keepdim=True)
    assert (found - exact).square().mean().sqrt() <= error * exact.square().mean().sqrt()


def test_a_dropped_choice_reads_no_row():
    plan = plan_dispatch(torch.tensor([[[0, 1], [0, 2], [0, 1]]]), 3, capacity=1)  # 3 rows: the first token's, one more
    y = torch.tensor([[math.inf], [math.nan], [3.0]])
    found = combine(y, torch.full((1, 3, 2), 0.5), plan)
    assert torch.equal(found.nan_to_num(-1), torch.tensor([[[-1.0], [1.5], [0.0]]]))


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
