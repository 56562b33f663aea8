"""The HTML report: one file, without network or server, that shows where patches and text tokens go.

Values are formatted by the page; the routing of single tokens and larger tables are packed as typed arrays (base64),
images as WebP. The page's parts are report.html, report.css, report_parts.js (texts, tables, charts),
report_images.js (the routing maps) and report.js (layers, experts, classes, words).

Shapes, by suffix: E experts, K choices of a token, C classes, S samples, T words.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from PIL import Image
from rich.console import Console

from vmoe.inspection.plots import DROPPED, PALETTE, ink_on, layer_titles
from vmoe.inspection.report_charts import chart_script, chart_specifications
from vmoe.inspection.results import LayerStatistics, RoutingStatistics, SampleRouting, TokenRouting, TypicalPatch
from vmoe.utils.files import atomic_file

MAX_BYTES = 15_000_000  # of the file; beyond it, fewer images are shown
MIN_IMAGES = 24  # a page of them, shown even then
MAX_SIDE = 224  # of a shown image, in pixels
MAX_SHEET_PIXELS = 4_000_000  # of the typical patches of all layers together
SCRIPTS = ("report_parts.js", "report_images.js", "report.js")
WEIGHT_STEPS = 10_000  # weights are shown to four decimals
KEPT_BIT = 1 << 15  # above the largest weight, 10,000
MAX_CHOICES = 4  # of a token, where experts or slots choose and K = E
MAX_WORDS = 300  # per layer, the most frequent
MAX_TYPICAL = 24  # patches per expert
EXACT_SIDE = 64  # images of up to so many pixels a side lose nothing; larger ones are compressed
LAYER_FACTS = ("name", "num_experts", "num_selected_experts", "router", "capacity", "batch_priority", "tokens")
BLOCK = 8  # JPEG's blocks do not look at each other, so patches on whole blocks do not mix


def write_report(statistics: RoutingStatistics, file: str | Path, console: Console | None = None) -> Path:
    """Write the report as one HTML file that opens from the disk.

    Args:
        statistics: what `gather_statistics` found.
        file: where to write; its folder is made. The same statistics give the same file.
        console: told when the images do not all fit into the file's 15 MB; None: only the page says so.

    Returns:
        The file.

    Raises:
        ModuleNotFoundError: vl-convert is not installed (extra `report`).
        ValueError: statistics without a sparse layer, or weights outside 0..1.
    """
    if not statistics.layers:
        raise ValueError(f"{statistics.checkpoint} has no sparse layer, so there is no routing to report")
    file = Path(file)
    library, specifications = chart_script(), _script_json(chart_specifications())
    own = "\n".join(_part(name) for name in SCRIPTS)
    around = (library, own, specifications, _part("report.css"), _part("report.html"))
    data = report_data(statistics, MAX_BYTES - sum(len(part.encode()) for part in around))
    shown, given = len(data["samples"]), len(statistics.samples)
    if shown < given and console is not None:
        console.print(f"the report shows {shown} of {given} images, to stay below {MAX_BYTES / 1e6:.0f} MB")
    page = Environment(autoescape=False).from_string(_part("report.html"))
    html = page.render(
        # The policy lets these two scripts run and nothing else: no text of the data can, nor any request go out.
        script_hashes=" ".join(f"'sha256-{_sha256(script)}'" for script in (library, own)),
        style=_part("report.css"),
        data=_script_json(data),
        specifications=specifications,
        library=library,
        own=own,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as temporary:
        temporary.write_text(html, encoding="utf-8", newline="\n")
    return file


def report_data(statistics: RoutingStatistics, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """What the page shows, as JSON; see the module's docstring.

    If it has more than `max_bytes` as JSON, some images are left out; the others are evenly spread.
    """
    samples = [_sample_data(statistics, sample) for sample in statistics.samples]
    names = ("checkpoint", "data", "data_fingerprint", "num_samples", "num_skipped", "words_from", "versions")
    facts = {name: getattr(statistics, name) for name in names} | {"weights": statistics.weights_fingerprint}
    data = {
        "facts": facts,
        "palette": list(PALETTE),
        "dropped": DROPPED,
        "inks": {colour: ink_on(colour) for colour in (*PALETTE, DROPPED)},
        "modalities": statistics.modalities,
        "class_names": statistics.class_names,
        "agreement": {name: _numbers(matrix) for name, matrix in statistics.agreement.items()},
        "num_samples_given": len(samples),
        "num_typical": _num_typical(statistics.layers),
    }
    titles = layer_titles([layer.name for layer in statistics.layers])
    fixed = [
        {"title": title, **_layer_data(layer, data["num_typical"])}
        for title, layer in zip(titles, statistics.layers, strict=True)
    ]

    def with_images(number: int) -> dict[str, Any]:
        shown = np.linspace(0, len(samples) - 1, number).round().astype(int).tolist()
        return {
            **data,
            "layers": [{**layer, **_layer_routing(statistics, i, shown)} for i, layer in enumerate(fixed)],
            "samples": [samples[index] for index in shown],
            "sample_index": [statistics.sample_index[index] for index in shown],
        }

    found = with_images(len(samples))
    number, least = len(samples), min(len(samples), MIN_IMAGES)
    empty = len(_script_json(with_images(0)))
    while number > least and (size := len(_script_json(found))) > max_bytes:
        # Images are about equally large; where they are not, one more round follows.
        number = max(least, min(number - 1, int(number * (max_bytes - empty) / (size - empty))))
        found = with_images(number)
    return found


def _sample_data(statistics: RoutingStatistics, sample: SampleRouting) -> dict[str, Any]:
    return {
        "path": sample.path,
        "class": None if sample.label is None else _class_name(statistics, sample.label),
        "caption": sample.caption,
        "words": sample.words,
        "top": [[name, float(probability)] for name, probability in sample.top_classes],
        # Index of the right name in "top", or null. Names may be alike, or longer than the class's.
        "right": sample.top_labels.index(sample.label) if sample.label in sample.top_labels else None,
        "source": _image_source(sample.image),
    }


def _class_name(statistics: RoutingStatistics, label: int) -> str:
    return statistics.class_names[label] if statistics.class_names else f"class {label}"


def _layer_data(layer: LayerStatistics, num_typical: int) -> dict[str, Any]:
    by_frequency = sorted(layer.expert_word.items(), key=lambda item: (-float(item[1].sum()), item[0]))
    words = by_frequency[:MAX_WORDS]
    return {
        **{name: getattr(layer, name) for name in LAYER_FACTS},
        "capacity_factor": layer.eval_capacity_factor,
        **{
            name: {modality: _numbers(value) for modality, value in getattr(layer, name).items()}
            for name in ("asked", "kept", "importance", "entropy", "share_dropped")
        },
        "expert_class": None if layer.expert_class is None else _packed(layer.expert_class),
        "words": [word for word, _ in words],
        "num_words": len(by_frequency),
        "word_expert": _packed(np.array([counts_E for _, counts_E in words])),
        "typical": _typical_data(layer.typical_patches, num_typical),
    }


def _layer_routing(statistics: RoutingStatistics, index: int, shown: list[int]) -> dict[str, Any]:
    layer, samples = statistics.layers[index], [statistics.samples[number] for number in shown]
    return {
        "patches": _routing_data([sample.patches[index] for sample in samples], layer),
        "text": _routing_data([sample.text[index] for sample in samples if sample.text], layer),
    }


def _routing_data(routings: list[TokenRouting | None], layer: LayerStatistics) -> dict[str, Any] | None:
    """All samples' tokens one after the other: of each token the experts, and weight and `kept` in one number."""
    found = [routing for routing in routings if routing is not None]
    if not found:
        return None
    choices = found[0].expert.shape[-1]
    expert_TK = np.concatenate([routing.expert.reshape(-1, choices) for routing in found])
    weight_TK = np.concatenate([routing.weight.reshape(-1, choices) for routing in found]).astype(np.float64)
    kept_TK = np.concatenate([routing.kept.reshape(-1, choices) for routing in found])
    if not ((weight_TK >= 0) & (weight_TK <= 1 + 1e-3)).all():  # NaN too
        raise ValueError(f"weights of {layer.name} must be in 0..1, got {weight_TK.min()} .. {weight_TK.max()}")
    shown = choices if layer.router == "top_k" else min(choices, MAX_CHOICES)
    if shown < choices:
        order_TK = np.argsort(-np.where(kept_TK, weight_TK, -1), axis=-1, kind="stable")[:, :shown]
        expert_TK, weight_TK, kept_TK = (np.take_along_axis(a, order_TK, -1) for a in (expert_TK, weight_TK, kept_TK))
    grid = found[0].expert.shape[:-1]
    return {
        "shown": shown,
        "grid": list(grid) if len(grid) == 2 else None,
        "expert": _packed(expert_TK),
        "weight": _packed(np.rint(weight_TK * WEIGHT_STEPS) + KEPT_BIT * kept_TK),
    }


def _num_typical(layers: list[LayerStatistics]) -> int:
    """Patches per expert, such that their sheets do not fill the file."""
    column = 0  # pixels of one patch of each expert in each layer
    for layer in layers:
        first = [own[0].pixels.shape[:2] for own in layer.typical_patches if own][:1]
        column += sum(len(layer.typical_patches) * math.prod(map(_whole_blocks, shape)) for shape in first)
    return MAX_TYPICAL if column == 0 else max(1, min(MAX_TYPICAL, MAX_SHEET_PIXELS // column))


def _whole_blocks(side: int) -> int:
    return math.ceil(side / BLOCK) * BLOCK


def _typical_data(patches: list[list[TypicalPatch]], most: int) -> dict[str, Any] | None:
    """One JPEG with a row of patches per expert, each patch on whole blocks, and what is known of each patch."""
    patches = [own[:most] for own in patches]
    columns = max((len(own) for own in patches), default=0)
    if columns == 0:
        return None
    height, width = next(own for own in patches if own)[0].pixels.shape[:2]
    cell_height, cell_width = map(_whole_blocks, (height, width))
    sheet = np.zeros((len(patches) * cell_height, columns * cell_width, 3), np.uint8)
    for row, own in enumerate(patches):
        for column, patch in enumerate(own):
            top, left = row * cell_height, column * cell_width
            padding = ((0, cell_height - height), (0, cell_width - width), (0, 0))
            sheet[top : top + cell_height, left : left + cell_width] = np.pad(patch.pixels, padding, mode="edge")
    return {
        "sheet": _encoded(sheet, "JPEG", quality=90, subsampling=0),
        "patch": [height, width],
        "cell": [cell_height, cell_width],
        "columns": columns,
        "patches": [[[p.sample, p.row, p.column, _numbers(p.weight)] for p in own] for own in patches],
    }


def _image_source(pixels: np.ndarray) -> str:
    height, width = pixels.shape[:2]
    exact = max(height, width) <= EXACT_SIDE
    if max(height, width) > MAX_SIDE:
        size = [max(1, round(side * MAX_SIDE / max(height, width))) for side in (width, height)]
        pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
    options = {"lossless": True, "quality": 60} if exact else {"quality": 80}
    return f"data:image/webp;base64,{_encoded(pixels, 'WEBP', **options)}"


def _encoded(pixels: np.ndarray, form: str, **options: Any) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return base64.b64encode(buffer.getvalue()).decode()


def _packed(values: np.ndarray) -> dict[str, str]:
    """Base64 of the smallest typed array that holds the numbers, little-endian as in every browser."""
    values = np.asarray(values, dtype=np.float64)
    whole = bool((values == np.rint(values)).all()) and bool((values >= 0).all())
    largest = values.max(initial=0)
    bits = next((bits for bits in (8, 16, 32) if largest < 2**bits), None) if whole else None
    kind, dtype = (f"Uint{bits}Array", f"<u{bits // 8}") if bits else ("Float32Array", "<f4")
    return {"kind": kind, "data": base64.b64encode(np.ascontiguousarray(values, dtype=dtype).tobytes()).decode()}


def _numbers(values: Any) -> Any:
    """Floats, in lists as the values are; JSON has no NaN, so null stands for it."""
    if np.ndim(values):
        return [_numbers(value) for value in values]
    return float(values) if math.isfinite(values) else None


def _script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in, nor open a comment there."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _part(name: str) -> str:
    return files("vmoe.inspection").joinpath(name).read_text(encoding="utf-8")
