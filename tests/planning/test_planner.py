import dataclasses
from functools import cache

import pytest

from vmoe.cli.plan import PlanConfig
from vmoe.distributed.mesh import MeshSize
from vmoe.planning.hardware import HARDWARE
from vmoe.planning.planner import Planner, rank
from vmoe.utils.config import ConfigError, read_config

ALONE = MeshSize(1)
VISION = ("--task", "classification", "--model.name", "vmoe_tiny_patch8_48", "--model.kwargs.num_classes", "10")
PAIRS = ("--task", "contrastive", "--model.name", "limoe_tiny_patch12_48")


@cache  # simulated steps are kept
def planner(*options, nodes=1, per_node=8, hardware=HARDWARE["h100"]) -> Planner:
    options = ("--output_dir", "unused", "--data.loader.batch_size", "64", "--model.kwargs.depth", "2", *options)
    config = read_config(PlanConfig, options)
    return Planner(config, hardware, nodes, per_node)


def candidates(plan: Planner) -> dict:
    meshes, _ = plan.meshes()
    return {(m.dp_replicate, m.dp_shard, m.ep): plan.candidate(m, False) for m in meshes}


def test_meshes_are_all_ways_to_multiply():
    possible, impossible = planner(*VISION, per_node=16).meshes()
    assert all(mesh.world == 16 for mesh in possible)
    assert len({(mesh.dp_replicate, mesh.dp_shard, mesh.ep) for mesh in possible}) == len(possible) == 14
    assert list(impossible.values()) == ["ep is no divisor of the 8 experts"]  # ep 16
    possible, impossible = planner(*VISION, "--model.kwargs.num_experts", "0", per_node=2).meshes()
    assert [mesh.ep for mesh in possible] == [1, 1]
    assert list(impossible.values()) == ["ep > 1 needs experts, and the model has none"]


def test_a_model_without_blocks_is_planned():
    model = ("--task", "classification", "--model.name", "resnet18", "--model.kwargs", "{num_classes: 10}")
    config = read_config(PlanConfig, ["--output_dir", "unused", "--data.loader.batch_size", "8", *model])
    plan = Planner(config, HARDWARE["h100"], 1, 2)
    assert candidates(plan)[1, 2, 1].memory["gathered"] > 0


def test_weights_lie_where_the_mesh_says():
    plan = planner(*VISION)
    found = candidates(plan)
    experts = sum(unit.bytes(ALONE) for unit in plan.units if unit.experts)
    dense = sum(unit.bytes(ALONE) for unit in plan.units) - experts
    for (_, dp_shard, ep), one in found.items():
        # What does not divide, such as the positions, adds some; tests/planning/test_sharding.py has the exact numbers.
        assert one.memory["weights"] == pytest.approx(dense / dp_shard + experts / dp_shard / ep, rel=0.1)
        assert one.memory["optimizer"] == pytest.approx(2 * one.memory["weights"], rel=0.01)
        assert one.total == sum(one.memory.values())
    assert found[8, 1, 1].memory["gathered"] == 0 < found[1, 8, 1].memory["gathered"]


def test_what_travels():
    plan = planner(*VISION)
    found = candidates(plan)
    size = 4 * sum(p.numel() for p in plan.model.parameters())
    assert found[8, 1, 1].traffic == {"all-reduce": pytest.approx(2 * size * 7 / 8)}
    sharded = found[1, 8, 1].traffic
    assert sharded["all-gather"] == pytest.approx(2 * size * 7 / 8, rel=0.05)  # forward and backward; some is filling
    assert sharded["reduce-scatter"] == pytest.approx(size * 7 / 8, rel=0.05)
    assert sharded["all-reduce"] == 0
    assert found[1, 1, 8].traffic["all-to-all"] > found[4, 1, 2].traffic["all-to-all"] > 0
    assert all(one.step_seconds == sum(one.seconds.values()) > 0 for one in found.values())


def test_accumulation_repeats_the_passes_and_keeps_gradients():
    once, twice = (planner(*VISION, "--train.accumulate_steps", str(n), per_node=1) for n in (1, 2))
    (one,), (two,) = (list(candidates(plan).values()) for plan in (once, twice))
    assert two.seconds["matmul"] == 2 * one.seconds["matmul"]
    assert two.memory["gradients"] == 4 * sum(p.numel() for p in twice.model.parameters()) >= one.memory["gradients"]
    assert two.seconds["optimizer"] == one.seconds["optimizer"]
    # One process sends nothing.
    assert one.traffic == {"all-reduce": 0}
    assert one.seconds["weights"] == one.seconds["all-to-all"] == 0


def test_averaged_weights_are_counted_and_frozen_ones_have_neither_gradients_nor_state():
    options = ("--train.ema_decay", "0.99", "--train.freeze", "[blocks.*]")
    (plain,), (one,) = (list(candidates(planner(*VISION, *more, per_node=1)).values()) for more in ((), options))
    assert plain.memory["EMA"] == 0
    assert one.memory["EMA"] == one.memory["weights"]
    assert one.memory["optimizer"] < 0.5 * one.memory["weights"]


def test_the_contrastive_loss_grows_with_all_processes():
    one, many = (candidates(planner(*PAIRS, "--data.loader.batch_size", str(512 * n), per_node=n)) for n in (1, 64))
    assert many[64, 1, 1].memory["activations"] > 16 * 512 * 512 * 4 + one[1, 1, 1].memory["activations"]


def test_those_that_fit_come_first_and_fastest_first():
    found = list(candidates(planner(*VISION)).values())
    limit = sorted(one.total for one in found)[3]
    ranked = rank([dataclasses.replace(one, usable=limit) for one in found])
    fits = [one.fits for one in ranked]
    assert fits == sorted(fits, reverse=True)
    assert sum(fits) == 4
    speeds = [one.step_seconds for one in ranked[:4]]
    assert speeds == sorted(speeds)
    sizes = [one.total for one in ranked[4:]]
    assert sizes == sorted(sizes)


def test_a_batch_must_divide_among_the_processes():
    with pytest.raises(ConfigError, match=r"batch_size is 64.*and 24 processes cannot share it evenly; set it to 72"):
        planner(*VISION, nodes=3)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("--train.precision", "fp16", "train.precision fp16 needs dp_shard = ep = 1"),
        ("--model.pretrained_optimizer", "true", "model.pretrained_optimizer needs dp_shard = ep = 1"),
        ("--optim.name", "muon", "optim.name 'muon' does not work on sharded weights"),
    ],
)
def test_what_training_refuses_on_sharded_weights_is_not_planned(key, value, reason):
    possible, impossible = planner(*VISION, key, value).meshes()
    assert [mesh.dp_replicate for mesh in possible] == [8]
    assert set(impossible.values()) == {reason}
