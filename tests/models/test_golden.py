"""The reference's golden values: whole models, expert choice, few-shot accuracies.

Top-K routing and the auxiliary losses have theirs in tests/moe.
"""

import json

import numpy as np
import pytest
import torch

from tests.convert.golden import GOLDEN, check_ensemble, check_two_tower, check_vision
from vmoe.evaluation.few_shot import few_shot_accuracy
from vmoe.moe import expert_capacity
from vmoe.moe.expert_choice import choose_tokens
from vmoe.moe.router import Routing

MORE = GOLDEN / "more"


@pytest.mark.parametrize(
    "name",
    [
        "softmoe_slots",
        "vmoe_expert_choice",
        "vmoe_k1_bpr_c05",
        "vmoe_k2_bpr_c1_indices",
        "vmoe_k2_vanilla",
        "vmoe_map_qknorm_sincos2d",
        "vmoe_representation",
    ],
)
def test_vision(name):
    check_vision(name)


@pytest.mark.parametrize(
    "name",
    ["e7_k1_capacity_first", "width24_e3_k2_c06", "choice_e3_small_group_token", "dense_defaults_nonsquare"],
)
def test_other_vision_configs(name):
    check_vision(name, MORE)


@pytest.mark.parametrize("name", ["vmoe_ensemble_m2_k1", "vmoe_ensemble_m2_k2_bpr"])
def test_ensembles(name):
    check_ensemble(name)


def test_two_towers():
    check_two_tower("two_tower_bias")
    check_two_tower("tower_gmp", MORE)


def test_expert_choice():
    cases = json.loads((GOLDEN / "routing_expert_choice.json").read_text())
    with np.load(GOLDEN / "routing_expert_choice.npz") as file:
        for case in cases:
            gates_NE, items_EC, weights_EC = (
                torch.tensor(file[f"{case['case']}/{key}"]) for key in ("gates", "item_index", "combine_weights")
            )
            N, E, capacity = case["num_items"], case["num_experts"], case["capacity"]
            assert expert_capacity(N, E, 1, case["capacity_factor"]) == capacity
            gates_1NE = gates_NE[None]
            routing = Routing(gates_1NE, gates_1NE, gates_1NE, gates_1NE)
            chosen = choose_tokens(routing, capacity, capacity)
            assert torch.equal(chosen.token_R.view(E, capacity), items_EC.long()), case
            assert torch.equal(chosen.weight_R.view(E, capacity), weights_EC), case


def test_few_shot_accuracies():
    cases = json.loads((GOLDEN / "fewshot.json").read_text())
    with np.load(GOLDEN / "fewshot.npz") as file:
        equal = 0
        for case in cases:
            data = [
                torch.tensor(file[f"{case['case']}/{key}"])
                for key in ("train_features", "train_labels", "test_features", "test_labels")
            ]
            results = case["results"]
            shots, penalties = sorted({row["shot"] for row in results}), sorted({row["l2"] for row in results})
            ours = few_shot_accuracy(*data, shots, penalties, case["num_classes"])
            for row in results:
                difference = abs(ours[row["shot"], row["l2"]] - row["accuracy"])
                equal += difference < 1e-6
                # Where float32, which the reference uses, cannot resolve the equations, some predictions change with
                # the linear algebra library that JAX uses; we compute in float64.
                assert difference < (1e-6 if well_posed(data[0], data[1], row) else 3.5 / len(data[3])), row
        assert equal >= 58


def well_posed(features_ND, labels_N, row) -> bool:
    rows = torch.cat([(labels_N == label).nonzero().flatten()[: row["shot"]] for label in labels_N.unique()])
    x_ND = features_ND[rows].double()
    x_ND = torch.nn.functional.pad((x_ND - x_ND.mean(0)) / (x_ND.std(0, correction=0) + 1e-5), (0, 1), value=100.0)
    eigenvalues = torch.linalg.svdvals(x_ND).square()
    return (eigenvalues.max() / (eigenvalues.min() + row["l2"])).item() * torch.finfo(torch.float32).eps < 0.01
