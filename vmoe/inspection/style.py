"""What all figures of routing share: colours, look, titles of layers, and how they are written (matplotlib)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vmoe.utils.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours (https://jfly.uni-koeln.de/color/) for any colour vision, with a wine red for black, which
# would hide the image. More experts take the second row, and have numbers on the patches.
PALETTE = (
    *("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#882255"),
    *("#332288", "#DDCC77", "#117733", "#AA4499", "#88CCEE", "#CC6677", "#999933", "#44AA99"),
)
NUM_SAFE_COLOURS = 8
DROPPED, INK, PALE = "#8A929C", "#20262E", "#5B6570"
MODALITY_COLOURS = {"image": "#0072B2", "text": "#D55E00"}  # Okabe and Ito's
DPI = 150


def colour_of(expert: int) -> str:
    """The colour of an expert; grey for -1, dropped."""
    return PALETTE[expert % len(PALETTE)] if expert >= 0 else DROPPED


@contextmanager
def look(constrained: bool = True) -> Iterator[None]:
    """No file of the user's own changes the look, and nothing here changes theirs."""
    from matplotlib.style import context

    own = {
        "font.family": "DejaVu Sans",
        "font.size": 8,
        "text.parse_math": False,  # a "$" in a class name or caption is one
        "axes.titlesize": 9,
        "axes.edgecolor": "#AAB2BD",
        **dict.fromkeys(("axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), INK),
        "hatch.linewidth": 0.6,
        "hatch.color": "#FFFFFF",
        "figure.constrained_layout.use": constrained,
    }
    with context(["default", own]):
        yield


def new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, facecolor="white")


def save_figure(figure: Figure, file: Path) -> Path:
    """Writes the figure atomically; a character that the font lacks is a box, without a warning."""
    with atomic_file(file) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(temporary)
    return file


def layer_title(name: str) -> str:
    """ "blocks.1.mlp" -> "block 1"; other names as they are."""
    numbers = [part for part in name.split(".") if part.isdigit()]
    return f"block {numbers[0]}" if len(numbers) == 1 else name


def layer_titles(names: Sequence[str]) -> list[str]:
    """The titles of a model's layers; their names where two have one title (blocks of two towers)."""
    titles = [layer_title(name) for name in names]
    return titles if len(set(titles)) == len(titles) else list(names)


def ink_on(colour: str) -> str:
    """Black or white, whichever has more contrast on the colour, by WCAG's formula."""
    from matplotlib.colors import to_rgb

    linear = (((np.array(to_rgb(colour)) + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722)
    return "#000000" if linear > 0.179 else "#ffffff"
