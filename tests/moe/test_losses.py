import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from vmoe.moe import losses

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "auxiliary_losses.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_golden_losses_and_gradients(case):
    with np.load(GOLDEN / "auxiliary_losses.npz") as file:
        prefix = case["case"] + "/"
        golden = {key.removeprefix(prefix): torch.tensor(file[key]) for key in file if key.startswith(prefix)}
    logits = golden["logits"].clone().requires_grad_()
    noisy = golden["logits_noisy"].clone().requires_grad_()
    importance = losses.importance_loss(logits.softmax(-1)[None])
    load = losses.load_loss(logits[None], noisy[None], case["noise_std"], case["num_selected_experts"])
    gshard = losses.gshard_loss(noisy.softmax(-1)[None])
    torch.testing.assert_close(importance, golden["importance"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(load, golden["load"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gshard, golden["gshard"], atol=1e-5, rtol=1e-5)
    (grad_importance,) = torch.autograd.grad(importance, logits)
    grad_logits, grad_noisy = torch.autograd.grad(load, (logits, noisy))
    for ours, name in (
        (grad_importance, "grad_importance"),
        (grad_logits, "grad_load_logits"),
        (grad_noisy, "grad_load_noisy"),
    ):
        assert (ours - golden[name]).abs().max() <= 1e-4 * golden[name].abs().max()


def test_tutels_loss_by_its_formula():
    torch.manual_seed(0)
    logits = torch.randn(40, 6, dtype=torch.float64)
    noisy = logits + torch.randn_like(logits) / 6
    gates, threshold = logits.softmax(1), noisy.topk(2).values[:, 1:]
    load = torch.distributions.Normal(0.0, 1 / 6).cdf(gates - threshold).sum(0)
    expected = sum(x.var() / x.mean() ** 2 for x in (gates.sum(0), load)) / 2
    torch.testing.assert_close(losses.load_importance_loss(logits[None], noisy[None], 1 / 6, 2), expected)


def all_losses(logits, noisy, mask):
    gates, noisy_gates = logits.softmax(-1), noisy.softmax(-1)
    return {
        "importance": losses.importance_loss(gates, mask),
        "load": losses.load_loss(logits, noisy, 0.1, 2, mask),
        "gshard": losses.gshard_loss(noisy_gates, mask),
        "load and importance": losses.load_importance_loss(logits, noisy, 0.1, 2, mask),
        "z": losses.z_loss(logits, mask),
        "local": losses.local_entropy_loss(gates, mask),
        "global": losses.global_entropy_loss(gates, mask),
        "global_min": losses.global_entropy_loss(gates, mask, 4.5),
    }


def test_padding_counts_in_no_loss_even_if_it_is_nan():
    torch.manual_seed(0)
    logits = torch.randn(2, 12, 5, dtype=torch.float64)
    noisy = logits + 0.1 * torch.randn_like(logits)
    mask = torch.rand(2, 12) < 0.6
    padded = logits.masked_fill(~mask[..., None], math.nan)
    with_padding = all_losses(padded, noisy.masked_fill(~mask[..., None], math.nan), mask)
    # Each group by itself, without its padding, then the mean over the groups.
    alone = [all_losses(logits[g : g + 1, mask[g]], noisy[g : g + 1, mask[g]], None) for g in range(2)]
    for name, value in with_padding.items():
        torch.testing.assert_close(value, (alone[0][name] + alone[1][name]) / 2)


def test_a_group_of_padding_only_does_not_count():
    torch.manual_seed(0)
    logits = torch.randn(2, 6, 4)
    mask = torch.tensor([[True] * 6, [False] * 6])
    for name, value in all_losses(logits, logits, mask).items():
        torch.testing.assert_close(value, all_losses(logits[:1], logits[:1], None)[name])
    nobody = all_losses(logits, logits, torch.zeros_like(mask))
    assert all(value == 0 for value in nobody.values())


def test_entropy_losses_are_their_formulas():
    p = torch.tensor([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]])
    local = losses.local_entropy_loss(p)
    torch.testing.assert_close(local, torch.tensor(math.log(2) / 2))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))  # of the mean (0.75, 0.25, 0)
    torch.testing.assert_close(losses.global_entropy_loss(p), torch.tensor(-entropy))
    torch.testing.assert_close(losses.global_entropy_loss(p, min_experts=3), torch.tensor(math.log(3) - entropy))
    assert losses.global_entropy_loss(p, min_experts=1.5) == 0  # enough experts in use: no more push


def test_balanced_and_collapsed_extremes():
    balanced = torch.full((1, 8, 4), 0.25)
    collapsed = torch.zeros(1, 8, 4)
    collapsed[..., 0] = 1
    assert losses.importance_loss(balanced) == 0
    torch.testing.assert_close(losses.importance_loss(collapsed), torch.tensor(3.0))  # E - 1
    torch.testing.assert_close(losses.gshard_loss(balanced), torch.tensor(1.0))
    torch.testing.assert_close(losses.gshard_loss(collapsed), torch.tensor(4.0))  # E
    torch.testing.assert_close(losses.z_loss(torch.zeros(1, 8, 4)), torch.tensor(math.log(4) ** 2))


def test_sure_gates_have_finite_gradients():
    logits = torch.tensor([[[200.0, 0.0, -200.0]]], requires_grad=True)
    gates = logits.softmax(-1)
    (losses.local_entropy_loss(gates) + losses.global_entropy_loss(gates)).backward()
    assert torch.isfinite(logits.grad).all()
