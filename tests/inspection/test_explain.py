import numpy as np
import pytest
import torch
from PIL import Image

import vmoe
from vmoe.evaluation.loaded_model import load_model
from vmoe.inspection import explain as logic
from vmoe.inspection.results import TokenRouting
from vmoe.inspection.style import DROPPED, PALETTE
from vmoe.models.factory import save_pretrained


def make_image(width=64, height=48):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def new_model(tmp_path, name, class_names=None, **kwargs):
    torch.manual_seed(0)
    model = vmoe.create_model(name, depth=4, num_heads=2, **kwargs)
    extra = None if class_names is None else {"class_names": class_names}
    save_pretrained(model, tmp_path / "model.safetensors", extra)
    return load_model(str(tmp_path / "model.safetensors"), "cpu")


@pytest.fixture(scope="module")
def limoe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("limoe")
    return new_model(folder, "limoe_tiny_patch8_48", width=32, embed_dim=16, num_experts=4)


@pytest.fixture
def tight_vmoe(tmp_path):
    """A classifier that drops patches."""
    settings = {"embed_dim": 32, "num_classes": 3, "num_experts": 4, "num_selected_experts": 2}
    return new_model(tmp_path, "vmoe_tiny_patch8_48", ["a", "b", "c"], eval_capacity_factor=0.3, **settings)


def routing(expert, weight, kept):
    return TokenRouting(np.array(expert), np.array(weight, dtype=np.float32), np.array(kept))


# Two rows, three columns, two choices each.
GRID = routing(
    [[[0, 1], [1, 2], [2, 0]], [[1, 0], [1, 2], [0, 2]]],
    [[[0.6, 0.2], [0.5, 0.3], [0.9, 0.1]], [[0.4, 0.3], [0.8, 0.1], [0.7, 0.2]]],
    [[[True, True], [False, True], [True, False]], [[False, False], [True, True], [True, True]]],
)
LAYER = logic.Layer("blocks.1.mlp", "block 1", 4, per_token=True, soft=False)


def test_labels_are_separated_by_lines_and_commas():
    assert logic.parse_labels(" cat, dog\n\nguide dog ,\nbird") == ["cat", "dog", "guide dog", "bird"]
    with pytest.raises(ValueError, match="at least one label"):
        logic.parse_labels(" ,\n ")


def test_image_text_model_as_zero_shot_classify_and_the_record_have_it(limoe):
    found = logic.explain(limoe, make_image(), ["cat", "dog"], ["a {}", "the {}"])
    expected = vmoe.zero_shot_classify(limoe.model, limoe.tokenizer, make_image(), ["cat", "dog"], ["a {}", "the {}"])
    with pytest.raises(ValueError, match="given twice: 'cat'"):
        logic.explain(limoe, make_image(), ["cat", "dog", "cat"])
    assert [name for name, _ in found.probabilities] == ["cat", "dog"]
    assert [value for _, value in found.probabilities] == pytest.approx(expected[0].tolist(), abs=1e-6)
    layers = logic.list_layers(limoe)
    assert [(layer.name, layer.title, layer.num_experts) for layer in layers] == [
        ("blocks.1.mlp", "block 1", 4),
        ("blocks.3.mlp", "block 3", 4),
    ]
    with torch.no_grad(), vmoe.record_routing(limoe.model) as record:
        limoe.model.encode_image(limoe.transform(make_image())[None])
    for layer, patches in zip(layers, found.sample.patches, strict=True):
        recorded = record.layers[layer.name]
        assert (patches.expert.reshape(36, -1) == recorded.tokens(recorded.expert_index)[0].numpy()).all()


def test_text_tokens_of_a_label(limoe):
    tokens, by_layer = logic.route_text(limoe, "guide dog", ["a photo of a {}", "the {}"])
    assert tokens == ["<start_of_text>", "a", "photo", "of", "a", "guide", "dog", "<end_of_text>"]
    with torch.no_grad(), vmoe.record_routing(limoe.model) as record:
        limoe.model.encode_text(limoe.tokenizer(["a photo of a guide dog"]))
    for name, own in by_layer.items():
        recorded = record.layers[name]
        assert (own.expert == recorded.tokens(recorded.expert_index)[0, :8].numpy()).all()
    assert list(by_layer) == ["blocks.1.mlp", "blocks.3.mlp"]


def test_classifier_with_its_own_names(tight_vmoe):
    found = logic.explain(tight_vmoe, make_image())
    with torch.no_grad():
        expected = tight_vmoe.model(tight_vmoe.transform(make_image())[None]).softmax(1)[0]
    assert dict(found.probabilities) == pytest.approx(dict(zip("abc", expected.tolist(), strict=True)), abs=1e-6)
    load = logic.expert_loads(logic.list_layers(tight_vmoe)[0], found.sample.patches[0])
    assert (load["number"] + load["dropped"]).sum() == 2 * 36
    assert load["dropped"].sum() > 0


def test_a_classifier_without_names_and_without_experts(tmp_path):
    dense = new_model(tmp_path, "vmoe_tiny_patch8_48", embed_dim=32, num_classes=2, num_experts=0)
    found = logic.explain(dense, make_image())
    assert [name for name, _ in found.probabilities] == ["class 0", "class 1"]
    assert found.sample is None
    assert logic.list_layers(dense) == []


def test_two_towers_have_layers_of_one_modality(tmp_path):
    tower = {"depth": 2, "num_heads": 2, "num_experts": 2, "moe_layers": [1]}
    torch.manual_seed(0)
    model = vmoe.create_model(
        "two_tower_tiny_patch8_48",
        image={"embed_dim": 32, **tower},
        text={"width": 32, **tower},
        embed_dim=16,
    )
    save_pretrained(model, tmp_path / "model.safetensors")
    towers = load_model(str(tmp_path / "model.safetensors"), "cpu")
    image_layer, text_layer = logic.list_layers(towers)
    assert image_layer.title != text_layer.title
    found = logic.explain(towers, make_image(), ["cat", "dog"])
    assert found.sample.patches[0].expert.shape[:2] == (6, 6)
    assert found.sample.patches[1] is None
    assert list(logic.route_text(towers, "cat")[1]) == [text_layer.name]


def test_images_that_do_not_fit_are_refused(limoe):
    for size, match in (((1, 500), "sides beyond"), ((20_000, 20_000), "pixels, more than")):
        with pytest.raises(ValueError, match=match):
            logic.explain(limoe, Image.new("1", size), ["cat", "dog"])


def test_a_pixel_of_the_map_belongs_to_the_patch_drawn_there():
    image = np.full((20, 30, 3), 255, dtype=np.uint8)
    drawn = np.asarray(logic.draw_map(image, GRID, 4))
    width, height = logic.map_size(image)
    assert drawn.shape == (height, width, 3) == (427, 640, 3)
    first = GRID.best_kept
    assert first.tolist() == [[0, 2, 2], [-1, 1, 0]]
    for row in range(2):
        for column in range(3):
            # The quarter point of a patch: beside its number.
            x, y = (column + 0.25) * width / 3, (row + 0.25) * height / 2
            assert logic.patch_at(x, y, (2, 3), (width, height)) == (row, column)
            if first[row, column] >= 0:  # dropped patches are hatched
                colour = tuple(int(PALETTE[first[row, column]][i : i + 2], 16) for i in (1, 3, 5))
                assert np.abs(drawn[int(y), int(x)].astype(int) - colour).max() <= 2
    assert logic.patch_at(640, 427, (2, 3), (width, height)) == (1, 2)
    framed = np.asarray(logic.draw_map(image, GRID, 4, (1, 2)))
    changed = np.argwhere((framed != drawn).any(-1))
    assert changed.min(0).tolist() > [height // 2 - 10, 2 * width // 3 - 10]


def test_experts_of_a_patch():
    assert logic.patch_experts(GRID, 0, 1) == [
        (1, pytest.approx(0.5), False),
        (2, pytest.approx(0.3), True),
    ]
    with pytest.raises(ValueError, match="no patch in row 2, column 0: rows are 0 to 1, columns 0 to 2"):
        logic.patch_experts(GRID, 2, 0)
    with pytest.raises(ValueError, match="no patch in row 0, column -1"):
        logic.patch_experts(GRID, 0, -1)
    assert "No expert took it" in logic.patch_html(1, 2, [])


def test_load_counts_what_had_capacity():
    load = logic.expert_loads(LAYER, GRID)
    assert load["number"].tolist() == [2, 2, 4, 0]
    assert load["dropped"].tolist() == [2, 2, 0, 0]
    assert load["share"].tolist() == [0.25, 0.25, 0.5, 0]
    assert load["mean weight"].tolist()[1::2] == pytest.approx([(0.2 + 0.8) / 2, 0])
    assert "<td>4</td><td>50.0%</td>" in logic.loads_html({"patches": load})


def test_load_of_a_soft_layer_is_the_sum_of_weights():
    everyone = routing([[[0, 1], [1, 0]]], [[[0.75, 0.25], [0.5, 0.5]]], np.ones((1, 2, 2), dtype=bool))
    load = logic.expert_loads(LAYER._replace(per_token=False, soft=True, num_experts=2), everyone)
    assert load["number"].tolist() == [1.25, 0.75]
    assert load["share"].tolist() == [0.625, 0.375]


def test_text_tokens_are_coloured_by_the_first_expert_with_capacity():
    first_column = [array[[0, 1, 0], 0] for array in (GRID.expert, GRID.weight, GRID.kept)]
    tokens, colours = logic.colour_tokens(["a", "b", "c"], TokenRouting(*first_column))
    assert tokens == [("a", "0 (0.60), 1 (0.20)"), ("b", "dropped"), ("c", "0 (0.60), 1 (0.20)")]
    assert colours == {"0 (0.60), 1 (0.20)": PALETTE[0], "dropped": DROPPED}


def test_html_escapes_names_and_say_what_is_left_out():
    bars = logic.bars_html([(f"<b>{i}</b>", 1 / 30) for i in range(30)])
    assert "<b>" not in bars
    assert "&lt;b&gt;0&lt;/b&gt;" in bars
    assert bars.count("3.33%</td>") == 20
    assert "10 less likely ones are not shown" in bars
    assert bars.index("b&gt;0") < bars.index("b&gt;1")
    ranked = logic.bars_html([("cat", 0.25), ("dog", 0.75)])
    assert ranked.index("dog") < ranked.index("cat")


def test_numbers_on_every_colour_are_readable():
    def luminance(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    for expert, colour in enumerate(PALETTE):
        ink = 1.0 if "color:#ffffff" in logic.chip(expert) else 0.0
        light, dark = sorted((luminance(colour), ink), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, colour


def test_expert_choice_and_soft_models(tmp_path):
    for router in ("expert_choice", "soft"):
        loaded = new_model(tmp_path, "vmoe_tiny_patch8_48", embed_dim=32, num_classes=2, num_experts=4, router=router)
        found = logic.explain(loaded, make_image())
        layer = logic.list_layers(loaded)[0]
        load = logic.expert_loads(layer, found.sample.patches[0])
        assert load["share"].sum() == pytest.approx(1)
        assert not load["dropped"].any()
        experts = logic.patch_experts(found.sample.patches[0], 0, 0)
        weights = [weight for _, weight, _ in experts]
        assert weights == sorted(weights, reverse=True)
        assert all(kept for *_, kept in experts)


def test_classes_of_one_name_stay_apart_and_missing_names_are_told(tmp_path):
    settings = {"embed_dim": 32, "num_classes": 3, "num_experts": 0}
    found = logic.explain(
        new_model(tmp_path, "vmoe_tiny_patch8_48", ["crane", "crane", "dog"], **settings), make_image()
    )
    assert [name for name, _ in found.probabilities] == ["crane", "crane", "dog"]
    assert sum(value for _, value in found.probabilities) == pytest.approx(1)
    few = new_model(tmp_path, "vmoe_tiny_patch8_48", ["a", "b"], **settings)
    with pytest.raises(ValueError, match="model.safetensors names 2 classes, but the model has 3 outputs"):
        logic.explain(few, make_image())
    with pytest.raises(ValueError, match="the class names in .*model.safetensors must be a list of texts, got"):
        logic.explain(new_model(tmp_path, "vmoe_tiny_patch8_48", [1, 2, 3], **settings), make_image())
