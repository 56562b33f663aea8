"""Which process this is, of how many."""

import torch.distributed as dist


def world() -> tuple[int, int]:
    """(rank of this process, number of processes); (0, 1) where torch.distributed does not run."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
