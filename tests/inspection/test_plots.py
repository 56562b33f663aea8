"""The figures show the numbers of the statistics: looked up in the drawn objects, not in pixels."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image

from vmoe.inspection import style
from vmoe.inspection.information import contributions, most_informative
from vmoe.inspection.maps import draw_maps
from vmoe.inspection.plots import load_figure, patch_figure, split_figure, write_figures
from vmoe.inspection.results import TokenRouting


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    monkeypatch.setattr(style, "DPI", 50)


def map_figure(statistics):
    layers = {layer.name: layer.num_experts for layer in statistics.layers}
    return draw_maps(statistics.samples, layers, statistics.class_names)


def test_figures_are_written_and_those_of_an_earlier_inspection_go(example_statistics, tmp_path):
    for name in ("patches_visual.blocks.3.mlp.png", "mine.png"):
        (tmp_path / name).touch()
    files = write_figures(example_statistics(num_experts=2, num_images=2), tmp_path)
    names = {"load.png", "split.png", "patches_blocks.1.mlp.png", "patches_blocks.3.mlp.png"}
    assert {file.name for file in files} == names
    assert {file.name for file in tmp_path.iterdir()} == {*names, "mine.png"}
    assert all(min(Image.open(file).size) > 50 for file in files)
    statistics = example_statistics(num_layers=1, num_experts=2, text=False)
    statistics.layers[0].typical_patches = [[], []]
    assert [file.name for file in write_figures(statistics, tmp_path)] == ["load.png"]
    assert {file.name for file in tmp_path.iterdir()} == {"load.png", "mine.png"}


def test_load_bars_are_shares_of_the_assignments(example_statistics):
    statistics = example_statistics()
    panels = [(layer, modality) for layer in statistics.layers for modality in ("image", "text")]
    for ax, (layer, modality) in zip(load_figure(statistics).axes, panels, strict=True):
        asked, kept = layer.asked[modality], layer.kept[modality]
        for bars, number in zip(ax.containers, (kept, asked - kept), strict=True):
            assert [bar.get_height() for bar in bars] == pytest.approx(number / asked.sum())
        assert f"dropped {layer.share_dropped[modality]:.1%}" in ax.get_title(loc="right")


def test_split_bars_are_shares_of_each_expert(example_statistics):
    statistics = example_statistics()
    for ax, layer in zip(split_figure(statistics).axes, statistics.layers):
        image, text = layer.kept["image"], layer.kept["text"]
        for bars, kept in zip(ax.containers, (image, text), strict=True):
            assert [bar.get_height() for bar in bars] == pytest.approx(kept / np.maximum(image + text, 1))


def test_most_informative_names_are_those_that_differ_from_the_whole():
    names = ["even", "third", "first", "second", "none"]
    table = np.array([[10, 10, 10], [0, 0, 30], [30, 0, 0], [0, 30, 0], [0, 0, 0]]).T
    p = table / table.sum()
    pairs = [(e, c) for e, c in np.ndindex(*p.shape) if p[e, c] > 0]
    information = sum(p[e, c] * np.log(p[e, c] / (p[e].sum() * p[:, c].sum())) for e, c in pairs)
    assert contributions(table).sum() == pytest.approx(information)
    assert most_informative(table, names, 1, 5) == [{"name": "second", "share_of_name": 1.0, "share_of_expert": 0.75}]
    assert contributions(np.zeros((2, 3))).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_patches_are_drawn_in_their_order_beside_their_expert(example_statistics):
    layer = example_statistics(num_images=20).layers[0]
    layer.typical_patches[7] = []
    share_E = layer.kept["image"] / layer.kept["image"].sum()
    for e, (ax, own) in enumerate(zip(patch_figure(layer).axes, layer.typical_patches, strict=True)):
        assert ax.get_title(loc="left") == f"expert {e} · {share_E[e]:.1%} of the patches"
        assert to_rgb(ax.spines["left"].get_edgecolor()) == to_rgb(style.PALETTE[e])
        assert [text.get_text() for text in ax.texts] == ([] if own else ["no patch"])
        for index, patch in enumerate(own):  # of 12 pixels, with gaps of 1; eight side by side
            top, left = index // 8 * 13, index % 8 * 13 + 1
            drawn = np.asarray(ax.images[0].get_array())[top : top + 12, left : left + 12]
            assert (drawn == patch.pixels).all()


def test_maps_show_the_best_expert_that_had_capacity(example_statistics):
    expert = np.array([[[3, 1], [2, 0]], [[1, 2], [0, 3]]])
    kept = np.array([[[True, True], [False, True]], [[False, False], [True, False]]])
    assert TokenRouting(expert, expert * 0.1, kept).best_kept.tolist() == [[3, 0], [-1, 0]]
    statistics = example_statistics(num_images=8)
    figure = map_figure(statistics)
    assert len(figure.axes) == 8 * (2 + 2)  # eight images, each with its names and a map for both layers
    shown = [text.get_text() for text in figure.texts]
    assert statistics.class_names[0] in shown
    assert shown.count("block 1") == shown.count("block 3") == 2


@pytest.mark.parametrize("experts", [4, 40])
def test_legend_and_names_stay_inside_the_figure(example_statistics, experts):
    statistics = example_statistics(num_layers=6, num_experts=experts, num_images=2, grid=3)
    statistics.class_names = ["a very long name " * 20] * 5
    figure = map_figure(statistics)
    figure.draw_without_rendering()
    width, height = figure.bbox.size
    for box in [figure.legends[0].get_window_extent(), *(text.get_window_extent() for text in figure.texts)]:
        assert 0 <= box.x0 <= box.x1 <= width
        assert 0 <= box.y0 <= box.y1 <= height


def test_awkward_characters_are_drawn_without_a_word(example_statistics, tmp_path, recwarn):
    """A dollar sign begins no formula, and a character that the font lacks is no warning."""
    statistics = example_statistics(num_experts=4, num_layers=1, num_images=2)
    statistics.class_names = [r"US$ and HK$ or $\frac$ 猫"] * 5
    figure = map_figure(statistics)
    style.save_figure(figure, tmp_path / "x.png")
    awkward = [text for text in figure.findobj(Text) if "$" in text.get_text()]
    assert len(awkward) >= 2
    assert not any(text.get_parse_math() for text in awkward)
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_layer_titles_are_unique():
    assert style.layer_titles(["blocks.1.mlp", "blocks.3.mlp"]) == ["block 1", "block 3"]
    towers = ["visual.blocks.1.mlp", "text.blocks.1.mlp"]
    assert style.layer_titles(towers) == towers
