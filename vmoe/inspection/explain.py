"""What a model makes of one image, for the demo: probabilities, experts of its patches and of a label's text tokens.

Shapes, by suffix: E experts, K choices of a token, T text tokens, H and W pixels.
"""

import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from PIL import Image

from vmoe.data.images import check_size
from vmoe.evaluation.inference import evaluating
from vmoe.evaluation.loaded_model import LoadedModel
from vmoe.evaluation.zero_shot import Template, check_class_names, resolve_templates
from vmoe.inspection import style
from vmoe.inspection.forward import routed, sparse_layers
from vmoe.inspection.maps import draw_routing
from vmoe.inspection.results import SampleRouting, TokenRouting
from vmoe.inspection.routing_statistics import sample_routing

MAP_PIXELS = 640  # the longer side of a drawn map
MAX_CHOICES = 8  # of a patch's experts, where a token has a weight for every one (expert choice, soft routing)
MAX_BARS = 20

# Gradio's own rules for tables draw heavy lines, and come after these; hence "!important".
CSS = """
.experts {overflow-x: auto}
.experts table {border-collapse: collapse; border: none !important; margin: 0; font-variant-numeric: tabular-nums}
.experts tr {border: none !important}
.experts caption {text-align: left; font-weight: 600; padding: 0 0 6px}
.experts th, .experts td {padding: 3px 14px 3px 0 !important; text-align: right; font-weight: 400 !important;
  border: none !important; border-bottom: 1px solid var(--border-color-primary) !important}
.experts .name {display: block; text-align: left; min-width: 7em; max-width: 22em; overflow-wrap: anywhere}
.experts meter {width: 100%; min-width: 8em}
.experts .chip {display: inline-block; min-width: 2em; padding: 0 6px; border-radius: 4px; text-align: center;
  font-weight: 600}
"""


class Layer(NamedTuple):
    """A sparse layer."""

    name: str
    title: str  # its name for people, such as "block 1", which no other layer has
    num_experts: int
    per_token: bool  # as in `vmoe.moe.router.Router`, and so is `soft`
    soft: bool


class Explanation(NamedTuple):
    """What a model makes of one image."""

    probabilities: list[tuple[str, float]]  # of each label or class, in their order; two classes may have one name
    sample: SampleRouting | None  # the image with the routing of its patches; None for a dense model


def parse_labels(text: str) -> list[str]:
    """Labels from a text, one per line or separated by commas; ValueError: none."""
    labels = [part.strip() for part in re.split(r"[,\n]", text or "") if part.strip()]
    if not labels:
        raise ValueError("Type at least one label: one per line, or separated by commas.")
    return labels


def list_layers(loaded: LoadedModel) -> list[Layer]:
    """The sparse layers of a model, in its order; none of a dense one."""
    found = sparse_layers(loaded, required=False)
    named = zip(found.items(), style.layer_titles(list(found)), strict=True)
    return [Layer(name, title, layer.num_experts, layer.per_token, layer.soft) for (name, layer), title in named]


def explain(
    loaded: LoadedModel,
    image: Image.Image,
    labels: Sequence[str] | None = None,
    templates: Sequence[Template] | str | None = None,
) -> Explanation:
    """Probabilities of an 8-bit RGB image's labels or classes, and the experts of its patches.

    Labels and templates (see `resolve_templates`) are for an image-text model. ValueError: these, or the image's size.
    """
    check_size(image.size)
    if loaded.tokenizer is not None:
        names = check_class_names(labels or [])
    else:
        names = loaded.class_names or [f"class {c}" for c in range(loaded.model.num_classes)]
    with evaluating(loaded.model, loaded.device, loaded.precision):
        [scores_C] = loaded.scorer(names, templates)(loaded.transform(image)[None].to(loaded.device))
    probabilities = list(zip(names, scores_C.softmax(dim=0).tolist(), strict=True))
    return Explanation(probabilities, sample_routing(loaded, image) if list_layers(loaded) else None)


def route_text(
    loaded: LoadedModel, label: str, templates: Sequence[Template] | str | None = None
) -> tuple[list[str], dict[str, TokenRouting]]:
    """The text tokens of a label in the first template, and {layer name: their routing (T, K)}, without the image."""
    ids_1T = loaded.tokenizer([resolve_templates(templates)[0](label)])
    with evaluating(loaded.model, loaded.device, loaded.precision):
        return routed(loaded, None, ids_1T).text(0)


def map_size(image: np.ndarray) -> tuple[int, int]:
    """(width, height) in pixels of the map of an image (H, W, 3)."""
    height, width = (round(side * MAP_PIXELS / max(image.shape[:2])) for side in image.shape[:2])
    return width, height


def draw_map(
    image: np.ndarray, routing: TokenRouting, num_experts: int, chosen: tuple[int, int] | None = None
) -> Image.Image:
    """The image (H, W, 3), uint8, in grey under the colours and numbers of its patches' experts; RGB, of `map_size`.

    `routing` is (rows, columns, K); `chosen` is the (row, column) of a patch to frame.
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
        for colour, line in (("white", 7), ("black", 3)) if chosen is not None else ():
            ax.add_patch(Rectangle(chosen[::-1], 1, 1, fill=False, color=colour, linewidth=line))
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def patch_at(x: float, y: float, grid: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """(row, column) of the patch at a pixel of a map with `grid` (rows, columns) patches and `size` (width, height)."""
    row, column = int(y * grid[0] / size[1]), int(x * grid[1] / size[0])
    return min(max(row, 0), grid[0] - 1), min(max(column, 0), grid[1] - 1)


def patch_experts(routing: TokenRouting, row: int, column: int) -> list[tuple[int, float, bool]]:
    """(expert, weight, whether it took the patch), best first; at most MAX_CHOICES, and only those with a weight."""
    rows, columns = routing.expert.shape[:2]
    if not (0 <= row < rows and 0 <= column < columns):
        raise ValueError(
            f"There is no patch in row {row}, column {column}: rows are 0 to {rows - 1}, columns 0 to {columns - 1}."
        )
    choices = (array[row, column].tolist() for array in (routing.expert, routing.weight, routing.kept))
    return [choice for choice in zip(*choices, strict=True) if choice[1] > 0][:MAX_CHOICES]


def expert_loads(layer: Layer, routing: TokenRouting) -> dict[str, np.ndarray]:
    """What each of the layer's E experts got of an image or a text, {measure: (E,)}.

    "number" of tokens that it took (soft: the sum of their weights), their "share" of all in the layer and "mean
    weight", and how many chose it and were "dropped" (0 where experts or slots choose).
    """
    kept = routing.kept & (routing.weight > 0)
    number_E = np.bincount(routing.expert[kept], minlength=layer.num_experts)
    weight_E = np.bincount(routing.expert[kept], routing.weight[kept], layer.num_experts)
    dropped_E = np.bincount(routing.expert[~routing.kept], minlength=layer.num_experts) * layer.per_token
    tokens_E = weight_E if layer.soft else number_E
    share_E, mean_E = tokens_E / max(tokens_E.sum(), 1e-12), weight_E / np.maximum(number_E, 1)
    return {"number": tokens_E, "share": share_E, "mean weight": mean_E, "dropped": dropped_E}


def colour_tokens(tokens: Sequence[str], routing: TokenRouting) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """([(text token, its experts with weights, such as "3 (0.92)")], {experts: colour of the best that took it})."""
    best_T = routing.best_kept
    pieces, colours = [], {}
    for index, token in enumerate(tokens):
        chosen = zip(routing.expert[index], routing.weight[index], routing.kept[index], strict=True)
        kept = [f"{expert} ({weight:.2f})" for expert, weight, took_it in chosen if took_it and weight > 0]
        text = ", ".join(kept[:MAX_CHOICES]) or "dropped"
        pieces.append((token, text))
        colours[text] = style.colour_of(best_T[index])
    return pieces, colours


# ---- HTML ----


def chip(expert: int) -> str:
    """An expert's number on its colour."""
    colour = style.colour_of(expert)
    return f'<span class="chip" style="background:{colour};color:{style.ink_on(colour)}">{expert}</span>'


def bars_html(probabilities: Sequence[tuple[str, float]]) -> str:
    """Names with bars, likeliest first; at most MAX_BARS."""
    ranked = sorted(probabilities, key=lambda item: -item[1])
    rows = (
        (f'<span class="name">{escape(name)}</span>', f'<meter value="{value:.4f}"></meter>', f"{value:.2%}")
        for name, value in ranked[:MAX_BARS]
    )
    left = len(ranked) - MAX_BARS
    return _table("Probabilities", (), rows) + (f"<p>{left} less likely ones are not shown.</p>" if left > 0 else "")


def patch_html(row: int, column: int, experts: Sequence[tuple[int, float, bool]]) -> str:
    """The experts of a patch with their weights, best first, as from `patch_experts`."""
    caption = f"Experts of the patch in row {row}, column {column}"
    if not experts:
        return f'<div class="experts"><p><b>{caption}</b></p><p>No expert took it.</p></div>'
    rows = ((chip(expert), f"{weight:.4f}", "yes" if kept else "no") for expert, weight, kept in experts)
    return _table(caption, ("expert", "weight", "taken"), rows)


def loads_html(loads: dict[str, dict[str, np.ndarray]]) -> str:
    """What each expert of a layer got: {"patches" or "text tokens": its `expert_loads`}."""
    groups = "".join(f'<th scope="colgroup" colspan="4">{escape(name)}</th>' for name in loads)
    columns, headings = [], ["expert"]
    for load in loads.values():
        headings += load
        number = "{:.2f}" if load["number"].dtype.kind == "f" else "{}"
        for form, column_E in zip((number, "{:.1%}", "{:.3f}", "{}"), load.values(), strict=True):
            columns.append([form.format(value) for value in column_E])
    rows = ([chip(expert), *cells] for expert, cells in enumerate(zip(*columns, strict=True)))
    return _table("Load of the experts", headings, rows, f"<tr><th></th>{groups}</tr>")


def _table(caption: str, headings: Iterable[str], rows: Iterable[Sequence[str]], groups: str = "") -> str:
    """A table of HTML cells, the first of each row its heading."""
    head = "".join(f'<th scope="col">{name}</th>' for name in headings)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for first, *cells in rows
    )
    caption, head = f"<caption>{caption}</caption>", f"<thead>{groups}<tr>{head}</tr></thead>"
    return f'<div class="experts"><table>{caption}{head}<tbody>{body}</tbody></table></div>'
