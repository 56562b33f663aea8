"""The HTML report: one file, without network or server, that shows where patches and text tokens go.

Values are formatted by the page; the routing of single tokens and larger tables are packed as typed arrays (base64),
images as WebP. Shapes, by suffix: E experts, K choices of a token, T tokens.
"""

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

from vmoe.inspection import style
from vmoe.inspection.results import (
    MEASURES,
    LayerStatistics,
    RoutingStatistics,
    SampleRouting,
    TokenRouting,
    TypicalPatch,
    evenly_spaced,
)
from vmoe.moe.layer import ROUTERS
from vmoe.utils.files import atomic_file

MAX_BYTES = 15_000_000  # of the file; beyond it, fewer images are shown
MIN_IMAGES = 24  # a page of them, shown even then
MAX_SIDE = 224  # of a shown image, in pixels
EXACT_SIDE = 64  # images of up to so many pixels a side lose nothing; larger ones are compressed
MAX_PATCH_PIXELS = 2_000_000  # of the typical patches of all layers together, which lose nothing
MAX_TYPICAL = 24  # patches per expert
WEIGHT_STEPS = 10_000  # weights are shown to four decimals
KEPT_BIT = 1 << 15  # above the largest weight, 10,000
MAX_CHOICES = 4  # of a token, where experts or slots choose and K = E
MAX_TEXT_TOKENS = 300  # per layer, the most frequent
SCRIPTS = ("report_parts.js", "report_images.js", "report.js")
FACTS = ("checkpoint", "data", "data_fingerprint", "num_samples", "num_skipped", "texts_from", "versions")


def write_report(statistics: RoutingStatistics, file: str | Path, console: Console | None = None) -> Path:
    """Writes the report as one HTML file that opens from the disk, and returns it; its folder is made.

    The same statistics give the same file. The page, and the `console` if there is one, say so if not all images fit
    into 15 MB. ValueError: weights outside 0..1.
    """
    file = Path(file)
    script = "\n".join(_part(name) for name in SCRIPTS)
    # The policy lets this script run and nothing else: no text of the data can, nor any request go out.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {"script": script, "script_hash": f"'sha256-{digest}'", "style": _part("report.css")}
    page = Environment(autoescape=False).from_string(_part("report.html"))
    data = report_data(statistics, MAX_BYTES - len(page.render(parts).encode()))
    shown, given = len(data["samples"]), len(statistics.samples)
    if shown < given and console is not None:
        console.print(f"the report shows {shown} of {given} images, to stay below {MAX_BYTES / 1e6:.0f} MB")
    with atomic_file(file) as temporary:
        temporary.write_text(page.render(parts, data=_script_json(data)), encoding="utf-8", newline="\n")
    return file


def report_data(statistics: RoutingStatistics, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """What the page shows, for JSON; if that has more than `max_bytes`, of fewer images, evenly spaced."""
    samples = [_sample_data(statistics, sample) for sample in statistics.samples]
    titles = style.layer_titles([layer.name for layer in statistics.layers])
    num_typical = _num_typical(statistics.layers)
    pairs = zip(titles, statistics.layers, strict=True)
    layers = [{"title": title, **_layer_data(layer, num_typical)} for title, layer in pairs]
    data = {
        "facts": {name: getattr(statistics, name) for name in FACTS} | {"weights": statistics.weights_fingerprint},
        "palette": list(style.PALETTE),
        "dropped": style.DROPPED,
        "inks": {colour: style.ink_on(colour) for colour in (*style.PALETTE, style.DROPPED)},
        "modalities": statistics.modalities,
        "class_names": statistics.class_names,
        "agreement": {name: _numbers(matrix) for name, matrix in statistics.agreement.items()},
        "num_samples_given": len(samples),
    }

    def with_images(number: int) -> dict[str, Any]:
        shown = evenly_spaced(len(samples), number)
        routed = [statistics.samples[index] for index in shown]
        for i, layer in enumerate(statistics.layers):
            layers[i]["patches"] = _routing_data([sample.patches[i] for sample in routed], layer)
            layers[i]["text"] = _routing_data([sample.text[i] for sample in routed if sample.text], layer)
        return {
            **data,
            "layers": layers,
            "samples": [samples[index] for index in shown],
            "sample_index": [statistics.sample_index[index] for index in shown],
        }

    number, least, empty = len(samples), min(len(samples), MIN_IMAGES), len(_script_json(with_images(0)))
    found = with_images(number)
    while number > least and (size := len(_script_json(found))) > max_bytes:
        # Images are about equally large; where they are not, one more round follows.
        number = max(least, min(number - 1, int(number * (max_bytes - empty) / (size - empty))))
        found = with_images(number)
    return found


def _sample_data(statistics: RoutingStatistics, sample: SampleRouting) -> dict[str, Any]:
    names, label = statistics.class_names, sample.label
    return {
        "path": sample.path,
        "class": None if label is None else names[label] if names else f"class {label}",
        "caption": sample.caption,
        "text_tokens": sample.text_tokens,
        "top": [[name, float(probability)] for name, probability in sample.top_classes],
        # Index of the right name in "top", or null. Names may be alike, or longer than the class's.
        "right": sample.top_labels.index(label) if label in sample.top_labels else None,
        "mistake": _mistake(sample),
        "source": _image_source(sample.image),
    }


def _mistake(sample: SampleRouting) -> float | None:
    """How wrong the model is, -1..1: the probability of the likeliest wrong class less that of the right one (0 where
    it is not among the likeliest); above 0 is a mistake. None: it is not known."""
    if sample.label is None or not sample.top_labels:
        return None
    shares = {label: float(share) for label, (_, share) in zip(sample.top_labels, sample.top_classes)}
    right = shares.pop(sample.label, 0.0)
    return max(shares.values(), default=0.0) - right


def _layer_data(layer: LayerStatistics, num_typical: int) -> dict[str, Any]:
    by_frequency = sorted(layer.expert_token.items(), key=lambda item: (-float(item[1].sum()), item[0]))
    listed, router = by_frequency[:MAX_TEXT_TOKENS], ROUTERS[layer.router]
    return {
        **layer.settings,
        "chooser": "slots" if router.soft else "tokens" if router.per_token else "experts",
        **{name: {modality: _numbers(value) for modality, value in getattr(layer, name).items()} for name in MEASURES},
        "expert_class": None if layer.expert_class is None else _packed(layer.expert_class),
        "text_tokens": [token for token, _ in listed],
        "num_text_tokens": len(by_frequency),
        "token_expert": _packed(np.array([counts_E for _, counts_E in listed])),
        "typical": _typical_data([own[:num_typical] for own in layer.typical_patches]),
    }


def _routing_data(routings: list[TokenRouting | None], layer: LayerStatistics) -> dict[str, Any] | None:
    """All samples' tokens one after the other: of each token the experts, and weight and `kept` in one number."""
    found = [routing for routing in routings if routing is not None]
    if not found:
        return None
    *grid, choices = found[0].expert.shape
    expert_TK, weight_TK, kept_TK = (
        np.concatenate([getattr(routing, name).reshape(-1, choices) for routing in found])
        for name in ("expert", "weight", "kept")
    )
    if not ((weight_TK >= 0) & (weight_TK <= 1 + 1e-3)).all():  # NaN too
        raise ValueError(f"weights of {layer.name} must be in 0..1, got {weight_TK.min()} .. {weight_TK.max()}")
    shown = choices if ROUTERS[layer.router].per_token else min(choices, MAX_CHOICES)
    if shown < choices:
        order_TK = np.argsort(-np.where(kept_TK, weight_TK, -1), axis=-1, kind="stable")[:, :shown]
        expert_TK, weight_TK, kept_TK = (np.take_along_axis(a, order_TK, -1) for a in (expert_TK, weight_TK, kept_TK))
    return {
        "shown": shown,
        "grid": grid if len(grid) == 2 else None,
        "expert": _packed(expert_TK),
        "weight": _packed(np.rint(weight_TK.astype(np.float64) * WEIGHT_STEPS) + KEPT_BIT * kept_TK),
    }


def _num_typical(layers: list[LayerStatistics]) -> int:
    """Patches per expert, such that they do not fill the file."""
    pixels = 0  # of one patch of each expert in each layer
    for layer in layers:
        first = [own[0].pixels for own in layer.typical_patches if own][:1]
        pixels += sum(len(layer.typical_patches) * math.prod(patch.shape[:2]) for patch in first)
    return max(1, min(MAX_TYPICAL, MAX_PATCH_PIXELS // max(1, pixels)))


def _typical_data(patches: list[list[TypicalPatch]]) -> dict[str, Any] | None:
    """One image with a row of patches per expert, and what is known of each patch."""
    columns = max(map(len, patches), default=0)
    if columns == 0:
        return None
    height, width = next(own for own in patches if own)[0].pixels.shape[:2]
    sheet = np.zeros((len(patches), height, columns, width, 3), np.uint8)
    for row, own in enumerate(patches):
        for column, patch in enumerate(own):
            sheet[row, :, column] = patch.pixels
    return {
        "sheet": _webp(sheet.reshape(len(patches) * height, columns * width, 3), lossless=True),
        "patch": [height, width],
        "columns": columns,
        "patches": [[[p.sample, p.row, p.column, _numbers(p.weight)] for p in own] for own in patches],
    }


def _image_source(pixels: np.ndarray) -> str:
    image = Image.fromarray(pixels)
    exact = max(image.size) <= EXACT_SIDE
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return f"data:image/webp;base64,{_webp(np.asarray(image), lossless=exact)}"


def _webp(pixels: np.ndarray, lossless: bool) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", lossless=lossless, quality=60 if lossless else 80)
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


def _part(name: str) -> str:
    return files("vmoe.inspection").joinpath(name).read_text(encoding="utf-8")
