"""Sizes of the mesh, and models that do not fit on it."""

import re

import pytest
import torch

import vmoe
from vmoe.distributed.mesh import MeshSize, make_meshes, mesh_size
from vmoe.distributed.parallelize import is_sharded, parallelize
from vmoe.utils.config import ConfigError

CPU = torch.device("cpu")


def test_what_is_left_is_replicas():
    assert mesh_size(-1, 2, 2, 8) == MeshSize(2, 2, 2)
    assert mesh_size(-1, 1, 1, 1) == MeshSize(1)
    assert mesh_size(4, 1, 2, 8).world == 8


@pytest.mark.parametrize(
    ("sizes", "world", "message"),
    [
        ((-1, 3, 1), 4, "parallel: dp_replicate 1 x dp_shard 3 x ep 1 make 3 processes, but 4 run"),
        ((2, 2, 2), 4, "make 8 processes, but 4 run; start torchrun"),
        ((-1, 1, 2), 1, "make 2 processes, but 1 runs"),
        ((0, 1, 1), 1, "parallel.dp_replicate must be >= 1, or -1"),
        ((-1, 0, 1), 1, "parallel.dp_shard must be >= 1, got 0"),
        ((-1, 1, -2), 1, "parallel.ep must be >= 1, got -2"),
    ],
)
def test_sizes_that_make_no_mesh(sizes, world, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        mesh_size(*sizes, world)


def tiny(**settings):
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    return vmoe.create_model("vmoe_tiny_patch8_48", **{**sizes, "num_experts": 4, **settings})


def test_neighbours_share_a_model(four_processes):
    meshes = make_meshes(MeshSize(1, 2, 2), CPU)
    assert meshes.world.mesh.tolist() == [[[0, 1], [2, 3]]]
    # Dense weights are replicated over `ep` and sharded over `dp_shard`.
    assert meshes.dense.mesh.tolist() == [[0, 2], [1, 3]]
    assert meshes.world["dp_replicate", "dp_shard"].mesh.tolist() == [[0, 2]]


def test_every_weight_is_sharded_as_the_mesh_says(four_processes):
    model = tiny()
    whole = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert parallelize(model, make_meshes(MeshSize(1, 2, 2), CPU), CPU) is model
    assert is_sharded(model)
    for name, parameter in model.named_parameters():
        assert parameter.shape == whole[name]
        parts = 4 if ".experts." in name else 2
        assert parameter.to_local().numel() == pytest.approx(whole[name].numel() / parts, abs=whole[name][1:].numel())
    assert model.blocks[1].mlp.experts.fc1.weight.to_local().shape[0] == 2


@pytest.mark.parametrize(("num_experts", "dim"), [(4, 0), (2, 1), (6, 1)])
def test_experts_are_split_evenly(four_processes, num_experts, dim):
    model = tiny(num_experts=num_experts)
    parallelize(model, make_meshes(MeshSize(1, 4, 1), CPU), CPU)
    weight = model.blocks[1].mlp.experts.fc1.weight
    assert weight.placements[-1].dim == dim
    assert weight.to_local().numel() * 4 == weight.numel()


def test_learned_activations_are_sharded_too(four_processes):
    model = tiny(act_layer="prelu")
    parallelize(model, make_meshes(MeshSize(1, 4, 1), CPU), CPU)
    assert model.blocks[1].mlp.experts.act.weight.shape == (1,)


@pytest.mark.parametrize(
    ("size", "settings", "message"),
    [
        (MeshSize(1, 1, 4), {"num_experts": 6}, r"parallel.ep is 4, and blocks.1.mlp.experts has 6 experts"),
        (MeshSize(2, 1, 2), {"num_experts": 0}, "the model has no experts; set it to 1"),
        (MeshSize(2, 1, 2), {"act_layer": "prelu"}, "all experts of blocks.1.mlp.experts share a learned activation"),
        (MeshSize(1, 2, 2), {"expert_width": 63}, "parallel.dp_shard is 2, and the experts' width 63 is no multiple"),
    ],
)
def test_experts_that_cannot_be_sharded_evenly(four_processes, size, settings, message):
    with pytest.raises(ConfigError, match=message):
        parallelize(tiny(**settings), make_meshes(size, CPU), CPU)
