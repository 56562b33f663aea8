from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vmoe
from vmoe.inspection.example_plot import example_figure, patch_grid, patch_routing, predict, shorten

TINY = {"depth": 2, "num_heads": 2}
NAMES = [f"class {i}" for i in range(6)]


def samples(count):
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 255, (count, 48, 64, 3), dtype=np.uint8)
    return [SimpleNamespace(image=Image.fromarray(p), label=i % 6 if i else None) for i, p in enumerate(pixels)]


def test_classifier_with_class_token_and_dropped_patches(tmp_path):
    model = timm.create_model("vmoe_tiny_patch8_48", num_classes=6, embed_dim=32, eval_capacity_factor=0.5, **TINY)
    file = example_figure(model, samples(3), NAMES, None, tmp_path / "new" / "examples.png", title="Examples")
    assert file.exists()
    assert [path.name for path in file.parent.iterdir()] == ["examples.png"]
    assert Image.open(file).width > 800


def test_contrastive_and_dense(tmp_path):
    model = vmoe.create_model("limoe_tiny_patch8_48", width=32, embed_dim=16, **TINY)
    tokenizer = vmoe.get_tokenizer(model)
    sparse = example_figure(model, samples(2), NAMES, tokenizer, tmp_path / "sparse.png")
    dense = vmoe.create_model("limoe_tiny_patch8_48", width=32, embed_dim=16, num_experts=0, **TINY)
    plain = example_figure(dense, samples(2), NAMES, tokenizer, tmp_path / "dense.png")
    assert Image.open(plain).width < Image.open(sparse).width  # no columns of routing


def test_patches_are_coloured_by_what_was_recorded():
    model = timm.create_model("vmoe_tiny_patch8_48", num_classes=6, embed_dim=32, num_selected_experts=2, **TINY).eval()
    images = torch.randn(3, 3, 48, 48)
    probabilities, layers = predict(model, images, NAMES, None)
    assert probabilities.shape == (3, 6)
    with vmoe.record_routing(model) as record:
        model(images)
    routing = record.layers["blocks.1.mlp"]
    first_choice = routing.tokens(routing.expert_index)[:, 1:, 0].reshape(3, 6, 6)
    assert layers[0].name == "blocks.1.mlp"
    assert (layers[0].expert == first_choice.numpy()).all()


def test_dropped_everywhere_is_minus_one_and_second_choices_count():
    model = timm.create_model(
        "vmoe_tiny_patch8_48", num_classes=6, embed_dim=32, num_selected_experts=2, eval_capacity_factor=0.4, **TINY
    ).eval()
    with vmoe.record_routing(model) as record:
        model(torch.randn(2, 3, 48, 48))
    routing = record.layers["blocks.1.mlp"]
    found = patch_routing(model, routing, "blocks.1.mlp").expert.reshape(2, 36)
    kept, chosen = routing.tokens(routing.kept)[:, 1:], routing.tokens(routing.expert_index)[:, 1:]
    for b in range(2):
        for patch in range(36):
            allowed = [int(e) for e, k in zip(chosen[b, patch], kept[b, patch]) if k]
            assert found[b, patch] == (allowed[0] if allowed else -1)
    assert (found == -1).any()


def test_mistakes_are_named(tmp_path):
    model = timm.create_model("vmoe_tiny_patch8_48", num_classes=6, embed_dim=32, **TINY)
    with pytest.raises(ValueError, match="model has 6 classes, but 2 names"):
        example_figure(model, samples(1), ["a", "b"], None, tmp_path / "x.png")
    with pytest.raises(ValueError, match="at least one sample"):
        example_figure(model, [], NAMES, None, tmp_path / "x.png")
    with pytest.raises(ValueError, match="cannot place 40 tokens"):
        patch_grid(model, 40)


def test_long_names_keep_both_ends():
    assert shorten("short", 10) == "short"
    assert shorten("a very long name indeed", 11) == "a ver…ndeed"


def test_a_dollar_sign_in_a_name_is_no_formula(tmp_path):
    model = timm.create_model("vmoe_tiny_patch8_48", num_classes=6, embed_dim=32, **TINY)
    names = [rf"{i} US$ and HK$ or $\frac$" for i in range(6)]
    assert example_figure(model, samples(2), names, None, tmp_path / "x.png").exists()
