"""The figures show the numbers of the statistics: looked up in the drawn objects, not in pixels."""

import dataclasses

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image

from vmoe.inspection import plots
from vmoe.inspection.accumulate import contributions, most_telling, telling_of_expert
from vmoe.inspection.plots import (
    PALETTE,
    _image_name,
    _tell_missing_glyphs,
    agreement_figure,
    class_figure,
    load_figure,
    patch_figure,
    routing_figure,
    split_figure,
    word_figure,
    write_figures,
)
from vmoe.inspection.results import TokenRouting


def texts(figure):
    own = [text.get_text() for text in figure.texts] + [figure.get_suptitle()]
    return own + [text.get_text() for ax in figure.axes for text in (*ax.texts, ax.title, ax._left_title)]


def heights(ax, place):
    """Heights of the bars of a container."""
    return [bar.get_height() for bar in ax.containers[place]]


def test_all_figures_are_written(example_statistics, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "DPI", 60)
    files = write_figures(example_statistics(num_experts=4, num_images=2), tmp_path / "new")
    assert sorted(file.name for file in files) == sorted(file.name for file in (tmp_path / "new").iterdir())
    per_layer = [f"{kind}_blocks.{b}.mlp.png" for b in (1, 3) for kind in ("classes", "words", "patches")]
    assert {file.name for file in files} == {"load.png", "split.png", "agreement.png", "routing.png", *per_layer}
    assert all(min(Image.open(file).size) > 120 for file in files)


def test_what_a_model_does_not_have_is_not_drawn(example_statistics, tmp_path):
    statistics = example_statistics(num_layers=1, text=False)
    statistics = dataclasses.replace(statistics, samples=[], class_names=None)
    layer = dataclasses.replace(statistics.layers[0], expert_class=None, typical_patches=[[]] * 8)
    files = write_figures(dataclasses.replace(statistics, layers=[layer]), tmp_path)
    assert [file.name for file in files] == ["load.png"]


def test_load_bars_are_shares_of_the_assignments(example_statistics):
    statistics = example_statistics()
    figure = load_figure(statistics)
    assert len(figure.axes) == 4
    for ax, (layer, modality) in zip(figure.axes, [(own, m) for own in statistics.layers for m in ("image", "text")]):
        asked = layer.asked[modality]
        assert heights(ax, 0) == pytest.approx(layer.kept[modality] / asked.sum())
        assert heights(ax, 1) == pytest.approx((asked - layer.kept[modality]) / asked.sum())
        assert f"dropped {layer.share_dropped[modality]:.1%}" in ax._right_title.get_text()
    assert any("Capacity factor 1, important tokens first." in text for text in texts(figure))


def test_the_capacity_is_named(example_statistics):
    statistics = example_statistics()

    def note(**changes):
        layers = [dataclasses.replace(layer, **changes) for layer in statistics.layers]
        return " ".join(texts(load_figure(dataclasses.replace(statistics, layers=layers))))

    assert "No capacity limit." in note(eval_capacity_factor=None)
    assert "capacity is fixed" in note(capacity=8)
    assert "Soft routing drops nothing." in note(router="soft")
    assert "tokens that none took" in note(router="expert_choice")


def test_split_bars_are_shares_of_each_expert(example_statistics):
    statistics = example_statistics()
    figure = split_figure(statistics)
    for ax, layer in zip(figure.axes, statistics.layers):
        image, text = layer.kept["image"], layer.kept["text"]
        assert heights(ax, 0) == pytest.approx(image / np.maximum(image + text, 1))
        assert heights(ax, 1) == pytest.approx(text / np.maximum(image + text, 1))


def test_agreement_is_written_into_the_squares(example_statistics):
    statistics = example_statistics(num_layers=3)
    statistics.agreement["text"][0, 1] = statistics.agreement["text"][1, 0] = np.nan
    figure = agreement_figure(statistics)
    image, text = figure.axes[:2]
    assert [own.get_text() for own in image.texts] == ["1.00", "0.25", "0.25", "0.25", "1.00", *["0.25"] * 3, "1.00"]
    assert [own.get_text() for own in text.texts][:3] == ["1.00", "–", "0.25"]


def test_heat_map_rows_are_shares_and_the_choice_of_classes_is_told(example_statistics):
    statistics = example_statistics(num_classes=40, num_images=40)
    layer = statistics.layers[0]
    figure = class_figure(layer, statistics.class_names)
    top, ax = figure.axes[:2]
    shown = [label.get_text() for label in ax.get_yticklabels()]
    assert len(shown) == 30
    drawn = np.asarray(ax.images[0].get_array())
    assert drawn.sum(1) == pytest.approx(1)
    for row, name in zip(drawn, shown, strict=True):
        own = layer.expert_class[:, statistics.class_names.index(name)]
        assert row == pytest.approx(own / own.sum())
    even = np.asarray(top.images[0].get_array())[0]
    assert even == pytest.approx(layer.expert_class.sum(1) / layer.expert_class.sum())
    assert any("The 30 of 40 classes that say most" in text for text in texts(figure))
    few = example_statistics()
    assert any("All 5 classes" in text for text in texts(class_figure(few.layers[0], few.class_names)))
    words = [label.get_text() for label in word_figure(few.layers[0]).axes[1].get_yticklabels()]
    assert set(words) == set(few.layers[0].expert_word)


def test_most_telling_are_those_that_differ_from_the_whole():
    names = ["even", "third", "first", "second", "none"]
    table = np.array([[10, 10, 10], [0, 0, 30], [30, 0, 0], [0, 30, 0], [0, 0, 0]]).T
    assert most_telling(table, 3) == [2, 3, 1]  # sorted by their expert
    assert most_telling(table, 9) == [2, 0, 3, 1]  # what never occurs is left out
    assert contributions(table).sum() == pytest.approx(_mutual_information(table))
    assert telling_of_expert(table, names, 1, 5) == [("second", 1.0, 0.75)]
    assert contributions(np.zeros((2, 3))).tolist() == [[0, 0, 0], [0, 0, 0]]


def _mutual_information(table):
    p = table / table.sum()
    pairs = [(e, c) for e, c in np.ndindex(*p.shape) if p[e, c] > 0]
    return sum(p[e, c] * np.log(p[e, c] / (p[e].sum() * p[:, c].sum())) for e, c in pairs)


def test_patches_are_drawn_in_their_order_beside_their_expert(example_statistics):
    layer = example_statistics().layers[0]
    figure = patch_figure(layer)
    drawn = [np.asarray(ax.images[0].get_array()) for ax in figure.axes]
    expected = [patch.pixels for own in layer.typical_patches for patch in own]
    assert len(drawn) == len(expected)
    assert all((one == other).all() for one, other in zip(drawn, expected))
    swatches = [artist.get_facecolor()[:3] for artist in figure.artists + figure.patches if artist is not figure.patch]
    assert [to_rgb(PALETTE[e]) for e in range(8)] == [s for s in swatches if s in [to_rgb(c) for c in PALETTE]]
    share = layer.kept["image"][0] / layer.kept["image"].sum()
    assert f"expert 0 · {share:.1%} of the patches" in texts(figure)
    assert texts(figure).count("no patch") == sum(not own for own in layer.typical_patches)


def test_maps_show_the_best_expert_with_room(example_statistics):
    expert = np.array([[[3, 1], [2, 0]], [[1, 2], [0, 3]]])
    kept = np.array([[[True, True], [False, True]], [[False, False], [True, False]]])
    assert TokenRouting(expert, expert * 0.1, kept).best_kept.tolist() == [[3, 0], [-1, 0]]
    statistics = example_statistics(num_images=20)
    figure = routing_figure(statistics)
    assert len(figure.axes) == 8 * (1 + 2)  # eight pictures, each with a map for both layers
    shown = texts(figure)
    first = statistics.samples[0]
    assert any(text.startswith(first.caption) for text in shown)
    assert shown.count("block 1") == shown.count("block 3") == 2


@pytest.mark.parametrize("experts", [4, 40])
def test_legend_and_names_stay_inside_the_figure(example_statistics, experts):
    statistics = example_statistics(num_layers=6, num_experts=experts, num_images=3)
    for sample in statistics.samples:
        sample.caption = "a very long caption " * 20
    figure = routing_figure(statistics)
    figure.draw_without_rendering()
    width, height = figure.bbox.size
    boxes = [figure.legends[0].get_window_extent(), *(text.get_window_extent() for text in figure.texts)]
    for box in boxes:
        assert box.x0 >= 0
        assert box.x1 <= width
        assert box.y0 >= 0
        assert box.y1 <= height


AWKWARD = r"US$ and HK$ or $\frac$"  # no formula, and none that can be drawn


def test_a_dollar_sign_is_a_dollar_sign(example_statistics, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "DPI", 50)
    statistics = example_statistics(num_experts=4, num_layers=1, num_images=2)
    for sample in statistics.samples:
        sample.caption = AWKWARD
    layer = statistics.layers[0]
    layer.expert_word = {f"{word} {AWKWARD}": counts for word, counts in layer.expert_word.items()}
    names = [f"{name} {AWKWARD}" for name in statistics.class_names]
    write_figures(dataclasses.replace(statistics, class_names=names), tmp_path)
    drawn = [class_figure(layer, names), word_figure(layer), routing_figure(statistics)]
    awkward = [text for figure in drawn for text in figure.findobj(Text) if "$" in text.get_text()]
    assert len(awkward) >= 5 + 5 + 2
    assert not any(text.get_parse_math() for text in awkward)


def test_characters_without_a_glyph_are_told_once(example_statistics, tmp_path, monkeypatch, caplog, recwarn):
    monkeypatch.setattr(plots, "DPI", 50)
    _tell_missing_glyphs.cache_clear()
    statistics = example_statistics(num_experts=4, num_images=2)
    for sample in statistics.samples:
        sample.caption = "猫と犬"
    names = [f"{name} 猫" for name in statistics.class_names]
    write_figures(dataclasses.replace(statistics, class_names=names), tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        "in the figures, characters that the font DejaVu Sans does not have are drawn as boxes"
    ]
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_figures_of_an_earlier_inspection_go(example_statistics, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "DPI", 50)
    stale = ["split.png", "classes_blocks.9.mlp.png", "words_blocks.1.mlp.png", "patches_visual.blocks.3.mlp.png"]
    for name in [*stale, "mine.png", "notes.txt"]:
        (tmp_path / name).touch()
    files = write_figures(example_statistics(num_layers=1, num_images=1, text=False), tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {*(file.name for file in files), "mine.png", "notes.txt"}


def test_right_or_wrong_is_told_by_the_place_of_the_class(example_statistics):
    sample = example_statistics(text=False).samples[0]
    names = ["crane", "crane", "dog"]  # a bird and a machine
    sample.caption, sample.label, sample.top_classes = None, 0, [("crane", 0.7)]
    sample.top_labels = [1]
    assert _image_name(sample, names, 60) == "crane (model: crane 70%)"
    sample.top_classes, sample.top_labels = [("crane bird", 0.7)], [0]  # the name in prompts
    assert _image_name(sample, names, 60) == "crane"


def test_layers_that_are_not_compared_are_named(example_statistics):
    statistics = dataclasses.replace(example_statistics(), agreement_left_out={"image": ["blocks.3.mlp"]})
    assert any(
        "Not compared, for they see other tokens: block 3." in text for text in texts(agreement_figure(statistics))
    )
