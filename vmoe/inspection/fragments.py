"""Pieces of HTML that the demo shows: probabilities, the experts of a patch, the load of a layer's experts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from vmoe.inspection.example_plot import PALETTE
from vmoe.inspection.explain import Load, PatchExpert

MAX_BARS = 20
LOAD_COLUMNS = ("number", "share", "mean weight", "dropped")

# Gradio's own rules for tables draw heavy lines, and come after these; hence "!important".
CSS = """
.experts table, .experts tr, .experts th, .experts td {border: none !important}
.experts table {border-collapse: collapse; margin: 0; font-variant-numeric: tabular-nums}
.experts {overflow-x: auto}
.experts caption {text-align: left; font-weight: 600; padding: 0 0 6px}
.experts th, .experts td {padding: 3px 14px 3px 0 !important; text-align: right; font-weight: 400 !important}
.experts thead tr:last-child th, .experts tbody tr th, .experts tbody tr td {
  border-bottom: 1px solid var(--border-color-primary) !important}
.experts thead th[colspan] {text-align: center; font-weight: 600 !important}
.experts .name {text-align: left; min-width: 7em; max-width: 22em; overflow-wrap: anywhere}
.experts .wide {width: 100%}
.experts .bar {width: 55%}
.experts .bar span {display: block; height: 12px; min-width: 1px; border-radius: 2px; background: var(--color-accent)}
.experts .chip {display: inline-block; min-width: 2em; padding: 0 6px; border-radius: 4px; text-align: center;
  font-weight: 600}
"""


def chip(expert: int) -> str:
    """An expert's number on its colour."""
    from matplotlib.colors import to_rgb

    colour = PALETTE[expert % len(PALETTE)]
    linear = (((np.array(to_rgb(colour)) + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722)
    ink = "#000" if linear > 0.179 else "#fff"  # the one with more contrast, by WCAG's formula
    return f'<span class="chip" style="background:{colour};color:{ink}">{expert}</span>'


def probability_bars(probabilities: Sequence[tuple[str, float]]) -> str:
    """Names with bars, likeliest first; at most MAX_BARS."""
    ranked = sorted(probabilities, key=lambda item: -item[1])
    rows = "".join(
        f'<tr><th scope="row" class="name">{escape(name)}</th><td class="bar" aria-hidden="true">'
        f'<span style="width:{value:.2%}"></span></td><td>{value:.2%}</td></tr>'
        for name, value in ranked[:MAX_BARS]
    )
    left = len(ranked) - MAX_BARS
    more = f"<p>{left} less likely ones are not shown.</p>" if left > 0 else ""
    return f'<div class="experts">{_table("Probabilities", "", rows, wide=True)}{more}</div>'


def patch_experts(row: int, column: int, experts: Sequence[PatchExpert]) -> str:
    """The experts of a patch with their weights, best first."""
    caption = f"Experts of the patch in row {row}, column {column}"
    if not experts:
        return f'<div class="experts"><p><b>{caption}</b></p><p>No expert took it.</p></div>'
    rows = "".join(
        f'<tr><th scope="row">{chip(own.expert)}</th><td>{own.weight:.4f}</td>'
        f"<td>{'yes' if own.kept else 'no'}</td></tr>"
        for own in experts
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("expert", "weight", "had room"))
    return f'<div class="experts">{_table(caption, f"<tr>{head}</tr>", rows)}</div>'


def load_table(loads: dict[str, Sequence[Load]]) -> str:
    """What each expert of a layer got.

    Args:
        loads: {"patches" or "words": the load of each of E experts}.
    """
    groups = "".join(f'<th scope="colgroup" colspan="{len(LOAD_COLUMNS)}">{escape(name)}</th>' for name in loads)
    head = "".join(f'<th scope="col">{name}</th>' for _ in loads for name in LOAD_COLUMNS)
    rows = "".join(
        f'<tr><th scope="row">{chip(expert)}</th>{"".join(_load_cells(load) for load in own)}</tr>'
        for expert, own in enumerate(zip(*loads.values(), strict=True))
    )
    head = f'<tr><th></th>{groups}</tr><tr><th scope="col">expert</th>{head}</tr>'
    return f'<div class="experts">{_table("Load of the experts", head, rows, wide=True)}</div>'


def _table(caption: str, head: str, rows: str, wide: bool = False) -> str:
    kind = ' class="wide"' if wide else ""
    return f"<table{kind}><caption>{caption}</caption><thead>{head}</thead><tbody>{rows}</tbody></table>"


def _load_cells(load: Load) -> str:
    tokens = f"{load.tokens:.2f}" if isinstance(load.tokens, float) else str(load.tokens)
    weight = f"{load.mean_weight:.3f}" if load.tokens else "–"
    return "".join(f"<td>{text}</td>" for text in (tokens, f"{load.share:.1%}", weight, load.dropped))
