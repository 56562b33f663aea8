"""Evaluation in several processes: each reads every world-th batch, and all get the rows of all.

The batches are the same whatever the number of processes, so every picture meets the same arithmetic, and the figures,
which are made from the gathered rows in the order of the data, are equal.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from vmoe.distributed.process_group import gather_lists
from vmoe.utils.world import world


def gather_rows(index_N: Tensor, **rows_N: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """All processes' rows, sorted by their place in the data set, on the CPU of every process.

    Args:
        index_N: (N,) long, places of this process's rows in the data set; no place twice.
        rows_N: tensors with N rows.

    Returns:
        (index, rows) of all processes.
    """
    mine = (index_N.cpu(), {name: tensor.cpu() for name, tensor in rows_N.items()})
    parts = [mine]
    if world()[1] > 1:
        parts = [None] * world()[1]
        dist.all_gather_object(parts, mine)
    parts = [part for part in parts if len(part[0])] or parts[:1]  # a process without rows does not know their shapes
    index_N = torch.cat([index for index, _ in parts])
    order_N = index_N.argsort()
    names = parts[0][1]
    return index_N[order_N], {name: torch.cat([rows[name] for _, rows in parts])[order_N] for name in names}


__all__ = ["gather_lists", "gather_rows", "world"]
