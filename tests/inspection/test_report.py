"""The file that `write_report` makes; what a browser makes of it is in test_report_page.py."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from vmoe.inspection import report
from vmoe.inspection.report import report_data, write_report

MEGABYTE = 1e6


def smooth_images(number, side, seed=0):
    """(number, side, side, 3) uint8 with the detail of photographs: strong at large scales, weak at small ones."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    frequency[0, 0] = 1
    spectrum = np.fft.fft2(rng.normal(size=(number, 3, side, side))) / frequency
    images = np.fft.ifft2(spectrum).real
    images -= images.min(axis=(2, 3), keepdims=True)
    images *= 255 / images.max(axis=(2, 3), keepdims=True)
    return images.transpose(0, 2, 3, 1).astype(np.uint8)


def unpacked(packed):
    """What the page reads: JavaScript's typed arrays have NumPy's types of the same name."""
    dtype = np.dtype(packed["kind"].removesuffix("Array").lower()).newbyteorder("<")
    return np.frombuffer(base64.b64decode(packed["data"]), dtype)


@pytest.fixture
def images_once(monkeypatch):
    """Images that repeat are encoded once."""
    encode, known = report._image_source, {}
    monkeypatch.setattr(report, "_image_source", lambda p: known.get(id(p)) or known.setdefault(id(p), encode(p)))


def test_200_images_in_twelve_layers_stay_below_15_megabytes(example_statistics, tmp_path, images_once):
    one = example_statistics(
        num_layers=1, num_experts=64, num_selected_experts=2, num_images=10, grid=14, side=224, num_classes=1000
    )
    for sample, image in zip(one.samples, smooth_images(10, 224), strict=True):
        sample.image, sample.patches, sample.text = image, sample.patches * 12, sample.text * 12
    own = [patch for patches in one.layers[0].typical_patches for patch in patches]
    one.layers[0].typical_patches = [(own * 16)[:16]] * 64
    one.layers[0].expert_token = {f"word {i}": np.arange(64) for i in range(2000)}
    statistics = dataclasses.replace(
        one, layers=one.layers * 12, samples=one.samples * 20, sample_index=list(range(200)), agreement={}
    )
    size = write_report(statistics, tmp_path / "report.html").stat().st_size
    assert 5 * MEGABYTE < size < 15 * MEGABYTE, f"{size / MEGABYTE:.1f} MB"


def large_statistics(example_statistics):
    """Noisy images of 384 px with 24 × 24 patches, 12 layers of 64 experts; 200 images that repeat eight."""
    rng = np.random.default_rng(0)
    one = example_statistics(num_layers=1, num_experts=64, num_selected_experts=8, num_images=8, grid=24, side=384)
    for sample in one.samples:
        sample.image = rng.integers(0, 256, (384, 384, 3), np.uint8)
        sample.patches, sample.text = sample.patches * 12, sample.text * 12
    layer = one.layers[0]
    layer.router = "expert_choice"
    own = [patch for patches in layer.typical_patches for patch in patches]
    for patch in own:
        patch.pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
    layer.typical_patches = [(own * 16)[:16]] * 64
    return dataclasses.replace(one, layers=[layer] * 12, samples=one.samples * 25, sample_index=list(range(200)))


def test_a_report_that_grows_too_large_shows_fewer_images_and_says_so(example_statistics, tmp_path, images_once):
    statistics, told = large_statistics(example_statistics), io.StringIO()
    file = write_report(statistics, tmp_path / "report.html", Console(file=told, width=200))
    assert 13 * MEGABYTE < file.stat().st_size < 15 * MEGABYTE
    data = json.loads(re.search(r'id="data">(.*?)</script>', file.read_text("utf-8"), re.S).group(1))
    shown = len(data["samples"])
    assert 24 <= shown < data["num_samples_given"] == 200
    assert f"the report shows {shown} of 200 images" in told.getvalue()
    gaps = np.diff(data["sample_index"])
    assert data["sample_index"][0] == 0
    assert data["sample_index"][-1] == 199
    assert gaps.max() - gaps.min() <= 1
    for layer in data["layers"]:
        assert len(unpacked(layer["patches"]["expert"])) == shown * 24 * 24 * layer["patches"]["shown"]


def first_image(statistics):
    source = report_data(statistics)["samples"][0]["source"]
    return Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/webp;base64,"))))


def test_large_images_are_shown_smaller_and_small_ones_lose_nothing(example_statistics):
    assert first_image(example_statistics(side=384, num_images=1)).size == (224, 224)
    statistics = example_statistics(side=48)
    np.testing.assert_array_equal(np.asarray(first_image(statistics).convert("RGB")), statistics.samples[0].image)


def test_the_same_statistics_give_the_same_file_which_asks_for_nothing_from_outside(example_statistics, tmp_path):
    first = write_report(example_statistics(), tmp_path / "a" / "report.html")
    second = write_report(example_statistics(), tmp_path / "b.html")
    assert first == tmp_path / "a" / "report.html"
    assert first.read_bytes() == second.read_bytes()
    assert [path.name for path in first.parent.iterdir()] == ["report.html"]
    html = first.read_text("utf-8")
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", html)
    assert "default-src 'none'" in html


@pytest.mark.parametrize("num_experts", [8, 300])
def test_routing_is_packed_without_loss(example_statistics, num_experts):
    statistics = example_statistics(num_experts=num_experts, num_selected_experts=2)
    layer = report_data(statistics)["layers"][1]
    for kind, routings in (
        ("patches", [sample.patches[1] for sample in statistics.samples]),
        ("text", [sample.text[1] for sample in statistics.samples]),
    ):
        packed = layer[kind]
        expert, number = unpacked(packed["expert"]).reshape(-1, 2), unpacked(packed["weight"]).reshape(-1, 2)
        np.testing.assert_array_equal(expert, np.concatenate([r.expert.reshape(-1, 2) for r in routings]))
        np.testing.assert_array_equal(number >> 15 == 1, np.concatenate([r.kept.reshape(-1, 2) for r in routings]))
        weight = np.concatenate([r.weight.reshape(-1, 2) for r in routings])
        np.testing.assert_allclose((number & 0x7FFF) / 10_000, weight, atol=0.5001e-4)


def test_tables_are_packed_without_loss(example_statistics):
    statistics = example_statistics()
    first, second = statistics.layers
    first.expert_class = first.expert_class * 100_000
    second.expert_class = second.expert_class + 0.25
    for layer, data in zip(statistics.layers, report_data(statistics)["layers"], strict=True):
        np.testing.assert_array_equal(unpacked(data["expert_class"]).reshape(8, -1), layer.expert_class)
        words = unpacked(data["token_expert"]).reshape(-1, 8)
        np.testing.assert_array_equal(words, [layer.expert_token[word] for word in data["text_tokens"]])


def test_where_experts_choose_the_largest_weights_of_a_token_are_kept(example_statistics):
    statistics = example_statistics(num_experts=8, num_selected_experts=8, num_images=2)
    for layer in statistics.layers:
        layer.router = "expert_choice"
    routing = statistics.samples[0].patches[0]
    routing.weight[...] = np.where(routing.kept, routing.weight, 0)
    packed = report_data(statistics)["layers"][0]["patches"]
    number = unpacked(packed["weight"]).reshape(-1, packed["shown"])[0]
    largest = np.sort(routing.weight[0, 0])[::-1][: packed["shown"]]
    np.testing.assert_allclose((number & 0x7FFF) / 10_000, largest, atol=0.5001e-4)


def test_a_figure_that_does_not_exist_is_null(example_statistics):
    statistics = example_statistics()
    statistics.agreement["text"][0, 1] = np.nan
    statistics.layers[0].entropy["text"] = float("nan")
    data = json.loads(json.dumps(report_data(statistics), allow_nan=False))
    assert data["agreement"]["text"][0][1] is None
    assert data["layers"][0]["entropy"]["text"] is None


def test_weights_that_are_none_are_an_error(example_statistics):
    statistics = example_statistics()
    statistics.samples[0].patches[0].weight[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"weights of blocks\.1\.mlp must be in 0\.\.1"):
        report_data(statistics)


def test_the_right_name_is_told_by_its_class_not_by_its_text(example_statistics):
    statistics = example_statistics()
    first, second, third = statistics.samples[:3]
    first.label, first.top_classes, first.top_labels = 0, [("crane", 0.7), ("crane", 0.2)], [3, 0]
    second.top_labels = []
    third.label = None
    assert [sample["right"] for sample in report_data(statistics)["samples"]] == [1, None, None, 0, 0, 0]
