"""What all converters do: build a model without memory, say what does not fit it, and fill it."""

from collections.abc import Callable, Sequence
from typing import NoReturn

import numpy as np
import torch
from torch import nn

from vmoe.convert.arrays import CheckpointError
from vmoe.convert.layout import Entry
from vmoe.convert.section import ConfigError
from vmoe.utils.meta import meta_device
from vmoe.utils.printable import printable

Rows = list[tuple[Entry, Callable[[np.ndarray], None]]]  # a tensor's entry, and what fills its view
FLOATS = ("float16", "bfloat16", "float32", "float64")
MOST_PROBLEMS = 6  # in an error


def without_memory(build: Callable[[], nn.Module], what: str = "these arguments") -> nn.Module:
    """The model on the meta device, however large it is; a ConfigError if it cannot be built."""
    try:
        with meta_device():
            return build()
    except (RuntimeError, OverflowError, MemoryError, ZeroDivisionError) as error:  # sizes beyond what PyTorch counts
        raise ConfigError(f"the model of {what} cannot be built: {printable(error)[:200]}") from error


def shape_in_checkpoint(entry: Entry, tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape that a tensor has in the checkpoint's layout."""
    return entry.view(np.broadcast_to(np.float32(0), tensor.shape)).shape  # takes no memory


def does_not_fit(source: object, what: str, problems: Sequence[str]) -> NoReturn:
    """Raises the CheckpointError of weights that do not fit `what`."""
    others = f" and {len(problems) - MOST_PROBLEMS} more" if len(problems) > MOST_PROBLEMS else ""
    raise CheckpointError(f"{source} does not fit {what}: {printable('; '.join(problems[:MOST_PROBLEMS]))}{others}")


def filled(model: nn.Module, rows: Rows) -> nn.Module:
    """The model in eval mode, with the weights that `rows` read."""
    tensors = model.state_dict()
    for entry, fill in rows:
        fill(entry.view(tensors[entry.tensor].numpy()))
    return model.eval()
