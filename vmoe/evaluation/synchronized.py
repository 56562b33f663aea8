"""Reading the data of an evaluation in several processes: none fails alone, and none calls a sharded model alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vmoe.distributed.parallelize import is_sharded
from vmoe.distributed.process_group import SharedError
from vmoe.evaluation.gather import gather_lists
from vmoe.utils.world import world


class Lockstep:
    """The batches of a loader, in step with the loaders of the other processes; with one process, just the batches.

    Where the model's weights lie in several processes, all of these get equally many batches. One that has none left
    (or whose samples were all skipped) gets a blank one, {"image": zeros}, without the other keys.

    Args:
        loader: this process's batches; its `num_skipped` is passed on.
        model: that they are for.

    Raises:
        SharedError: while iterating, in all processes: one of them could not read its batch.
    """

    def __init__(self, loader: Iterable[dict[str, Tensor]], model: nn.Module) -> None:
        self.loader = loader
        self.blanks = is_sharded(model)

    @property
    def num_skipped(self) -> int:
        """Of this process's loader."""
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
            except Exception as error:  # told to all, which would wait for this process otherwise
                failure = error
            image = None if batch is None else batch["image"]
            facts: list[tuple[str | None, Any]] = gather_lists(
                [(failure and str(failure), None if image is None else (image.shape, image.dtype))]
            )
            text = next((text for text, _ in facts if text is not None), None)
            if text is not None:
                raise SharedError(text) from failure
            shape, dtype = next((like for _, like in facts if like is not None), (None, None))
            if shape is None:
                return
            if batch is not None:
                yield batch
            elif self.blanks:
                yield {"image": torch.zeros(1, *shape[1:], dtype=dtype)}


def equal_shares(parts: list[Any], model: nn.Module) -> list[tuple[Any, bool]]:
    """[(part, whether it counts)] for this process: every world-th of `parts`.

    Where the model's weights lie in several processes, all get equally many; those that do not count fill up.
    """
    rank, processes = world()
    own = [(part, True) for part in parts[rank::processes]]
    if is_sharded(model) and parts:
        own += [(parts[0], False)] * (-(-len(parts) // processes) - len(own))
    return own
