"""Evaluation in several processes: each reads every n-th batch, and all get the rows of all, in the data's order.

The batches do not depend on the number of processes, and so neither do the results.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from vmoe.distributed.parallelize import is_sharded
from vmoe.distributed.process_group import SharedError, gather_lists
from vmoe.utils.world import world


class Rows:
    """Tensors with a row for each sample, added batch by batch."""

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, dict[str, Tensor]]] = []

    def add(self, index_B: Tensor, **rows_B: Tensor) -> None:
        """Adds the rows of a batch; `index_B` holds their positions in the data set, each once over all processes."""
        self.parts.append((index_B.cpu(), {name: tensor.cpu() for name, tensor in rows_B.items()}))

    def gather(self) -> tuple[Tensor, dict[str, Tensor]]:
        """(index, rows) of all processes, sorted by index, on the CPU of every process; no names if there are none."""
        parts = gather_lists(self.parts)
        if not parts:
            return torch.empty(0, dtype=torch.long), {}
        index_N = torch.cat([index for index, _ in parts])
        order_N = index_N.argsort()
        return index_N[order_N], {name: torch.cat([rows[name] for _, rows in parts])[order_N] for name in parts[0][1]}


class SynchronizedBatches:
    """The batches of a loader, in step with the loaders of the other processes; with one process, just the batches.

    If the model is sharded, all processes get equally many batches. One that has none left gets a blank one,
    {"image": zeros}, without the other keys. If one process cannot read its batch, all raise SharedError.
    """

    def __init__(self, loader: Iterable[dict[str, Tensor]], model: nn.Module) -> None:
        self.loader = loader
        self.blanks = is_sharded(model)

    @property
    def num_skipped(self) -> int:
        return int(getattr(self.loader, "num_skipped", 0))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if world()[1] == 1:
            yield from self.loader
            return
        batches = iter(self.loader)
        while True:
            batch, failure = None, None
            try:
                batch = next(batches, None)
            except Exception as error:  # raised in all processes, which would wait for this one otherwise
                failure = error
            blank = batch and tree_map(lambda part: part[:1].to("meta"), batch["image"])
            facts = gather_lists([(failure and str(failure), blank)])
            for message, _ in facts:
                if message is not None:
                    raise SharedError(message) from failure
            blanks = [blank for _, blank in facts if blank is not None]
            if not blanks:
                return
            if batch is not None:
                yield batch
            elif self.blanks:
                # Zeros, and where patches are marked as real, true: all of them are in the first position.
                blank = tree_map(lambda part: torch.full_like(part, part.dtype == torch.bool, device="cpu"), blanks[0])
                yield {"image": blank}


def equal_shares(parts: list[Any], model: nn.Module) -> list[tuple[Any, bool]]:
    """[(part, whether it counts)] for this process: every n-th of `parts`, padded if the model is sharded."""
    rank, processes = world()
    own = [(part, True) for part in parts[rank::processes]]
    if is_sharded(model) and parts:
        own += [(parts[0], False)] * (-(-len(parts) // processes) - len(own))
    return own
