from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vmoe
from vmoe.data import build_transform
from vmoe.evaluation.loaded_model import LoadedModel
from vmoe.inspection import style
from vmoe.inspection.forward import patch_grid
from vmoe.inspection.maps import example_figure, shorten
from vmoe.inspection.routing_statistics import route_images
from vmoe.models.factory import preprocess_config


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    monkeypatch.setattr(style, "DPI", 50)


TINY = {"depth": 2, "num_heads": 2}
NAMES = [f"class {i}" for i in range(6)]


def samples(count):
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 255, (count, 48, 64, 3), dtype=np.uint8)
    return [SimpleNamespace(image=Image.fromarray(p), label=i % 6 if i else None) for i, p in enumerate(pixels)]


def test_classifier_with_class_token_and_dropped_patches(tmp_path):
    model = timm.create_model("vmoe_tiny_patch8_48", num_classes=6, embed_dim=32, eval_capacity_factor=0.5, **TINY)
    file = example_figure(model, samples(3), NAMES, None, tmp_path / "new" / "examples.png")
    assert file.exists()
    assert [path.name for path in file.parent.iterdir()] == ["examples.png"]
    assert Image.open(file).width > 300


def test_contrastive_and_dense(tmp_path):
    model = vmoe.create_model("limoe_tiny_patch8_48", width=32, embed_dim=16, **TINY)
    tokenizer = vmoe.get_tokenizer(model)
    sparse = example_figure(model, samples(2), NAMES, tokenizer, tmp_path / "sparse.png")
    dense = vmoe.create_model("limoe_tiny_patch8_48", width=32, embed_dim=16, num_experts=0, **TINY)
    plain = example_figure(dense, samples(2), NAMES, tokenizer, tmp_path / "dense.png")
    assert Image.open(plain).width < Image.open(sparse).width  # no columns of routing


def test_the_best_expert_with_capacity_is_drawn():
    model = timm.create_model(
        "vmoe_tiny_patch8_48", num_classes=6, embed_dim=32, num_selected_experts=2, eval_capacity_factor=0.4, **TINY
    ).eval()
    transform = build_transform(preprocess_config(model), None)
    loaded = LoadedModel(model, None, transform, torch.device("cpu"), "float32", "it", Path())
    images = [sample.image for sample in samples(2)]
    found = route_images(loaded, images, class_names=NAMES)
    with vmoe.record_routing(model) as record:
        model(torch.stack([transform(image) for image in images]))
    assert [len(one.top_classes) for one in found] == [5, 5]
    assert all(set(one.top_labels) <= set(range(6)) for one in found)
    routing = record.layers["blocks.1.mlp"]
    kept, chosen = routing.tokens(routing.kept)[:, 1:], routing.tokens(routing.expert_index)[:, 1:]
    best = np.stack([one.patches[0].best_kept.reshape(36) for one in found])
    for b in range(2):
        for patch in range(36):
            allowed = [int(e) for e, k in zip(chosen[b, patch], kept[b, patch]) if k]
            assert best[b, patch] == (allowed[0] if allowed else -1)
    assert (best == -1).any()


def test_mistakes_are_named(tmp_path):
    model = timm.create_model("vmoe_tiny_patch8_48", num_classes=6, embed_dim=32, **TINY)
    with pytest.raises(ValueError, match="model has 6 classes, but 2 names"):
        example_figure(model, samples(1), ["a", "b"], None, tmp_path / "x.png")
    with pytest.raises(ValueError, match="at least one sample"):
        example_figure(model, [], NAMES, None, tmp_path / "x.png")
    with pytest.raises(ValueError, match="cannot arrange 40 tokens"):
        patch_grid(model, 40)


def test_long_names_keep_both_ends():
    assert shorten("short", 10) == "short"
    assert shorten("a very long name indeed", 11) == "a ver…ndeed"
