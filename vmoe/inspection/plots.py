"""Figures of routing statistics (matplotlib): loads, the modalities' split, classes, words, typical patches, maps.

Experts have the colours of `vmoe.inspection.example_plot.PALETTE`, and their numbers beside them, in all of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vmoe.inspection.example_plot import (
    DROPPED,
    INK,
    PALE,
    PALETTE,
    draw_legend,
    draw_picture,
    draw_routing,
    layer_title,
    shorten,
)
from vmoe.inspection.mutual_information import most_telling
from vmoe.inspection.plot_style import (
    HEAT,
    MODALITY_COLOURS,
    expert_axis,
    heading,
    new_figure,
    panels,
    percent,
    percent_axis,
    save_figure,
    style,
    swatch,
)
from vmoe.inspection.results import LayerStatistics, RoutingStatistics, SampleRouting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES_SHOWN = 30
LAYERS_ON_MAPS = 5
PICTURES_ON_MAPS = 8
FILES = ("load.png", "split.png", "agreement.png", "routing.png", "classes_*.png", "words_*.png", "patches_*.png")


def write_figures(statistics: RoutingStatistics, folder: str | Path) -> list[Path]:
    """Draws all figures that the statistics hold something for.

    Args:
        statistics: what `gather_statistics` gave.
        folder: where the PNG files go; it is made. Figures of an earlier call that this one does not draw are deleted.

    Returns:
        The files: load.png, split.png (two modalities), agreement.png (two layers or more), routing.png (pictures were
        kept), and for each layer NAME classes_NAME.png, words_NAME.png and patches_NAME.png.
    """
    figures: dict[str, Figure | None] = {"load": load_figure(statistics)}
    if len(statistics.modalities) > 1:
        figures["split"] = split_figure(statistics)
    if len(statistics.layers) > 1:
        figures["agreement"] = agreement_figure(statistics)
    if maps_to_draw(statistics.samples, {layer.name: layer.num_experts for layer in statistics.layers}):
        figures["routing"] = routing_figure(statistics)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = [save_figure(figure, folder / f"{name}.png") for name, figure in figures.items()]
    for layer in statistics.layers:
        name = re.sub(r"[^\w.-]", "_", layer.name)
        if layer.expert_class is not None:
            written.append(save_figure(class_figure(layer, statistics.class_names), folder / f"classes_{name}.png"))
        if layer.expert_word:
            written.append(save_figure(word_figure(layer), folder / f"words_{name}.png"))
        if any(layer.typical_patches):
            written.append(save_figure(patch_figure(layer), folder / f"patches_{name}.png"))
    for pattern in FILES:  # of an earlier inspection of something else
        for file in set(folder.glob(pattern)) - set(written):
            file.unlink()
    return written


def load_figure(statistics: RoutingStatistics) -> Figure:
    """For each layer and modality a bar per expert: its share of the assignments, and of what was dropped."""
    rows = [(layer, modality) for layer in statistics.layers for modality in layer.tokens]
    with style():
        figure, axes = panels(
            len(rows), len(statistics.modalities) if len(statistics.modalities) > 1 else 3, height=2.0
        )
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
            expert_axis(ax, layer.num_experts)
            percent_axis(ax)
        heading(
            figure,
            "Load: share of a layer's assignments that each expert gets",
            "Dashed: even share. Hatched grey: no room found. Entropy of the gate in nats.\n" + _capacity(statistics),
        )
    return figure


def split_figure(statistics: RoutingStatistics) -> Figure:
    """For each layer and expert: which part of the tokens that it worked on were patches, which words."""
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
            expert_axis(ax, layer.num_experts)
            percent_axis(ax)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        first = statistics.modalities[0]
        heading(
            figure,
            "What each expert works on",
            f"Share of its tokens by modality. Dashed: share of {first} tokens over all experts.",
        )
    return figure


def agreement_figure(statistics: RoutingStatistics) -> Figure:
    """The agreement of the routing of each pair of layers."""
    from matplotlib.ticker import FixedLocator

    names = [layer_title(layer.name) for layer in statistics.layers]
    modalities = list(statistics.agreement)
    side = max(2.4, 0.42 * len(names) + 1.2)
    with style():
        figure = new_figure(max(6.2, len(modalities) * (side + 0.5) + 1.0), side + 1.1)
        for ax, modality in zip(np.atleast_1d(figure.subplots(1, len(modalities))), modalities, strict=True):
            matrix = statistics.agreement[modality]
            image = ax.imshow(np.ma.masked_invalid(matrix), cmap=HEAT, vmin=0, vmax=1)
            ax.set_facecolor("#EEF0F3")
            ax.set_title(modality, loc="left")
            ax.xaxis.set_major_locator(FixedLocator(range(len(names))))
            ax.yaxis.set_major_locator(FixedLocator(range(len(names))))
            ax.set_xticklabels(names, rotation=90 if len(names) > 4 else 0)
            ax.set_yticklabels(names)
            if len(names) <= 12:
                for (i, j), value in np.ndenumerate(matrix):
                    text = "–" if np.isnan(value) else f"{value:.2f}"
                    colour = INK if np.isnan(value) or value < 0.6 else "white"
                    ax.text(j, i, text, ha="center", va="center", fontsize=8, color=colour)
            for spine in ax.spines.values():
                spine.set_visible(False)
        figure.colorbar(image, ax=figure.axes, shrink=0.8, label="normalised mutual information")
        note = "Of the tokens' first choices. 1: the same groups of tokens, 0: independent."
        left_out = dict.fromkeys(name for names in statistics.agreement_left_out.values() for name in names)
        if left_out:
            note += f"\nNot compared, for they see other tokens: {', '.join(map(layer_title, left_out))}."
        heading(figure, "Agreement of routing between layers", note)
    return figure


def class_figure(layer: LayerStatistics, class_names: list[str]) -> Figure:
    """Heat map of a layer's experts and the classes of the pictures; of many classes the most telling ones."""
    return _table_figure(layer, layer.expert_class, class_names, "classes", "patches")


def word_figure(layer: LayerStatistics) -> Figure:
    """Heat map of a layer's experts and word pieces, the most telling ones."""
    words = list(layer.expert_word)
    return _table_figure(
        layer, np.stack([layer.expert_word[word] for word in words], 1), words, "word pieces", "tokens"
    )


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
            for spine in one.spines.values():
                spine.set_visible(False)
        figure.colorbar(image, ax=[top, ax], format=percent, label=f"share of the {tokens}", aspect=30)
        number = f"The {len(shown)} of {len(names)} {kind} that say most about the expert"
        which = number if len(shown) < len(names) else f"All {len(names)} {kind}"
        heading(
            figure,
            f"Experts and {kind} · {layer_title(layer.name)}",
            f"Each row: the experts that take its {tokens}; sums to 100%.\n{which}.",
        )
    return figure


def patch_figure(layer: LayerStatistics) -> Figure:
    """The typical patches of each expert of a layer, in its colour."""
    count = max(len(own) for own in layer.typical_patches)
    across = min(8, max(1, count))
    down = math.ceil(count / across)
    blocks = min(layer.num_experts, 2 if layer.num_experts <= 8 else 4)
    cell, gap, label, header = 0.42, 0.3, 0.26, 0.75
    width = blocks * (across * cell + gap) + gap
    rows = math.ceil(layer.num_experts / blocks)
    height = header + rows * (down * cell + label + 0.12)
    load_E = layer.kept["image"] / max(1, layer.kept["image"].sum())
    with style(constrained=False):
        figure = new_figure(width, height)
        for e, own in enumerate(layer.typical_patches):
            row, column = divmod(e, blocks)
            left, top = gap + column * (across * cell + gap), header + row * (down * cell + label + 0.12)
            colour = PALETTE[e % len(PALETTE)]
            swatch(figure, left / width, 1 - (top + 0.19) / height, 0.14 / width, 0.14 / height, colour)
            text = f"expert {e} · {load_E[e]:.1%} of the patches"
            place = ((left + 0.2) / width, 1 - (top + 0.12) / height)
            figure.text(*place, text, fontsize=8, color=INK, va="center")
            for i, patch in enumerate(own):
                y, x = divmod(i, across)
                box = (left + x * cell, top + label + y * cell)
                side = cell - 0.04
                ax = figure.add_axes((box[0] / width, 1 - (box[1] + side) / height, side / width, side / height))
                draw_picture(ax, patch.pixels)
            if not own:
                place = (left / width, 1 - (top + label + 0.15) / height)
                figure.text(*place, "no patch", fontsize=7.5, color=PALE, va="center")
        title = f"Typical patches of each expert · {layer_title(layer.name)}"
        figure.text(gap / width, 1 - 0.22 / height, title, fontsize=11, color=INK, weight="bold", va="center")
        note = "The largest gate values, largest first; at most one patch per picture."
        figure.text(gap / width, 1 - 0.46 / height, note, fontsize=8, color=PALE, va="center")
    return figure


def routing_figure(statistics: RoutingStatistics) -> Figure:
    """Some of the kept pictures with the expert of every patch, in some layers spread over the depth."""
    layers = {layer.name: layer.num_experts for layer in statistics.layers}
    samples = _spread(statistics.samples, PICTURES_ON_MAPS)
    return draw_maps(samples, maps_to_draw(samples, layers), statistics.class_names)


def maps_to_draw(samples: Sequence[SampleRouting], layers: dict[str, int]) -> list[tuple[str, int, int]]:
    """Up to `LAYERS_ON_MAPS` of the layers that see patches, spread over the depth; what `draw_maps` takes.

    Args:
        samples: the pictures.
        layers: {name: number of experts}, in the order of `sample.patches`.
    """
    seen = [
        (name, num_experts, place)
        for place, (name, num_experts) in enumerate(layers.items())
        if samples and samples[0].patches[place] is not None
    ]
    return _spread(seen, LAYERS_ON_MAPS)


def draw_maps(
    samples: Sequence[SampleRouting], layers: Sequence[tuple[str, int, int]], class_names: list[str] | None
) -> Figure:
    """Pictures beside their routing maps: each patch in the colour of its best expert that had room.

    Args:
        samples: the pictures, one to a row (two to a row where there are many).
        layers: (name, number of experts, place in `sample.patches`) of the layers to draw.
        class_names: names of the labels.
    """
    maps = [[sample.patches[place].best_kept for _, _, place in layers] for sample in samples]
    experts = sorted({int(e) for row in maps for expert in row for e in np.unique(expert)})
    columns = 2 if len(samples) > 2 and len(layers) <= 4 else 1
    cell, gap, caption, header = 1.25, 0.1, 0.3, 0.75
    card = (1 + len(layers)) * (cell + gap) + 0.25
    rows = math.ceil(len(samples) / columns)
    width = max(5.0, columns * card + 0.2)
    swatches = min(12, int(width / 1.0))  # in a row of the legend
    height = header + rows * (cell + caption) + 0.3 + 0.2 * math.ceil(max(1, len(experts)) / swatches)
    with style(constrained=False):
        figure = new_figure(width, height)

        def axes(left: float, top: float) -> Axes:
            return figure.add_axes((left / width, 1 - (top + cell) / height, cell / width, cell / height))

        for index, sample in enumerate(samples):
            column, row = divmod(index, rows)
            left, top = 0.2 + column * card, header + row * (cell + caption)
            picture = sample.image / 255.0
            draw_picture(axes(left, top), picture)
            text = _picture_name(sample, class_names, int(card / 0.065))
            place = (left / width, 1 - (top + cell + 0.12) / height)
            figure.text(*place, text, fontsize=7, color=INK, va="center")
            for i, (name, num_experts, _) in enumerate(layers, start=1):
                x = left + i * (cell + gap)
                draw_routing(axes(x, top), picture, maps[index][i - 1], num_experts)
                if row == 0:
                    place = ((x + cell / 2) / width, 1 - (header - 0.1) / height)
                    figure.text(*place, layer_title(name), fontsize=8, color=PALE, ha="center", va="center")
        title, note = "Where the patches go", "Each patch in the colour of its best expert that had room."
        figure.text(0.2 / width, 1 - 0.22 / height, title, fontsize=11, color=INK, weight="bold", va="center")
        figure.text(0.2 / width, 1 - 0.44 / height, note, fontsize=8, color=PALE, va="center")
        draw_legend(figure, experts, height, swatches)
    return figure


def _picture_name(sample: SampleRouting, class_names: list[str] | None, length: int) -> str:
    """What is written below a picture, in `length` characters: what it is, and what the model takes it for."""
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


def _spread(items: Sequence, count: int) -> list:
    """At most `count` of the items, spread evenly."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[place] for place in places]


def _capacity(statistics: RoutingStatistics) -> str:
    """Which room the experts had, in words."""
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
