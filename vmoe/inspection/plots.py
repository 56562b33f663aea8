"""Figures of routing (matplotlib): loads, modalities, classes, words, typical patches, and maps of single images.

Experts have the colours of `PALETTE`, and their numbers beside them, in all figures.
"""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from timm.utils import unwrap_model
from torch import Tensor, nn

from vmoe.evaluation.loaded_model import LoadedModel
from vmoe.evaluation.zero_shot import Template
from vmoe.inspection.accumulate import most_telling
from vmoe.inspection.results import LayerStatistics, RoutingStatistics, SampleRouting
from vmoe.inspection.routing_statistics import route_images
from vmoe.models.factory import preprocess_config
from vmoe.utils.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours (https://jfly.uni-koeln.de/color/), told apart with any colour vision; black, which would hide
# the image, is replaced by a wine red. More experts take the second row, and numbers on the patches tell them apart.
PALETTE = (
    *("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#882255"),
    *("#332288", "#DDCC77", "#117733", "#AA4499", "#88CCEE", "#CC6677", "#999933", "#44AA99"),
)
NUM_SAFE_COLOURS = 8
DROPPED, RIGHT, WRONG, INK, PALE, EMPTY = "#8A929C", "#228833", "#AAB2BD", "#20262E", "#5B6570", "#EEF0F3"
MODALITY_COLOURS = {"image": "#0072B2", "text": "#D55E00"}  # Okabe and Ito's
HEAT = "Blues"  # from white to dark, for any colour vision and in print
DPI = 150
TOP = 5  # likeliest names in a figure of examples
NAMES_SHOWN = 30
LAYERS_ON_MAPS = 5
IMAGES_ON_MAPS = 8
FILES = ("load.png", "split.png", "agreement.png", "routing.png", "classes_*.png", "words_*.png", "patches_*.png")

logger = logging.getLogger("vmoe.inspection")


# ---- what all figures share ----


@contextmanager
def style(constrained: bool = True) -> Iterator[None]:
    """No file of the user's own changes the look, and nothing here changes theirs."""
    from matplotlib import rc_context, rcParamsDefault

    look = {
        "font.family": "DejaVu Sans",
        "font.size": 8,
        "text.parse_math": False,  # a "$" in a class name or caption is one
        "axes.titlesize": 9,
        "axes.edgecolor": "#AAB2BD",
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "hatch.linewidth": 0.6,
        "hatch.color": "#FFFFFF",
        "figure.constrained_layout.use": constrained,
    }
    kept = {key: value for key, value in rcParamsDefault.items() if not key.startswith(("backend", "datapath"))}
    with rc_context({**kept, **look}):
        yield


def new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, facecolor="white")


def panels(count: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with `count` axes in rows of up to `columns`, each `height` inches high."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = new_figure(max(5.5, 3.6 * columns), height * rows + 0.8)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[count:]:
        ax.set_visible(False)
    return figure, axes[:count]


def heading(figure: Figure, title: str, note: str) -> None:
    """A bold title and a pale line below it, at the left; constrained layout leaves space for them."""
    lines = note.count("\n") + 1
    figure.suptitle(f"{title}\n" + "\n" * lines, x=0.01, ha="left", fontsize=11, weight="bold", color=INK)
    height = figure.get_figheight()
    figure.text(0.01, 1 - 0.34 / height, note, fontsize=8, color=PALE, va="top", linespacing=1.3)


def percent(value: float, _index: int | None = None) -> str:
    return f"{value:.0%}"


def expert_axis(ax: Axes, num_experts: int, shares: bool = False) -> None:
    """Experts along x and, with `shares`, percents along y."""
    ax.set_xticks(range(0, num_experts, math.ceil(num_experts / 16)))
    ax.set_xlim(-0.6, num_experts - 0.4)
    ax.set_xlabel("expert", fontsize=7.5, color=PALE)
    if shares:
        ax.yaxis.set_major_formatter(percent)
        ax.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, file: Path) -> Path:
    """Writes the figure atomically."""
    with atomic_file(file) as temporary, one_line_for_missing_glyphs():
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


def layer_titles(names: Sequence[str]) -> list[str]:
    """The titles of a model's layers; their names where two have one title (blocks of two towers)."""
    titles = [layer_title(name) for name in names]
    return titles if len(set(titles)) == len(titles) else list(names)


def ink_on(colour: str) -> str:
    """Black or white, whichever has more contrast on the colour, by WCAG's formula."""
    from matplotlib.colors import to_rgb

    linear = (((np.array(to_rgb(colour)) + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722)
    return "#000000" if linear > 0.179 else "#ffffff"


def shorten(name: str, length: int) -> str:
    """The name in at most `length` characters; the middle goes, for what tells names apart often stands last."""
    if len(name) <= length:
        return name
    half = (length - 1) // 2
    return f"{name[:half].rstrip()}…{name[-(length - 1 - half) :].lstrip()}"


def spread(items: Sequence, count: int) -> list:
    """At most `count` of the items, evenly spread."""
    indices = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[index] for index in indices]


def _bare(ax: Axes) -> None:
    for spine in ax.spines.values():
        spine.set_visible(False)


# ---- statistics ----


def write_figures(statistics: RoutingStatistics, folder: str | Path) -> list[Path]:
    """Draws all figures that the statistics hold something for.

    Args:
        statistics: what `gather_statistics` gave.
        folder: where the PNG files go; it is made. Figures of an earlier call that this one does not draw are deleted.

    Returns:
        The files: load.png, split.png (two modalities), agreement.png (two layers or more), routing.png (images were
        kept), and for each layer NAME classes_NAME.png, words_NAME.png and patches_NAME.png.
    """
    sees_images = maps_to_draw(statistics.samples, {layer.name: layer.num_experts for layer in statistics.layers})
    wanted = [
        ("load", True, load_figure, statistics),
        ("split", len(statistics.modalities) > 1, split_figure, statistics),
        ("agreement", len(statistics.layers) > 1, agreement_figure, statistics),
        ("routing", sees_images, routing_figure, statistics),
    ]
    for layer in statistics.layers:
        name = re.sub(r"[^\w.-]", "_", layer.name)
        classes = partial(class_figure, class_names=statistics.class_names)
        wanted += [
            (f"classes_{name}", layer.expert_class is not None, classes, layer),
            (f"words_{name}", layer.expert_word, word_figure, layer),
            (f"patches_{name}", any(layer.typical_patches), patch_figure, layer),
        ]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = [save_figure(draw(of), folder / f"{name}.png") for name, exists, draw, of in wanted if exists]
    for pattern in FILES:  # of an earlier inspection of something else
        for file in set(folder.glob(pattern)) - set(written):
            file.unlink()
    return written


def load_figure(statistics: RoutingStatistics) -> Figure:
    """For each layer and modality a bar per expert: its share of the assignments, and of what was dropped."""
    rows = [(layer, modality) for layer in statistics.layers for modality in layer.tokens]
    with style():
        columns = len(statistics.modalities) if len(statistics.modalities) > 1 else 3
        figure, axes = panels(len(rows), columns, height=2.0)
        for ax, (layer, modality) in zip(axes, rows, strict=True):
            asked_E, kept_E = layer.asked[modality], layer.kept[modality]
            total, experts = max(1, asked_E.sum()), np.arange(layer.num_experts)
            ax.bar(experts, kept_E / total, color=MODALITY_COLOURS.get(modality, INK), width=0.8)
            lost_E = (asked_E - kept_E) / total
            if lost_E.any():
                ax.bar(experts, lost_E, bottom=kept_E / total, color=DROPPED, hatch="//////", width=0.8)
            ax.axhline(1 / layer.num_experts, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
            ax.set_title(f"{layer_title(layer.name)} · {modality}", loc="left")
            dropped, entropy = layer.share_dropped[modality], layer.entropy[modality]
            ax.set_title(f"dropped {dropped:.1%} · entropy {entropy:.2f}", loc="right", fontsize=7, color=PALE)
            expert_axis(ax, layer.num_experts, shares=True)
        note = "Dashed: even share. Hatched grey: no capacity. Entropy of the gate in nats.\n" + _capacity(statistics)
        heading(figure, "Load: share of a layer's assignments that each expert gets", note)
    return figure


def split_figure(statistics: RoutingStatistics) -> Figure:
    """For each layer and expert: the modalities of the tokens that it works on."""
    layers = [layer for layer in statistics.layers if len(layer.tokens) > 1] or statistics.layers
    with style():
        figure, axes = panels(len(layers), 3, height=2.4)
        for ax, layer in zip(axes, layers, strict=True):
            kept_ME = np.stack([layer.kept.get(name, np.zeros(layer.num_experts)) for name in statistics.modalities])
            total_E = kept_ME.sum(0)
            experts, base_E = np.arange(layer.num_experts), np.zeros(layer.num_experts)
            for name, kept_E in zip(statistics.modalities, kept_ME, strict=True):
                share_E = np.divide(kept_E, total_E, out=np.zeros(len(total_E)), where=total_E > 0)
                colour = MODALITY_COLOURS.get(name, INK)
                ax.bar(experts, share_E, bottom=base_E, color=colour, width=0.86, label=name)
                base_E += share_E
            for e in np.flatnonzero(total_E == 0):
                ax.text(e, 0.5, "none", rotation=90, ha="center", va="center", fontsize=7, color=PALE)
            overall = kept_ME[0].sum() / max(1, total_E.sum())
            ax.axhline(overall, color="white", linewidth=1.6)
            ax.axhline(overall, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
            ax.set_ylim(0, 1)
            ax.set_title(layer_title(layer.name), loc="left")
            expert_axis(ax, layer.num_experts, shares=True)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        note = f"Share of its tokens by modality. Dashed: share of {statistics.modalities[0]} tokens over all experts."
        heading(figure, "What each expert works on", note)
    return figure


def agreement_figure(statistics: RoutingStatistics) -> Figure:
    """The agreement of the routing of each pair of layers."""
    names = [layer_title(layer.name) for layer in statistics.layers]
    modalities = list(statistics.agreement)
    side = max(2.4, 0.42 * len(names) + 1.2)
    with style():
        figure = new_figure(max(6.2, len(modalities) * (side + 0.5) + 1.0), side + 1.1)
        for ax, modality in zip(np.atleast_1d(figure.subplots(1, len(modalities))), modalities, strict=True):
            matrix = statistics.agreement[modality]
            image = ax.imshow(np.ma.masked_invalid(matrix), cmap=HEAT, vmin=0, vmax=1)
            ax.set_facecolor(EMPTY)
            ax.set_title(modality, loc="left")
            ax.set_xticks(range(len(names)), names, rotation=90 if len(names) > 4 else 0)
            ax.set_yticks(range(len(names)), names)
            if len(names) <= 12:
                for (i, j), value in np.ndenumerate(matrix):
                    text = "–" if np.isnan(value) else f"{value:.2f}"
                    colour = INK if np.isnan(value) or value < 0.6 else "white"
                    ax.text(j, i, text, ha="center", va="center", fontsize=8, color=colour)
            _bare(ax)
        figure.colorbar(image, ax=figure.axes, shrink=0.8, label="normalised mutual information")
        note = "Of the tokens' first choices. 1: the same groups of tokens, 0: independent."
        left_out = dict.fromkeys(name for names in statistics.agreement_left_out.values() for name in names)
        if left_out:
            note += f"\nNot compared, for they see other tokens: {', '.join(map(layer_title, left_out))}."
        heading(figure, "Agreement of routing between layers", note)
    return figure


def class_figure(layer: LayerStatistics, class_names: list[str]) -> Figure:
    """Heat map of a layer's experts and the classes of the images; of many classes the most telling ones."""
    return _table_figure(layer, layer.expert_class, class_names, "classes", "patches")


def word_figure(layer: LayerStatistics) -> Figure:
    """Heat map of a layer's experts and word pieces, the most telling ones."""
    return _table_figure(layer, layer.word_table, list(layer.expert_word), "word pieces", "tokens")


def _table_figure(layer: LayerStatistics, table_EC: np.ndarray, names: list[str], kind: str, tokens: str) -> Figure:
    shown = most_telling(table_EC, NAMES_SHOWN)
    shares_EC = table_EC / np.maximum(table_EC.sum(0), 1e-12)
    even_E = table_EC.sum(1) / max(1, table_EC.sum())
    label_width = 0.072 * max((len(shorten(names[c], 40)) for c in shown), default=10) + 0.9
    with style():
        width = max(6.0, label_width + 0.32 * layer.num_experts + 1.4)
        figure = new_figure(width, 0.2 * (len(shown) + 2) + 1.9)
        top, ax = figure.subplots(2, 1, sharex=True, height_ratios=(1, max(1, len(shown))))
        limit = max(1e-9, shares_EC[:, shown].max(initial=0), even_E.max())
        look = {"cmap": HEAT, "vmin": 0, "vmax": limit, "aspect": "auto"}
        image = ax.imshow(shares_EC[:, shown].T, **look)
        top.imshow(even_E[None], **look)
        top.set_yticks([0], [f"all {kind}"])
        ax.set_yticks(range(len(shown)), [shorten(names[c], 40) for c in shown])
        expert_axis(ax, layer.num_experts)
        top.tick_params(axis="x", length=0, labelbottom=False)
        for one in (top, ax):
            one.tick_params(axis="y", length=0)
            _bare(one)
        figure.colorbar(image, ax=[top, ax], format=percent, label=f"share of the {tokens}", aspect=30)
        number = f"The {len(shown)} of {len(names)} {kind} that say most about the expert"
        which = number if len(shown) < len(names) else f"All {len(names)} {kind}"
        note = f"Each row: the experts that take its {tokens}; sums to 100%.\n{which}."
        heading(figure, f"Experts and {kind} · {layer_title(layer.name)}", note)
    return figure


def _capacity(statistics: RoutingStatistics) -> str:
    """The experts' capacity in a sentence."""
    layers = [layer for layer in statistics.layers if layer.router == "top_k"]
    if not layers:
        soft = statistics.layers[0].router == "soft"
        return "Soft routing drops nothing." if soft else "Experts choose: dropped are tokens that none took."
    if any(layer.capacity is not None for layer in layers):
        return "The experts' capacity is fixed."
    factors = dict.fromkeys(layer.eval_capacity_factor for layer in layers)
    if list(factors) == [None]:
        return "No capacity limit."
    priority = ", important tokens first" if any(layer.batch_priority for layer in layers) else ""
    return f"Capacity factor {', '.join('none' if f is None else f'{f:g}' for f in factors)}{priority}."


class _Sheet:
    """A figure with contents at inches from its upper left corner."""

    def __init__(self, width: float, height: float, title: str | None, note: str = "") -> None:
        self.figure, self.width, self.height = new_figure(width, height), width, height
        if title:
            self.text(0.2, 0.22, title, fontsize=11, color=INK, weight="bold")
        self.text(0.2, 0.44, note, fontsize=8, color=PALE)

    def text(self, left: float, top: float, text: str, **look: Any) -> None:
        self.figure.text(left / self.width, 1 - top / self.height, text, va="center", **look)

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        box = (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(box)


def patch_figure(layer: LayerStatistics) -> Figure:
    """The typical patches of each expert of a layer, in its colour."""
    from matplotlib.patches import Rectangle

    count = max(len(own) for own in layer.typical_patches)
    across = min(8, max(1, count))
    blocks = min(layer.num_experts, 2 if layer.num_experts <= 8 else 4)
    cell, gap, label, header = 0.42, 0.3, 0.26, 0.75
    block_width, block_height = across * cell + gap, math.ceil(count / across) * cell + label + 0.12
    load_E = layer.kept["image"] / max(1, layer.kept["image"].sum())
    title = f"Typical patches of each expert · {layer_title(layer.name)}"
    note = "The largest gate values, largest first; at most one patch per image."
    with style(constrained=False):
        height = header + math.ceil(layer.num_experts / blocks) * block_height
        sheet = _Sheet(blocks * block_width + gap, height, title, note)
        for e, own in enumerate(layer.typical_patches):
            row, column = divmod(e, blocks)
            left, top = gap + column * block_width, header + row * block_height
            corner = (left / sheet.width, 1 - (top + 0.19) / sheet.height)
            look = {"color": PALETTE[e % len(PALETTE)], "transform": sheet.figure.transFigure}
            sheet.figure.add_artist(Rectangle(corner, 0.14 / sheet.width, 0.14 / sheet.height, **look))
            text = f"expert {e} · {load_E[e]:.1%} of the patches"
            sheet.text(left + 0.2, top + 0.12, text, fontsize=8, color=INK)
            for i, patch in enumerate(own):
                y, x = divmod(i, across)
                draw_image(sheet.axes(left + x * cell, top + label + y * cell, cell - 0.04, cell - 0.04), patch.pixels)
            if not own:
                sheet.text(left, top + label + 0.15, "no patch", fontsize=7.5, color=PALE)
    return sheet.figure


# ---- maps of single images ----


def routing_figure(statistics: RoutingStatistics) -> Figure:
    """Some of the kept images with the expert of every patch, in some layers spread over the depth."""
    layers = {layer.name: layer.num_experts for layer in statistics.layers}
    samples = spread(statistics.samples, IMAGES_ON_MAPS)
    return draw_maps(samples, maps_to_draw(samples, layers), statistics.class_names)


def maps_to_draw(samples: Sequence[SampleRouting], layers: dict[str, int]) -> list[tuple[str, int, int]]:
    """Up to `LAYERS_ON_MAPS` of the layers that see patches, spread over the depth; what `draw_maps` takes.

    Args:
        samples: the images.
        layers: {name: number of experts}, in the order of `sample.patches`.
    """
    seen = [
        (name, num_experts, index)
        for index, (name, num_experts) in enumerate(layers.items())
        if samples and samples[0].patches[index] is not None
    ]
    return spread(seen, LAYERS_ON_MAPS)


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
    maps = [[sample.patches[index].best_kept for _, _, index in layers] for sample in samples]
    experts = sorted({int(e) for row in maps for expert in row for e in np.unique(expert)})
    columns = 2 if len(samples) > (1 if names else 2) and len(layers) <= 4 else 1
    cell, gap, caption, header, bars = 1.25, 0.1, 0.3, 0.75, 2.7 if names else 0.0
    card = (1 + len(layers)) * (cell + gap) + bars + 0.25
    rows = math.ceil(len(samples) / columns)
    width = max(5.0, columns * card + 0.2)
    swatches = min(12, int(width / 1.0))  # in a row of the legend
    height = header + rows * (cell + caption) + 0.3 + 0.2 * math.ceil(max(1, len(experts)) / swatches)
    with style(constrained=False):
        note = "Each patch in the colour of its best expert that had capacity." if layers else ""
        sheet = _Sheet(width, height, title, note)
        for index, sample in enumerate(samples):
            column, row = divmod(index, rows)
            left, top = 0.2 + column * card, header + row * (cell + caption)
            image = sample.image / 255.0
            draw_image(sheet.axes(left, top, cell, cell), image)
            text = _image_name(sample, class_names, int(card / 0.065))
            sheet.text(left, top + cell + 0.12, text, fontsize=7, color=INK)
            if names:
                _draw_names(sheet.axes(left + cell + gap, top, bars - 0.25, cell), sample)
            for i, (name, num_experts, _) in enumerate(layers):
                x = left + bars + (i + 1) * (cell + gap)
                draw_routing(sheet.axes(x, top, cell, cell), image, maps[index][i], num_experts)
                if row == 0:
                    look = {"fontsize": 8, "color": PALE, "ha": "center"}
                    sheet.text(x + cell / 2, header - 0.1, layer_title(name), **look)
        if layers:
            _draw_legend(sheet, experts, swatches)
    return sheet.figure


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
        model: a classifier, or a contrastive model; without sparse layers the routing columns are left out.
        samples: with `.image` (PIL) and `.label` (index into `class_names`, or None if unknown); 6 to 8 look best.
        class_names: what the images may be called.
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
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    return save_figure(figure, Path(file))


def _image_name(sample: SampleRouting, class_names: Sequence[str] | None, length: int) -> str:
    """The line below an image, in `length` characters: what it is, and what the model takes it for."""
    known = sample.caption
    if known is None and sample.label is not None and class_names is not None:
        known = class_names[sample.label]
    guess = sample.top_classes[0] if sample.top_classes else None
    if sample.top_labels and sample.label is not None:
        right = sample.top_labels[0] == sample.label
    else:
        right = guess is not None and guess[0] == known
    if guess is None or right:
        return shorten(known or Path(sample.path).name, length)
    if known is None:
        return f"model: {shorten(guess[0], length - 12)} {guess[1]:.0%}"
    takes = shorten(guess[0], (length - 16) // 2)
    return f"{shorten(known, length - 16 - len(takes))} (model: {takes} {guess[1]:.0%})"


def draw_image(ax: Axes, image: np.ndarray) -> None:
    ax.imshow(image, interpolation="lanczos")
    _frame(ax)


def _frame(ax: Axes) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set(color="#D5DAE0", linewidth=0.8)


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
        colour, weight = (RIGHT, "bold") if right else (INK, "normal")
        ax.text(0, y - 0.12, text, fontsize=7, va="center", color=colour, weight=weight)
        ax.text(1, y - 0.12, f"{100 * value:.0f}%", fontsize=6.5, va="center", ha="right", color=PALE)


def draw_routing(
    ax: Axes, image: np.ndarray, expert: np.ndarray, num_experts: int, number_size: float | None = None
) -> None:
    """The image in grey, tinted by each patch's expert; `number_size` (points) writes its number on every patch."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    rows, columns = expert.shape
    height, width = image.shape[:2]
    palette = np.array([to_rgb(PALETTE[e % len(PALETTE)]) for e in range(num_experts)] + [to_rgb(DROPPED)])
    tint = palette[expert]  # -1, dropped, is the last: grey
    tint = np.repeat(np.repeat(tint, math.ceil(height / rows), axis=0), math.ceil(width / columns), axis=1)
    light = image @ np.array([0.299, 0.587, 0.114])
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


def _draw_legend(sheet: _Sheet, experts: list[int], columns: int) -> None:
    """One swatch per expert that occurs, and one for dropped patches (-1) if there are any."""
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=PALETTE[e % len(PALETTE)], label=f"expert {e}") for e in experts if e >= 0]
    if -1 in experts:
        handles.append(Patch(facecolor=DROPPED, hatch="//////", label="dropped"))
    look = {"frameon": False, "fontsize": 8.5, "handlelength": 1.2, "handleheight": 1.2, "columnspacing": 1.4}
    anchor, ncols = (0.5, 0.05 / sheet.height), min(len(handles), columns)
    sheet.figure.legend(handles=handles, loc="lower center", bbox_to_anchor=anchor, ncols=ncols, labelcolor=INK, **look)
