"""Figures of routing statistics: the load of each expert, what it works on, and its typical patches (matplotlib)."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vmoe.inspection import style
from vmoe.inspection.results import LayerStatistics, RoutingStatistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def write_figures(statistics: RoutingStatistics, folder: str | Path) -> list[Path]:
    """Writes load.png, split.png (of two modalities), and for each layer NAME that sees images patches_NAME.png.

    Figures of an earlier call that this one does not draw are deleted. Returns the files.
    """
    folder, drawn = Path(folder), {"load": load_figure(statistics)}
    if len(statistics.modalities) > 1:
        drawn["split"] = split_figure(statistics)
    for layer in statistics.layers:
        if any(layer.typical_patches):
            drawn["patches_" + re.sub(r"[^\w.-]", "_", layer.name)] = patch_figure(layer)
    written = [style.save_figure(figure, folder / f"{name}.png") for name, figure in drawn.items()]
    for file in {*folder.glob("split.png"), *folder.glob("patches_*.png")} - set(written):
        file.unlink()
    return written


def load_figure(statistics: RoutingStatistics) -> Figure:
    """For each layer and modality a bar per expert: its share of the assignments, and of what was dropped."""
    rows = [(layer, modality) for layer in statistics.layers for modality in layer.tokens]
    with style.look():
        figure, axes = _panels(len(rows), 2 if len(statistics.modalities) == 2 else 3, 2.0)
        for ax, (layer, modality) in zip(axes, rows, strict=True):
            asked_E, kept_E = layer.asked[modality], layer.kept[modality]
            total, experts = max(1, asked_E.sum()), np.arange(layer.num_experts)
            ax.bar(experts, kept_E / total, color=style.MODALITY_COLOURS.get(modality, style.INK), width=0.8)
            dropped_E = (asked_E - kept_E) / total
            ax.bar(experts, dropped_E, bottom=kept_E / total, color=style.DROPPED, hatch="//////", width=0.8)
            ax.axhline(1 / layer.num_experts, color=style.INK, linewidth=0.8, linestyle=(0, (4, 3)))
            ax.set_title(f"{style.layer_title(layer.name)} · {modality}", loc="left")
            note = f"dropped {layer.share_dropped[modality]:.1%} · entropy {layer.entropy[modality]:.2f}"
            ax.set_title(note, loc="right", fontsize=7, color=style.PALE)
            _expert_axis(ax, layer.num_experts)
        title = "Load: share of a layer's assignments that each expert gets"
        _heading(figure, title, "Dashed: even share. Hatched grey: dropped. Entropy of the gate in nats.")
    return figure


def split_figure(statistics: RoutingStatistics) -> Figure:
    """For each layer and expert: the modalities of the tokens that it works on."""
    layers = [layer for layer in statistics.layers if len(layer.tokens) > 1] or statistics.layers
    with style.look():
        figure, axes = _panels(len(layers), 3, 2.4)
        for ax, layer in zip(axes, layers, strict=True):
            experts = np.arange(layer.num_experts)
            kept_ME = np.stack([layer.kept.get(name, np.zeros(len(experts))) for name in statistics.modalities])
            total_E = kept_ME.sum(0)
            share_ME = kept_ME / np.maximum(total_E, 1e-12)
            for m, name in enumerate(statistics.modalities):
                colour = style.MODALITY_COLOURS.get(name, style.INK)
                ax.bar(experts, share_ME[m], bottom=share_ME[:m].sum(0), color=colour, width=0.86, label=name)
            for e in np.flatnonzero(total_E == 0):
                ax.text(e, 0.5, "none", rotation=90, ha="center", va="center", fontsize=7, color=style.PALE)
            overall = kept_ME[0].sum() / max(1, total_E.sum())
            ax.axhline(overall, color="white", linewidth=1.6)
            ax.axhline(overall, color=style.INK, linewidth=0.8, linestyle=(0, (4, 3)))
            ax.set_ylim(0, 1)
            ax.set_title(style.layer_title(layer.name), loc="left")
            _expert_axis(ax, layer.num_experts)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        note = f"Share of its tokens by modality. Dashed: share of {statistics.modalities[0]} tokens over all experts."
        _heading(figure, "What each expert works on", note)
    return figure


def patch_figure(layer: LayerStatistics) -> Figure:
    """The typical patches of each expert of a layer, beside its colour."""
    count = max(map(len, layer.typical_patches))
    across = min(8, count)
    rows = math.ceil(count / across)
    load_E = layer.kept["image"] / max(1, layer.kept["image"].sum())
    with style.look():
        figure, axes = _panels(layer.num_experts, 2 if layer.num_experts <= 8 else 4, 0.45 * rows + 0.3)
        for e, (ax, own) in enumerate(zip(axes, layer.typical_patches, strict=True)):
            ax.set_title(f"expert {e} · {load_E[e]:.1%} of the patches", loc="left", fontsize=8)
            if own:
                ax.imshow(_mosaic([patch.pixels for patch in own], rows, across))
            else:
                ax.text(0.02, 0.5, "no patch", fontsize=7.5, color=style.PALE)
            ax.set(xticks=[], yticks=[], anchor="W")
            ax.spines[:].set_visible(False)
            ax.spines["left"].set(visible=True, color=style.colour_of(e), linewidth=5)
        note = "The largest gate values, largest first; at most one patch per image."
        _heading(figure, f"Typical patches of each expert · {style.layer_title(layer.name)}", note)
    return figure


def _mosaic(patches: list[np.ndarray], rows: int, columns: int) -> np.ndarray:
    """Patches (h, w, 3) row by row in one white image, with gaps of a tenth of their size."""
    gap = max(1, round(0.1 * max(patches[0].shape[:2])))
    cells = [np.pad(patch, ((0, gap), (gap, 0), (0, 0)), constant_values=255) for patch in patches]
    cells += [np.full_like(cells[0], 255)] * (rows * columns - len(cells))
    return np.concatenate([np.concatenate(cells[i : i + columns], 1) for i in range(0, len(cells), columns)])


def _panels(count: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with `count` axes in rows of up to `columns`, each `height` inches high."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = style.new_figure(max(5.5, 3.6 * columns), height * rows + 0.8)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[count:]:
        ax.remove()
    return figure, axes[:count]


def _expert_axis(ax: Axes, num_experts: int) -> None:
    """Experts along x, percents along y."""
    ax.set(xlim=(-0.6, num_experts - 0.4), xticks=range(0, num_experts, math.ceil(num_experts / 16)))
    ax.set_xlabel("expert", fontsize=7.5, color=style.PALE)
    ax.yaxis.set_major_formatter("{x:.0%}")
    ax.spines[["top", "right"]].set_visible(False)


def _heading(figure: Figure, title: str, note: str) -> None:
    """A bold title and a pale line below it, at the left; constrained layout leaves space for them."""
    figure.suptitle(f"{title}\n\n", x=0.01, ha="left", fontsize=11, weight="bold", color=style.INK)
    figure.text(0.01, 1 - 0.34 / figure.get_figheight(), note, color=style.PALE, va="top")
