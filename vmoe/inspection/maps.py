"""Examples: images, their likeliest names, and maps with each patch in the colour of its expert (matplotlib)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from timm.utils import unwrap_model
from torch import Tensor, nn

from vmoe.data import build_transform
from vmoe.evaluation.loaded_model import LoadedModel
from vmoe.evaluation.zero_shot import Template
from vmoe.inspection import style
from vmoe.inspection.forward import sparse_layers
from vmoe.inspection.results import SampleRouting, evenly_spaced
from vmoe.inspection.routing_statistics import route_images
from vmoe.models.factory import preprocess_config

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TOP = 5  # likeliest names of an image
MAX_LAYERS = 4
RIGHT, WRONG, EMPTY = "#228833", "#AAB2BD", "#EEF0F3"  # bars of names
CELL, GAP, CAPTION, HEADER, BARS = 1.25, 0.1, 0.3, 0.55, 2.7  # inches


def example_figure(
    model: nn.Module,
    samples: Sequence[Any],
    class_names: Sequence[str],
    tokenizer: Callable[[list[str]], Tensor] | None,
    file: str | Path,
    *,
    templates: Sequence[Template] | str | None = None,
) -> Path:
    """Draws images with their five likeliest names and, for up to four sparse layers, the expert of every patch.

    Patches that no expert took are grey and hatched. The image is shown as the model sees it. ValueError: no samples,
    or class names that do not fit the model.

    Args:
        model: a classifier, or a contrastive model; a dense one has no maps.
        samples: with `.image` (PIL) and `.label` (index into `class_names`, or None if unknown); 6 to 8 look best.
        class_names: what the images may be called.
        tokenizer, templates: of a contrastive model, see `vmoe.evaluation.zero_shot.resolve_templates`.
        file: where to write, which is returned; the ending picks the format (.png, .svg, .pdf).
    """
    if not samples:
        raise ValueError("example_figure needs at least one sample")
    model = unwrap_model(model)
    transform, device = build_transform(preprocess_config(model), None), next(model.parameters()).device
    loaded = LoadedModel(model, tokenizer, transform, device, "float32", "the model", Path())
    images = [sample.image for sample in samples]
    found = route_images(loaded, images, class_names=class_names, templates=templates)
    for sample, given in zip(found, samples, strict=True):
        sample.label = given.label
    layers = {name: layer.num_experts for name, layer in sparse_layers(loaded, required=False).items()}
    return style.save_figure(draw_maps(found, layers, class_names), Path(file))


def draw_maps(samples: Sequence[SampleRouting], layers: dict[str, int], class_names: Sequence[str]) -> Figure:
    """The figure of `example_figure`, two images to a row.

    `layers` is {name: number of experts}, in the order of `sample.patches`; of those that see patches `MAX_LAYERS` are
    drawn, evenly spaced in depth.
    """
    seen = [(name, i) for i, name in enumerate(layers) if samples[0].patches[i] is not None]
    drawn = [seen[index] for index in evenly_spaced(len(seen), MAX_LAYERS)]
    experts = sorted({int(e) for one in samples for _, i in drawn for e in np.unique(one.patches[i].best_kept)})
    columns = min(2, len(samples))
    rows = math.ceil(len(samples) / columns)
    card = (1 + len(drawn)) * (CELL + GAP) + BARS + 0.25
    width = max(5.0, columns * card + 0.2)
    swatches = min(12, int(width))  # in a row of the legend
    height = HEADER + rows * (CELL + CAPTION) + 0.3 + 0.2 * math.ceil(max(1, len(experts)) / swatches)
    with style.look(constrained=False):
        figure = style.new_figure(width, height)

        def text(left: float, top: float, content: str, **look: Any) -> None:
            figure.text(left / width, 1 - top / height, content, va="center", **look)

        def axes(left: float, top: float, wide: float = CELL) -> Axes:
            return figure.add_axes((left / width, 1 - (top + CELL) / height, wide / width, CELL / height))

        if drawn:
            text(0.2, 0.2, "Each patch in the colour of its best expert that had capacity.", color=style.PALE)
            _draw_legend(figure, experts, swatches)
        for index, sample in enumerate(samples):
            column, row = divmod(index, rows)
            left, top = 0.2 + column * card, HEADER + row * (CELL + CAPTION)
            draw_image(axes(left, top), sample.image)
            if sample.label is not None:
                name = shorten(class_names[sample.label], int(card / 0.065))
                text(left, top + CELL + 0.12, name, fontsize=7, color=style.INK)
            _draw_names(axes(left + CELL + GAP, top, BARS - 0.25), sample)
            for i, (layer, position) in enumerate(drawn):
                x = left + BARS + (i + 1) * (CELL + GAP)
                draw_routing(axes(x, top), sample.image / 255, sample.patches[position].best_kept, layers[layer])
                if row == 0:
                    text(x + CELL / 2, HEADER - 0.1, style.layer_title(layer), color=style.PALE, ha="center")
    return figure


def _draw_names(ax: Axes, sample: SampleRouting) -> None:
    """The likeliest names as bars; the right one in green with a tick."""
    ax.set_xlim(0, 1)
    ax.set_ylim(TOP - 0.5, -0.5)
    ax.axis("off")
    for y, ((name, value), index) in enumerate(zip(sample.top_classes, sample.top_labels, strict=True)):
        right = index == sample.label
        ax.barh(y + 0.28, value, height=0.26, left=0, color=RIGHT if right else WRONG)
        ax.barh(y + 0.28, 1 - value, height=0.26, left=value, color=EMPTY)
        text = f"{shorten(name, 32)}  ✓" if right else shorten(name, 38)  # bold is wider
        colour, weight = (RIGHT, "bold") if right else (style.INK, "normal")
        ax.text(0, y - 0.12, text, fontsize=7, va="center", color=colour, weight=weight)
        ax.text(1, y - 0.12, f"{100 * value:.0f}%", fontsize=6.5, va="center", ha="right", color=style.PALE)


def draw_routing(
    ax: Axes, image: np.ndarray, expert: np.ndarray, num_experts: int, number_size: float | None = None
) -> None:
    """The image in grey, tinted by each patch's expert; `number_size` (points) writes its number on every patch."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    rows, columns = expert.shape
    height, width = image.shape[:2]
    palette = np.array([to_rgb(style.colour_of(e)) for e in [*range(num_experts), -1]])
    tint = palette[expert]  # -1, dropped, is the last: grey
    tint = np.repeat(np.repeat(tint, math.ceil(height / rows), axis=0), math.ceil(width / columns), axis=1)
    light = image @ np.array([0.299, 0.587, 0.114])
    shade = (0.3 + 0.7 * light)[..., None]
    draw_image(ax, tint[:height, :width] * shade, interpolation="nearest", extent=(0, columns, rows, 0))
    line = {"color": "white", "linewidth": 0.6, "alpha": 0.85}
    ax.hlines(range(1, rows), 0, columns, **line)
    ax.vlines(range(1, columns), 0, rows, **line)
    for y, x in zip(*np.nonzero(expert < 0), strict=True):
        ax.add_patch(Rectangle((x, y), 1, 1, fill=False, hatch="//////", linewidth=0))
    size = min(7.0, 45 / max(rows, columns)) if number_size is None else number_size
    wanted = number_size is not None or num_experts > style.NUM_SAFE_COLOURS
    for (y, x), e in np.ndenumerate(expert) if wanted and size > 3 else ():  # smaller is not readable
        if e >= 0:
            number = ax.text(x + 0.5, y + 0.5, str(e), fontsize=size, color="white", ha="center", va="center")
            number.set_path_effects([withStroke(linewidth=max(1.2, size / 6), foreground=style.INK)])


def _draw_legend(figure: Figure, experts: list[int], columns: int) -> None:
    """One swatch per expert that occurs, and one for dropped patches (-1) if there are any."""
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=style.colour_of(e), label=f"expert {e}") for e in experts if e >= 0]
    if -1 in experts:
        handles.append(Patch(facecolor=style.DROPPED, hatch="//////", label="dropped"))
    look = {"frameon": False, "fontsize": 8.5, "handlelength": 1.2, "handleheight": 1.2, "columnspacing": 1.4}
    anchor, ncols = (0.5, 0.05 / figure.get_figheight()), min(len(handles), columns)
    figure.legend(handles=handles, loc="lower center", bbox_to_anchor=anchor, ncols=ncols, labelcolor=style.INK, **look)


def draw_image(ax: Axes, image: np.ndarray, **options: Any) -> None:
    ax.imshow(image, **{"interpolation": "lanczos", **options})
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set(color="#D5DAE0", linewidth=0.8)


def shorten(name: str, length: int) -> str:
    """The name in at most `length` characters; the middle goes, for what tells names apart often stands last."""
    if len(name) <= length:
        return name
    half = (length - 1) // 2
    return f"{name[:half].rstrip()}…{name[-(length - 1 - half) :].lstrip()}"
