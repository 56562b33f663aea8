"""How the processes of a job are arranged: a mesh of replicas, shards of weights, and experts."""

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from vmoe.utils.config import ConfigError

NAMES = ("dp_replicate", "dp_shard", "ep")


@dataclass(frozen=True)
class MeshSize:
    """Sizes of the mesh's dimensions; their product is the number of processes, each with its own part of a batch.

    Weights are replicated over `dp_replicate` and sharded over `dp_shard`. Over `ep` experts are sharded too, and all
    else is replicated.
    """

    dp_replicate: int
    dp_shard: int = 1
    ep: int = 1

    @property
    def world(self) -> int:
        return self.dp_replicate * self.dp_shard * self.ep

    @property
    def is_plain(self) -> bool:
        """Every process holds all weights."""
        return self.dp_shard == self.ep == 1

    def __str__(self) -> str:
        return " x ".join(f"{name} {getattr(self, name)}" for name in NAMES)


def mesh_size(dp_replicate: int, dp_shard: int, ep: int, world: int) -> MeshSize:
    """The sizes for `world` processes, or a ConfigError; -1 for `dp_replicate` is what the other two leave."""
    for name, size in zip(NAMES, (dp_replicate, dp_shard, ep)):
        if size < 1 and not (name == "dp_replicate" and size == -1):
            left = ", or -1 for what is left" if name == "dp_replicate" else ""
            raise ConfigError(f"parallel.{name} must be >= 1{left}, got {size}")
    replicas = world // (dp_shard * ep) if dp_replicate == -1 else dp_replicate
    size = MeshSize(max(replicas, 1), dp_shard, ep)
    if size.world != world:
        raise ConfigError(
            f"parallel: {size} make {size.world} processes, but {world} {'run' if world > 1 else 'runs'}; start "
            f"torchrun with another --nproc_per_node, or change the sizes so that they multiply to {world}"
        )
    return size


@dataclass(frozen=True)
class Meshes:
    """The device meshes of a job, of all its processes."""

    size: MeshSize
    world: DeviceMesh  # (dp_replicate, dp_shard, ep); without the last: processes that hold the same experts
    dense: DeviceMesh  # (replicas, shards) of all but the experts; replicas are dp_replicate x ep, left out if 1

    @property
    def copies_of_experts(self) -> DeviceMesh:
        """(dp_replicate, dp_shard) of the experts in one process of `ep`; the first is left out if 1."""
        # Planning an operation on a DTensor takes time exponential in the number of the mesh's dimensions.
        return self.world["dp_shard"] if self.size.dp_replicate == 1 else self.world["dp_replicate", "dp_shard"]


def make_meshes(size: MeshSize, device: torch.device) -> Meshes:
    """The meshes of the default group. Neighbours in rank are neighbours in `ep`, which communicates most."""
    whole = init_device_mesh(device.type, (size.dp_replicate, size.dp_shard, size.ep), mesh_dim_names=NAMES)
    ranks = whole.mesh.permute(0, 2, 1).reshape(size.dp_replicate * size.ep, size.dp_shard)
    dense = DeviceMesh(device.type, ranks, mesh_dim_names=("replicas", "shards"))
    return Meshes(size, whole, dense["shards"] if len(ranks) == 1 else dense)
