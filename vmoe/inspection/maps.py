"""Maps of single images: each patch in the colour of its expert (matplotlib)."""

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
from vmoe.inspection.results import SampleRouting
from vmoe.inspection.routing_statistics import route_images
from vmoe.models.factory import preprocess_config

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TOP = 5  # likeliest names in a figure of examples
MAX_LAYERS = 5
RIGHT, WRONG, EMPTY = "#228833", "#AAB2BD", "#EEF0F3"  # bars of names


def maps_to_draw(samples: Sequence[SampleRouting], layers: dict[str, int]) -> list[tuple[str, int, int]]:
    """Up to `MAX_LAYERS` of the layers that see patches, evenly spaced in depth; what `draw_maps` takes.

    `layers` is {name: number of experts}, in the order of `sample.patches`.
    """
    seen = [
        (name, num_experts, index)
        for index, (name, num_experts) in enumerate(layers.items())
        if samples and samples[0].patches[index] is not None
    ]
    return spread(seen, MAX_LAYERS)


def draw_maps(
    samples: Sequence[SampleRouting],
    layers: Sequence[tuple[str, int, int]],
    class_names: Sequence[str] | None,
    *,
    names: bool = False,
    title: str | None = "Where the patches go",
) -> Figure:
    """Images beside their routing maps: each patch in the colour of its best expert that had capacity.

    Args:
        samples: the images, one to a row (two to a row where there are many).
        layers: (name, number of experts, index in `sample.patches`) of the layers to draw.
        class_names: names of the labels.
        names: draw the likeliest names as bars too.
        title: at the top, or None.
    """
    columns = 2 if len(samples) > (1 if names else 2) and len(layers) <= 4 else 1
    experts = sorted({int(e) for one in samples for *_, i in layers for e in np.unique(one.patches[i].best_kept)})
    cell, gap, caption, header, bars = 1.25, 0.1, 0.3, 0.75, 2.7 if names else 0.0  # inches
    card = (1 + len(layers)) * (cell + gap) + bars + 0.25
    rows = math.ceil(len(samples) / columns)
    width = max(5.0, columns * card + 0.2)
    swatches = min(12, int(width))  # in a row of the legend
    height = header + rows * (cell + caption) + 0.3 + 0.2 * math.ceil(max(1, len(experts)) / swatches)
    with style.look(constrained=False):
        figure = style.new_figure(width, height)

        def text(left: float, top: float, content: str, **look: Any) -> None:
            figure.text(left / width, 1 - top / height, content, va="center", **look)

        def axes(left: float, top: float, wide: float = cell) -> Axes:
            return figure.add_axes((left / width, 1 - (top + cell) / height, wide / width, cell / height))

        text(0.2, 0.22, title or "", fontsize=11, color=style.INK, weight="bold")
        if layers:
            text(0.2, 0.44, "Each patch in the colour of its best expert that had capacity.", color=style.PALE)
            _draw_legend(figure, experts, swatches)
        for index, sample in enumerate(samples):
            column, row = divmod(index, rows)
            left, top = 0.2 + column * card, header + row * (cell + caption)
            draw_image(axes(left, top), sample.image)
            known = _image_name(sample, class_names, int(card / 0.065))
            text(left, top + cell + 0.12, known, fontsize=7, color=style.INK)
            if names:
                _draw_names(axes(left + cell + gap, top, bars - 0.25), sample)
            for i, (name, num_experts, layer) in enumerate(layers):
                x = left + bars + (i + 1) * (cell + gap)
                draw_routing(axes(x, top), sample.image / 255, sample.patches[layer].best_kept, num_experts)
                if row == 0:
                    text(x + cell / 2, header - 0.1, style.layer_title(name), color=style.PALE, ha="center")
    return figure


def example_figure(
    model: nn.Module,
    samples: Sequence[Any],
    class_names: Sequence[str],
    tokenizer: Callable[[list[str]], Tensor] | None,
    file: str | Path,
    *,
    templates: Sequence[Template] | str | None = None,
    max_layers: int = 4,
    title: str | None = None,
) -> Path:
    """Draws images with their five likeliest names and, for each sparse layer, the expert of every patch.

    Patches that no expert took are grey and hatched. The image is shown as the model sees it, after its preprocessing.

    Args:
        model: a classifier, or a contrastive model; a dense one has no maps.
        samples: with `.image` (PIL) and `.label` (index into `class_names`, or None if unknown); 6 to 8 look best.
        class_names: what the images may be called.
        tokenizer, templates: of a contrastive model, see `vmoe.evaluation.zero_shot.resolve_templates`.
        file: where to write, which is returned; the ending picks the format (.png, .svg, .pdf).
        max_layers: at most so many sparse layers, evenly spaced in depth.
        title: a line at the top.

    Raises:
        ValueError: no samples, or class names that do not fit the model.
    """
    if not samples:
        raise ValueError("example_figure needs at least one sample")
    model = unwrap_model(model)
    transform = build_transform(preprocess_config(model), None)
    device = next(model.parameters()).device
    subject = LoadedModel(model, tokenizer, transform, device, "float32", "the model", Path())
    images = [sample.image for sample in samples]
    layers, found = route_images(subject, images, class_names=class_names, templates=templates)
    for sample, given in zip(found, samples, strict=True):
        sample.label = given.label
    maps = maps_to_draw(found, {name: layer.num_experts for name, layer in layers.items()})
    figure = draw_maps(found, spread(maps, max_layers), class_names, names=True, title=title)
    return style.save_figure(figure, Path(file))


def _image_name(sample: SampleRouting, class_names: Sequence[str] | None, length: int) -> str:
    """The line below an image, in `length` characters: what it is, and what the model takes it for."""
    known = sample.caption
    if known is None and sample.label is not None and class_names is not None:
        known = class_names[sample.label]
    guess, share = sample.top_classes[0] if sample.top_classes else (None, 0)
    right = guess is None or guess == known
    if sample.top_labels and sample.label is not None:
        right = sample.top_labels[0] == sample.label
    if right:
        return shorten(known or Path(sample.path).name, length)
    if known is None:
        return f"model: {shorten(guess, length - 12)} {share:.0%}"
    guess = shorten(guess, (length - 16) // 2)
    return f"{shorten(known, length - 16 - len(guess))} (model: {guess} {share:.0%})"


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


def spread(items: Sequence, count: int) -> list:
    """At most `count` of the items, evenly spaced."""
    indices = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[index] for index in indices]
