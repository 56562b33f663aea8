"""What the plan says of sharded weights, beside weights that `parallelize` has really sharded."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.planning.test_planner import VISION, planner
from vmoe.distributed.mesh import MeshSize, make_meshes
from vmoe.distributed.parallelize import parallelize
from vmoe.models.factory import create_model

CPU = torch.device("cpu")


@pytest.fixture
def eight_processes():
    """This one, the first, and seven that are not there."""
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield
    dist.destroy_process_group()


# 12 experts are no multiple of 8, and 10 classes neither.
@pytest.mark.parametrize(
    ("mesh", "num_experts"),
    [
        (MeshSize(1, 8, 1), 12),
        (MeshSize(2, 4, 1), 6),
        (MeshSize(1, 4, 2), 4),
        (MeshSize(1, 1, 8), 8),
    ],
    ids=str,
)
def test_weights_of_a_process(eight_processes, mesh, num_experts):
    plan = planner(*VISION, "--model.kwargs.num_experts", str(num_experts))
    model = create_model("vmoe_tiny_patch8_48", num_classes=10, depth=2, num_experts=num_experts)
    parallelize(model, make_meshes(mesh, CPU), CPU)
    local = {name: p.to_local() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    one = plan.candidate(mesh, False)
    stored = sum(tensor.untyped_storage().nbytes() for tensor in local.values())
    assert one.memory["weights"] == 4 * sum(tensor.numel() for tensor in local.values())
    assert one.memory["weights"] == pytest.approx(stored, rel=1e-3)
    assert one.memory["optimizer"] == pytest.approx(2 * stored, rel=1e-2)
    # Gathered: every process gives as much as it stores, whatever of it is filling.
    shards = 1 if mesh.dp_shard == 1 else (mesh.dp_shard - 1)
    if mesh.dp_shard > 1:
        assert one.traffic["all-gather"] == pytest.approx(2 * stored * shards, rel=1e-3)
        assert one.traffic["reduce-scatter"] == pytest.approx(stored * shards, rel=1e-3)


def test_positions_lie_whole_everywhere():
    plan = planner(*VISION)
    positions, rest = 4 * plan.model.pos_embed.numel(), plan.units[-1]
    assert rest.bytes(MeshSize(1, 8, 1)) > positions + (rest.bytes(MeshSize(1)) - positions) / 8


@pytest.mark.parametrize("mesh", [MeshSize(1, 8, 1), MeshSize(2, 4, 1), MeshSize(1, 4, 2)], ids=str)
def test_every_part_of_an_accumulated_step_gathers_and_reduces(mesh):
    once, thrice = (planner(*VISION, "--train.accumulate_steps", str(n)).candidate(mesh, False) for n in (1, 3))
    for kind in ("all-gather", "reduce-scatter", "all-reduce"):
        assert thrice.traffic[kind] == 3 * once.traffic[kind]
    whole = 4 * sum(p.numel() for p in planner(*VISION).model.parameters())
    assert thrice.memory["weights"] <= thrice.memory["gradients"] < whole  # sharded, but for a unit at work


@pytest.mark.parametrize("mesh", [MeshSize(8), MeshSize(1, 8, 1), MeshSize(1, 2, 4)], ids=str)
def test_autocast_copies_weights_that_are_gathered_in_float32(mesh):
    # With this batch most is needed at the end of the forward pass, when all copies are there.
    batch = ("--data.loader.batch_size", "8192")
    full, half = (planner(*VISION, *batch, "--train.precision", precision) for precision in ("float32", "bf16"))
    experts = sum(p.numel() for unit in half.units if unit.experts for p in unit.parameters if p.ndim == 3)
    one, other = half.candidate(mesh, False), full.candidate(mesh, False)
    assert one.memory["copies"] >= 2 * experts / mesh.ep
    assert other.memory["copies"] == 0
    assert 0.5 < one.memory["activations"] / other.memory["activations"] < 0.85
    assert one.traffic.get("all-gather") == other.traffic.get("all-gather")
