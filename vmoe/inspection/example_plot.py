"""A figure of example pictures: what the model calls them, and which expert each patch went to."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from vmoe.evaluation.inference import evaluating
from vmoe.evaluation.zero_shot import Template, zero_shot_classify
from vmoe.inspection.results import TokenRouting
from vmoe.models.flops import unwrapped
from vmoe.moe import LayerRouting, record_routing
from vmoe.utils.atomic import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours (https://jfly.uni-koeln.de/color/), told apart with any colour vision; black, which would hide
# the picture, is replaced by a wine red. More experts take the second row, and numbers on the patches tell them apart.
PALETTE = (
    *("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#882255"),
    *("#332288", "#DDCC77", "#117733", "#AA4499", "#88CCEE", "#CC6677", "#999933", "#44AA99"),
)
NUM_SAFE_COLOURS = 8
DROPPED = "#8A929C"
LEGEND_COLUMNS = 12
RIGHT, WRONG, INK, PALE = "#228833", "#AAB2BD", "#20262E", "#5B6570"
TOP = 5

logger = logging.getLogger("vmoe.inspection")


@dataclass
class PatchRouting:
    """Where the patches of some pictures went in one sparse layer.

    Attributes:
        name: of the layer, such as "blocks.1.mlp".
        num_experts: E.
        expert: (B, H, W) the best-weighted chosen expert that had room; -1: dropped by all of them.
    """

    name: str
    num_experts: int
    expert: np.ndarray


def patch_grid(model: nn.Module, num_tokens: int) -> tuple[int, int, int]:
    """(prefix tokens, rows, columns) of an image tower's token sequence.

    Raises:
        ValueError: the tokens are not a grid of patches after some prefix tokens.
    """
    model = unwrapped(model)
    for tower in (model, getattr(model, "visual", None), getattr(getattr(model, "visual", None), "trunk", None)):
        embed, expected = getattr(tower, "patch_embed", None), getattr(tower, "num_prefix_tokens", 0)
        if embed is None and hasattr(tower, "class_embedding"):  # open_clip's own vision transformer
            embed, expected = tower, 1
        if embed is None:
            continue
        rows, columns = getattr(embed, "grid_size", None) or (0, 0)
        prefix = num_tokens - rows * columns
        if prefix == expected:
            return prefix, rows, columns
    raise ValueError(f"cannot place {num_tokens} tokens on a grid of patches of {type(model).__name__}")


def patch_routing(model: nn.Module, routing: LayerRouting, name: str) -> PatchRouting:
    """The routing of the patches of a recorded layer, laid out as the picture."""
    grouped = (routing.expert_index, routing.combine_weights.detach().float(), routing.kept)
    expert_BT = TokenRouting(*(routing.tokens(tensor).cpu().numpy() for tensor in grouped)).best_kept
    batch, num_tokens = routing.batch_shape
    prefix, rows, columns = patch_grid(model, num_tokens)
    expert_BHW = expert_BT[:, prefix:].reshape(batch, rows, columns)
    return PatchRouting(name, routing.gates.shape[-1], expert_BHW)


def predict(
    model: nn.Module,
    images: Tensor,
    class_names: Sequence[str],
    tokenizer: Callable[[list[str]], Tensor] | None,
    templates: Sequence[Template] | str | None = None,
) -> tuple[Tensor, list[PatchRouting]]:
    """Probabilities (B, C) of the class names and the routing of the patches in every sparse layer.

    Args:
        model: a classifier with C classes, or with a `tokenizer` a contrastive model.
        images: preprocessed, (B, 3, H, W).
        class_names: C names.
        tokenizer: of the contrastive model; None for a classifier.
        templates: of a contrastive model, see `vmoe.evaluation.zero_shot.resolve_templates`.

    Raises:
        ValueError: a classifier with another number of classes than names.
    """
    parameter = next(model.parameters())
    images = images.to(parameter.device, parameter.dtype)
    with evaluating(model, parameter.device):
        with record_routing(model) as record:
            features = model(images) if tokenizer is None else model.encode_image(images)
        if tokenizer is None:
            if features.shape[1] != len(class_names):
                raise ValueError(f"the model has {features.shape[1]} classes, but {len(class_names)} names were given")
            probabilities = features.float().softmax(dim=1).cpu()
        else:
            probabilities = zero_shot_classify(model, tokenizer, images, class_names, templates)
    layers = [patch_routing(model, routing, name) for name, routing in record.layers.items()]
    return probabilities, layers


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
    """Draws pictures with their top-5 names and, for each sparse layer, the expert of every patch.

    Patches are coloured by the first chosen expert that had room for them; patches that none took are grey and
    hatched. The picture shown is what the model sees, after its preprocessing.

    Args:
        model: a classifier, or a contrastive model; without sparse layers the routing columns are left out.
        samples: with `.image` (PIL) and `.label` (index into `class_names`, or None if unknown); 6 to 8 look best.
        class_names: what the pictures may be called.
        tokenizer: of a contrastive model; None for a classifier.
        file: where to write; the ending picks the format (.png, .svg, .pdf).
        templates: of a contrastive model, see `vmoe.evaluation.zero_shot.resolve_templates`.
        max_layers: at most so many sparse layers, spread over the depth.
        title: a line at the top; None: none.

    Returns:
        The file.

    Raises:
        ValueError: no samples, or class names that do not fit the model.
    """
    from vmoe.data import build_transform
    from vmoe.models.factory import preprocess_config

    if not samples:
        raise ValueError("example_figure needs at least one sample")
    preprocess = preprocess_config(unwrapped(model))
    transform = build_transform(preprocess, None)
    images = torch.stack([transform(sample.image) for sample in samples])
    probabilities, layers = predict(model, images, class_names, tokenizer, templates)
    if len(layers) > max_layers:
        layers = [layers[round(i)] for i in np.linspace(0, len(layers) - 1, max_layers)]
    pictures = _displayable(images, preprocess)
    labels = [sample.label for sample in samples]
    return _draw(pictures, labels, probabilities, layers, list(class_names), Path(file), title)


def _displayable(images: Tensor, preprocess: dict) -> np.ndarray:
    """Undoes the normalisation: (B, H, W, 3) in 0..1."""
    mean, std = (torch.tensor(preprocess[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return (images * std + mean).clamp(0, 1).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()


def _draw(
    pictures: np.ndarray,
    labels: list[int | None],
    probabilities: Tensor,
    layers: list[PatchRouting],
    class_names: list[str],
    file: Path,
    title: str | None,
) -> Path:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    num_columns = 2 if len(pictures) > 1 and len(layers) <= 4 else 1
    num_rows = math.ceil(len(pictures) / num_columns)
    cell, names_width, gap, truth = 1.25, 2.7, 0.4, 0.24  # inches; `truth` is the line below a picture
    header = 0.32 + (0.4 if title else 0.0)
    experts = sorted({int(e) for layer in layers for e in np.unique(layer.expert)})
    footer = 0.25 + 0.2 * math.ceil(len(experts) / LEGEND_COLUMNS) if layers else 0.1
    card_width = cell + names_width + len(layers) * (cell + 0.1)
    width = num_columns * card_width + (num_columns - 1) * gap + 0.3
    height = num_rows * (cell + truth) + header + footer
    # no file of the user's own changes the look, and nothing here changes theirs
    look = {"font.family": "DejaVu Sans", "hatch.linewidth": 0.6, "hatch.color": "#FFFFFF", "text.parse_math": False}
    with rc_context(look):
        figure = Figure(figsize=(width, height), dpi=160, facecolor="white")

        def axes(left: float, top: float, w: float, h: float) -> Axes:
            """Axes at inches from the upper left corner."""
            return figure.add_axes((left / width, 1 - (top + h) / height, w / width, h / height))

        if title:
            figure.text(0.15 / width, 1 - 0.2 / height, title, fontsize=12, color=INK, weight="bold", va="center")
        for index, picture in enumerate(pictures):
            column, row = divmod(index, num_rows)
            left = 0.15 + column * (card_width + gap)
            top = header + row * (cell + truth)
            draw_picture(axes(left, top, cell, cell), picture)
            _draw_names(
                axes(left + cell + 0.1, top, names_width - 0.25, cell), probabilities[index], labels[index], class_names
            )
            label = labels[index]
            if label is not None and label not in probabilities[index].topk(min(TOP, len(class_names))).indices:
                figure.text(
                    left / width,
                    1 - (top + cell + 0.1) / height,
                    f"right name: {shorten(class_names[label], 60)}",
                    fontsize=6.5,
                    color=PALE,
                    va="center",
                )
            for place, layer in enumerate(layers):
                x = left + cell + names_width + place * (cell + 0.1)
                draw_routing(axes(x, top, cell, cell), picture, layer.expert[index], layer.num_experts)
                if row == 0:
                    figure.text(
                        (x + cell / 2) / width,
                        1 - (header - 0.1) / height,
                        layer_title(layer.name),
                        fontsize=8.5,
                        color=PALE,
                        ha="center",
                        va="center",
                    )
        if layers:
            draw_legend(figure, experts, height)
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as temporary, one_line_for_missing_glyphs():
            figure.savefig(temporary)
    return file


@contextmanager
def one_line_for_missing_glyphs() -> Iterator[None]:
    """Drawing inside the block tells in one line, once, and not for each character, that the font lacks some."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    others = [warning for warning in caught if "missing from font" not in str(warning.message)]
    for warning in others:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if len(others) < len(caught):
        _tell_missing_glyphs()


@cache  # once
def _tell_missing_glyphs() -> None:
    logger.warning("in the figures, characters that the font DejaVu Sans does not have are drawn as boxes")


def layer_title(name: str) -> str:
    """ "blocks.1.mlp" -> "block 1"; other names as they are."""
    numbers = [part for part in name.split(".") if part.isdigit()]
    return f"block {numbers[0]}" if len(numbers) == 1 else name


def _frame(ax: Axes) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set(color="#D5DAE0", linewidth=0.8)


def draw_picture(ax: Axes, picture: np.ndarray) -> None:
    ax.imshow(picture, interpolation="lanczos")
    _frame(ax)


def _draw_names(ax: Axes, probabilities: Tensor, label: int | None, class_names: list[str]) -> None:
    """The five likeliest names as bars; the right one in green with a tick."""
    values, indices = probabilities.topk(min(TOP, len(class_names)))
    ax.set_xlim(0, 1)
    ax.set_ylim(TOP - 0.5, -0.5)
    ax.axis("off")
    for place, (value, index) in enumerate(zip(values.tolist(), indices.tolist(), strict=True)):
        right = index == label
        ax.barh(place + 0.28, value, height=0.26, left=0, color=RIGHT if right else WRONG)
        ax.barh(place + 0.28, 1 - value, height=0.26, left=value, color="#EEF0F3")
        name = shorten(class_names[index], 32 if right else 38)  # bold is wider
        ax.text(
            0,
            place - 0.12,
            f"{name}  ✓" if right else name,
            fontsize=7,
            va="center",
            color=RIGHT if right else INK,
            weight="bold" if right else "normal",
        )
        ax.text(1, place - 0.12, f"{100 * value:.0f}%", fontsize=6.5, va="center", ha="right", color=PALE)


def shorten(name: str, length: int) -> str:
    """The name in at most `length` characters; the middle goes, for what tells names apart often stands last."""
    if len(name) <= length:
        return name
    half = (length - 1) // 2
    return f"{name[:half].rstrip()}…{name[-(length - 1 - half) :].lstrip()}"


def draw_routing(
    ax: Axes, picture: np.ndarray, expert: np.ndarray, num_experts: int, number_size: float | None = None
) -> None:
    """The picture in grey, tinted by each patch's expert; `number_size` (points) writes its number on every patch."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    rows, columns = expert.shape
    height, width = picture.shape[:2]
    palette = np.array([to_rgb(PALETTE[e % len(PALETTE)]) for e in range(num_experts)] + [to_rgb(DROPPED)])
    tint = palette[expert]  # -1, dropped, is the last: grey
    tint = np.repeat(np.repeat(tint, math.ceil(height / rows), axis=0), math.ceil(width / columns), axis=1)
    light = picture @ np.array([0.299, 0.587, 0.114])
    shade = (0.3 + 0.7 * light)[..., None]
    ax.imshow(tint[:height, :width] * shade, interpolation="nearest", extent=(0, columns, rows, 0))
    for line in range(1, rows):
        ax.axhline(line, color="white", linewidth=0.6, alpha=0.85)
    for line in range(1, columns):
        ax.axvline(line, color="white", linewidth=0.6, alpha=0.85)
    for y, x in zip(*np.nonzero(expert < 0), strict=True):
        ax.add_patch(Rectangle((x, y), 1, 1, fill=False, hatch="//////", linewidth=0))
    size = min(7.0, 45 / max(rows, columns)) if number_size is None else number_size
    wanted = number_size is not None or num_experts > NUM_SAFE_COLOURS
    if wanted and size > 3:  # smaller is not readable
        for (y, x), e in np.ndenumerate(expert):
            if e >= 0:
                number = ax.text(x + 0.5, y + 0.5, str(e), fontsize=size, color="white", ha="center", va="center")
                number.set_path_effects([withStroke(linewidth=max(1.2, size / 6), foreground=INK)])
    _frame(ax)


def draw_legend(figure: Any, experts: list[int], height: float, columns: int = LEGEND_COLUMNS) -> None:
    """One swatch per expert that occurs, and one for dropped patches (-1) if there are any."""
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=PALETTE[e % len(PALETTE)], label=f"expert {e}") for e in experts if e >= 0]
    if -1 in experts:
        handles.append(Patch(facecolor=DROPPED, hatch="//////", label="dropped"))
    figure.legend(
        handles=handles,
        loc="lower center",
        bbox_to_anchor=(0.5, 0.05 / height),
        ncols=min(len(handles), columns),
        frameon=False,
        fontsize=8.5,
        handlelength=1.2,
        handleheight=1.2,
        labelcolor=INK,
        columnspacing=1.4,
    )
