"""One picture and what a model makes of it: probabilities, and the experts of its patches and of a label's words.

The demo shows what these functions return; nothing here knows of a browser.

Shapes, by suffix: E experts, K choices of a token, C classes, T word pieces, H and W pixels.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from vmoe.data.images import check_size
from vmoe.evaluation.inference import evaluating
from vmoe.evaluation.loaded_model import Subject
from vmoe.evaluation.zero_shot import Template, check_class_names, resolve_templates, zero_shot_classify
from vmoe.inspection.example_plot import DROPPED, PALETTE, draw_routing, layer_title
from vmoe.inspection.forward import checkpoint_classes, routed, sparse_layers
from vmoe.inspection.routing_statistics import SampleRouting, TokenRouting, sample_routing
from vmoe.inspection.text_tokens import word_decoder
from vmoe.moe import SparseMoE

MAP_PIXELS = 640  # the longer side of a drawn map
MAX_CHOICES = 8  # of a patch's experts, where a token has a weight for every one (expert choice, soft routing)


class Layer(NamedTuple):
    """A sparse layer.

    Attributes:
        name: such as "blocks.1.mlp".
        title: for people, such as "block 1"; no two layers have the same.
        num_experts: E.
        router: "top_k", "expert_choice" or "soft".
    """

    name: str
    title: str
    num_experts: int
    router: str


@dataclass
class Explanation:
    """What a model makes of one picture.

    Attributes:
        probabilities: (name, probability) of each label or class, in their order; two classes may have one name.
        sample: the picture with the routing of its patches; None for a dense model.
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


def list_layers(subject: Subject) -> list[Layer]:
    """The sparse layers of a model, in its order; none of a dense one."""
    if not any(isinstance(module, SparseMoE) for module in subject.model.modules()):
        return []
    found = sparse_layers(subject)
    titles = [layer_title(name) for name in found]
    if len(set(titles)) < len(titles):  # blocks of two towers
        titles = list(found)
    return [
        Layer(name, title, module.num_experts, module.router_type)
        for (name, module), title in zip(found.items(), titles, strict=True)
    ]


def explain(
    subject: Subject,
    picture: Image.Image,
    labels: Sequence[str] | None = None,
    templates: Sequence[Template] | str | None = None,
) -> Explanation:
    """Probabilities of a picture's labels or classes, and the experts of its patches.

    Args:
        subject: an image-text model, or a classifier.
        picture: 8-bit RGB.
        labels: of an image-text model; of a classifier, None.
        templates: of an image-text model, see `resolve_templates`.

    Raises:
        ValueError: bad labels or templates, a picture too large or too narrow for the model, or a file whose class
            names are not as many as the classes.
    """
    check_size(picture.size)
    if subject.tokenizer is not None:
        names = check_class_names(labels or [])
        image_3HW = subject.transform(picture)
        probabilities_C = zero_shot_classify(subject.model, subject.tokenizer, image_3HW, names, templates)[0]
    else:
        image_3HW = subject.transform(picture).to(subject.device)
        with evaluating(subject.model, subject.device, subject.precision):
            probabilities_C = subject.model(image_3HW[None])[0].float().softmax(dim=0).cpu()
        names = checkpoint_classes(subject) or [f"class {c}" for c in range(len(probabilities_C))]
        if len(names) != len(probabilities_C):
            raise ValueError(
                f"{subject.weights} names {len(names)} classes, but the model tells {len(probabilities_C)} apart"
            )
    probabilities = list(zip(names, probabilities_C.tolist(), strict=True))
    return Explanation(probabilities, sample_routing(subject, picture) if list_layers(subject) else None)


def prompt(label: str, templates: Sequence[Template] | str | None = None) -> str:
    """The text whose words are shown for a label: the first template with the label in it."""
    return resolve_templates(templates)[0](label) if templates is not None else label


def route_words(subject: Subject, text: str) -> tuple[list[str], dict[str, TokenRouting]]:
    """The word pieces of a text, and {layer name: their routing (T, K)} in the layers that see words.

    The text goes through the model without the picture, as it does in zero-shot classification.
    """
    ids_1T = subject.tokenizer([text])
    with evaluating(subject.model, subject.device, subject.precision):
        layers = routed(subject, None, ids_1T)[0].get("text", {})
    routing = {}
    for name, tokens in layers.items():
        real_T = tokens.real_BT[0]
        own = (array[0][real_T] for array in (tokens.expert_BTK, tokens.weight_BTK, tokens.kept_BTK))
        routing[name] = TokenRouting(*own)
        pieces = ids_1T[0].cpu().numpy()[real_T].tolist()
    return (word_decoder(subject.tokenizer)(pieces), routing) if routing else ([], {})


def map_size(image: np.ndarray) -> tuple[int, int]:
    """(width, height) in pixels of the map of a picture (H, W, 3)."""
    height, width = (round(side * MAP_PIXELS / max(image.shape[:2])) for side in image.shape[:2])
    return width, height


def draw_map(
    image: np.ndarray, routing: TokenRouting, num_experts: int, chosen: tuple[int, int] | None = None
) -> Image.Image:
    """The picture in grey under the colours and numbers of its patches' experts.

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
    """(row, column) of the patch at a pixel of the map.

    Args:
        x: pixels from the left.
        y: pixels from the top.
        grid: (rows, columns) of patches.
        size: (width, height) of the map, pixels.
    """
    row, column = int(y * grid[0] / size[1]), int(x * grid[1] / size[0])
    return min(max(row, 0), grid[0] - 1), min(max(column, 0), grid[1] - 1)


class PatchExpert(NamedTuple):
    """An expert that a patch chose, or that took it: its number, its weight, whether it had room."""

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
    """What one expert of a layer got of one picture or one text.

    Attributes:
        tokens: that it had room for; in a soft layer, which chooses nothing, the sum of the tokens' weights.
        share: of all of that in the layer, 0..1.
        mean_weight: of these tokens' weights for it; 0 without tokens.
        dropped: tokens that chose it and found no room; 0 where the experts or slots choose.
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
    """Words for a text with highlights.

    Args:
        words: T word pieces.
        routing: theirs, (T, K).

    Returns:
        [(word piece, its experts with their weights, such as "3 (0.92)")], and {experts: colour of the first that had
        room}.
    """
    first_T = routing.best_kept
    pieces, colours = [], {}
    for place, word in enumerate(words):
        chosen = zip(routing.expert[place], routing.weight[place], routing.kept[place], strict=True)
        kept = [f"{expert} ({weight:.2f})" for expert, weight, had_room in chosen if had_room and weight > 0]
        text = ", ".join(kept[:MAX_CHOICES]) or "dropped"
        pieces.append((word, text))
        colours[text] = DROPPED if first_T[place] < 0 else PALETTE[first_T[place] % len(PALETTE)]
    return pieces, colours
