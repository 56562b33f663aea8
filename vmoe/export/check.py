"""An exported file against its model: the same random inputs through both, in batches of several sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vmoe.export.part import Part

BATCHES = (1, 2, 7)
TOLERANCE = 1e-5  # of the output's largest magnitude
MAX_REDRAWS = 3  # of a batch

Run = Callable[..., "list[Tensor]"]


class Difference(NamedTuple):
    """Of one output for one batch: the largest difference, and the same over the model's largest magnitude."""

    batch: int
    output: str
    absolute: float
    relative: float
    redrawn: int  # batches before this one that were not compared, since rounding decides their routing


def differences(part: Part, run: Run) -> list[Difference]:
    """Compares `run`, which takes the inputs and gives the outputs of a file, with the model.

    Rounding differs between programs, and where two gates are equal up to rounding, a token may go to another expert: a
    correct file then differs much. So an input for which the two differ is drawn again, up to three times, if the model
    itself differs as much once its weights are changed in their last digits. `redrawn` counts them.
    """
    generator, rows = torch.Generator().manual_seed(0), []
    for batch in BATCHES:
        for redrawn in range(MAX_REDRAWS + 1):
            inputs = part.example(batch, generator)
            with torch.no_grad():
                expected = part(*inputs)
            if not all(output.isfinite().all() for output in expected):
                raise ValueError("the model itself gives NaN or infinite outputs for random inputs; check its weights")
            found = run(*inputs)
            own = [Difference(batch, *each, redrawn) for each in _compare(part, expected, found)]
            worst = max(row.relative for row in own)
            if worst <= TOLERANCE or worst > 2 * _sensitivity(part, inputs, expected, generator):
                break
        rows += own
    return rows


def _compare(part: Part, expected: tuple[Tensor, ...], found: list[Tensor]) -> list[tuple[str, float, float]]:
    rows = []
    for name, ours, theirs in zip(part.outputs, expected, found, strict=True):
        if ours.shape != theirs.shape or not theirs.isfinite().all():
            rows.append((name, torch.inf, torch.inf))
            continue
        absolute = (ours - theirs).abs().max().item()
        # A new classifier of zeros gives zeros.
        rows.append((name, absolute, absolute / max(ours.abs().max().item(), torch.finfo(torch.float32).tiny)))
    return rows


@torch.no_grad()
def _sensitivity(part: Part, inputs: tuple[Tensor, ...], expected: tuple[Tensor, ...], generator) -> float:
    """The model's largest relative difference from itself, its weights changed by about a millionth, eight times."""
    worst = 0.0
    for _ in range(8):
        changed = {
            name: weight * (1 + 1e-6 * torch.randn(weight.shape, generator=generator))
            for name, weight in part.named_parameters()
        }
        found = torch.func.functional_call(part, changed, inputs)
        worst = max(worst, *(relative for _, _, relative in _compare(part, expected, list(found))))
    return worst
