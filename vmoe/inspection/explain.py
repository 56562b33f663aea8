"""What a model makes of one image: probabilities, the experts of its patches and of a label's text tokens, as HTML too.

The demo shows what these functions return.

Shapes, by suffix: E experts, K choices of a token, C classes, T text tokens, H and W pixels.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

import numpy as np
from PIL import Image

from vmoe.data.images import check_size
from vmoe.evaluation.inference import evaluating
from vmoe.evaluation.loaded_model import LoadedModel
from vmoe.evaluation.zero_shot import Template, check_class_names, resolve_templates, zero_shot_classify
from vmoe.inspection.forward import checkpoint_classes, routed, sparse_layers, word_decoder
from vmoe.inspection.plots import DROPPED, PALETTE, draw_routing, ink_on, layer_titles
from vmoe.inspection.results import SampleRouting, TokenRouting
from vmoe.inspection.routing_statistics import sample_routing, token_routing

MAP_PIXELS = 640  # the longer side of a drawn map
MAX_CHOICES = 8  # of a patch's experts, where a token has a weight for every one (expert choice, soft routing)
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


class Layer(NamedTuple):
    """A sparse layer; `title` is its name for people, such as "block 1", which no other layer has."""

    name: str
    title: str
    num_experts: int
    router: str


@dataclass
class Explanation:
    """What a model makes of one image.

    Attributes:
        probabilities: (name, probability) of each label or class, in their order; two classes may have one name.
        sample: the image with the routing of its patches; None for a dense model.
    """

    probabilities: list[tuple[str, float]]
    sample: SampleRouting | None


def parse_labels(text: str) -> list[str]:
    """Labels from what was typed, one per line or separated by commas; empty ones do not count.

    Raises:
        ValueError: no label, or one that is given twice.
    """
    labels = [part.strip() for part in re.split(r"[,\n]", text or "") if part.strip()]
    if not labels:
        raise ValueError("Type at least one label: one per line, or separated by commas.")
    repeated = [label for label, count in Counter(labels).items() if count > 1]
    if repeated:
        raise ValueError(f"Each label may stand there once; given twice: {', '.join(map(repr, repeated[:5]))}.")
    return labels


def list_layers(subject: LoadedModel) -> list[Layer]:
    """The sparse layers of a model, in its order; none of a dense one."""
    found = sparse_layers(subject, required=False)
    titles = layer_titles(list(found))
    return [
        Layer(name, title, module.num_experts, module.router_type)
        for (name, module), title in zip(found.items(), titles, strict=True)
    ]


def explain(
    subject: LoadedModel,
    image: Image.Image,
    labels: Sequence[str] | None = None,
    templates: Sequence[Template] | str | None = None,
) -> Explanation:
    """Probabilities of an image's labels or classes, and the experts of its patches.

    Args:
        subject: an image-text model, or a classifier.
        image: 8-bit RGB.
        labels: of an image-text model; of a classifier, None.
        templates: of an image-text model, see `resolve_templates`.

    Raises:
        ValueError: bad labels or templates, an image too large or too narrow for the model, or a file whose class
            names are not as many as the classes.
    """
    check_size(image.size)
    if subject.tokenizer is not None:
        names = check_class_names(labels or [])
        image_3HW = subject.transform(image)
        probabilities_C = zero_shot_classify(subject.model, subject.tokenizer, image_3HW, names, templates)[0]
    else:
        image_3HW = subject.transform(image).to(subject.device)
        with evaluating(subject.model, subject.device, subject.precision):
            probabilities_C = subject.model(image_3HW[None])[0].float().softmax(dim=0).cpu()
        names = checkpoint_classes(subject) or [f"class {c}" for c in range(len(probabilities_C))]
        if len(names) != len(probabilities_C):
            raise ValueError(
                f"{subject.weights} names {len(names)} classes, but the model tells {len(probabilities_C)} apart"
            )
    probabilities = list(zip(names, probabilities_C.tolist(), strict=True))
    return Explanation(probabilities, sample_routing(subject, image) if list_layers(subject) else None)


def prompt(label: str, templates: Sequence[Template] | str | None = None) -> str:
    """The text whose tokens are shown for a label: the first template with the label in it."""
    return resolve_templates(templates)[0](label) if templates is not None else label


def route_words(subject: LoadedModel, text: str) -> tuple[list[str], dict[str, TokenRouting]]:
    """The word pieces of a text, and {layer name: their routing (T, K)} in the layers that see text.

    The text goes through the model without the image, as it does in zero-shot classification.
    """
    ids_1T = subject.tokenizer([text])
    with evaluating(subject.model, subject.device, subject.precision):
        layers = routed(subject, None, ids_1T)[0].get("text", {})
    routing = {}
    for name, tokens in layers.items():
        real_T = tokens.real_BT[0]
        routing[name] = token_routing(tokens, 0, real_T)
        pieces = ids_1T[0].cpu().numpy()[real_T].tolist()
    return (word_decoder(subject.tokenizer)(pieces), routing) if routing else ([], {})


def map_size(image: np.ndarray) -> tuple[int, int]:
    """(width, height) in pixels of the map of an image (H, W, 3)."""
    height, width = (round(side * MAP_PIXELS / max(image.shape[:2])) for side in image.shape[:2])
    return width, height


def draw_map(
    image: np.ndarray, routing: TokenRouting, num_experts: int, chosen: tuple[int, int] | None = None
) -> Image.Image:
    """The image in grey under the colours and numbers of its patches' experts.

    Args:
        image: (H, W, 3) uint8.
        routing: of the patches, (rows, columns, K).
        num_experts: E.
        chosen: (row, column) of a patch to frame, or None.

    Returns:
        RGB, of `map_size`; the patches divide it evenly.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    expert_HW = routing.best_kept
    width, height = map_size(image)
    with rc_context({"font.family": "DejaVu Sans", "hatch.linewidth": 1.5, "hatch.color": "#FFFFFF"}):
        figure = Figure(figsize=((width + 0.5) / 100, (height + 0.5) / 100), dpi=100)  # rounded down
        ax = figure.add_axes((0, 0, 1, 1))
        number_size = 0.4 * 72 / 100 * min(height / expert_HW.shape[0], width / expert_HW.shape[1])  # points
        draw_routing(ax, image / 255, expert_HW, num_experts, number_size=min(number_size, 18))
        ax.set_aspect("auto")
        if chosen is not None:
            for colour, line in (("white", 7), ("black", 3)):
                ax.add_patch(Rectangle((chosen[1], chosen[0]), 1, 1, fill=False, color=colour, linewidth=line))
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def patch_at(x: float, y: float, grid: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """(row, column) of the patch at a pixel of a map with `grid` (rows, columns) patches and `size` (width, height)."""
    row, column = int(y * grid[0] / size[1]), int(x * grid[1] / size[0])
    return min(max(row, 0), grid[0] - 1), min(max(column, 0), grid[1] - 1)


class PatchExpert(NamedTuple):
    """An expert that a patch chose, or that took it: its number, its weight, whether it took it."""

    expert: int
    weight: float
    kept: bool


def patch_experts(routing: TokenRouting, row: int, column: int) -> list[PatchExpert]:
    """The experts of a patch, best first; at most MAX_CHOICES, and only those with a weight.

    Raises:
        ValueError: there is no such patch.
    """
    rows, columns = routing.expert.shape[:2]
    if not (0 <= row < rows and 0 <= column < columns):
        raise ValueError(
            f"There is no patch in row {row}, column {column}: rows are 0 to {rows - 1}, columns 0 to {columns - 1}."
        )
    choices = zip(routing.expert[row, column], routing.weight[row, column], routing.kept[row, column], strict=True)
    found = [PatchExpert(int(expert), float(weight), bool(kept)) for expert, weight, kept in choices if weight > 0]
    return found[:MAX_CHOICES]


class Load(NamedTuple):
    """What one expert of a layer got of one image or one text.

    Attributes:
        tokens: that it took; in a soft layer, which chooses nothing, the sum of the tokens' weights.
        share: of all of that in the layer, 0..1.
        mean_weight: of these tokens' weights for it; 0 without tokens.
        dropped: tokens that chose it and were dropped; 0 where the experts or slots choose.
    """

    tokens: float
    share: float
    mean_weight: float
    dropped: int


def expert_loads(layer: Layer, routing: TokenRouting) -> list[Load]:
    """The load of each of the layer's E experts."""
    kept = routing.kept & (routing.weight > 0)
    number_E = np.bincount(routing.expert[kept], minlength=layer.num_experts)
    weight_E = np.bincount(routing.expert[kept], routing.weight[kept], layer.num_experts)
    asked_E = np.bincount(routing.expert[~routing.kept], minlength=layer.num_experts)
    tokens_E = weight_E if layer.router == "soft" else number_E
    dropped_E = asked_E if layer.router == "top_k" else np.zeros_like(asked_E)
    total = max(float(tokens_E.sum()), 1e-12)
    return [
        Load(tokens, tokens / total, weight / max(number, 1), dropped)
        for tokens, weight, number, dropped in zip(
            tokens_E.tolist(), weight_E.tolist(), number_E.tolist(), dropped_E.tolist(), strict=True
        )
    ]


def colour_words(words: Sequence[str], routing: TokenRouting) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """([(word piece, its experts with weights, such as "3 (0.92)")], {experts: colour of the best that took it})."""
    first_T = routing.best_kept
    pieces, colours = [], {}
    for index, word in enumerate(words):
        chosen = zip(routing.expert[index], routing.weight[index], routing.kept[index], strict=True)
        kept = [f"{expert} ({weight:.2f})" for expert, weight, took_it in chosen if took_it and weight > 0]
        text = ", ".join(kept[:MAX_CHOICES]) or "dropped"
        pieces.append((word, text))
        colours[text] = DROPPED if first_T[index] < 0 else PALETTE[first_T[index] % len(PALETTE)]
    return pieces, colours


# ---- HTML ----


def chip(expert: int) -> str:
    """An expert's number on its colour."""
    colour = PALETTE[expert % len(PALETTE)]
    return f'<span class="chip" style="background:{colour};color:{ink_on(colour)}">{expert}</span>'


def bars_html(probabilities: Sequence[tuple[str, float]]) -> str:
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


def patch_html(row: int, column: int, experts: Sequence[PatchExpert]) -> str:
    """The experts of a patch with their weights, best first."""
    caption = f"Experts of the patch in row {row}, column {column}"
    if not experts:
        return f'<div class="experts"><p><b>{caption}</b></p><p>No expert took it.</p></div>'
    rows = "".join(
        f'<tr><th scope="row">{chip(own.expert)}</th><td>{own.weight:.4f}</td>'
        f"<td>{'yes' if own.kept else 'no'}</td></tr>"
        for own in experts
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("expert", "weight", "taken"))
    return f'<div class="experts">{_table(caption, f"<tr>{head}</tr>", rows)}</div>'


def loads_html(loads: dict[str, Sequence[Load]]) -> str:
    """What each expert of a layer got: `loads` is {"patches" or "words": the load of each of E experts}."""
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
