import pytest
import torch

import vmoe
from vmoe.data.texts import warn_once
from vmoe.evaluation.loaded_model import load_model
from vmoe.evaluation.zero_shot import cached_classes, encode_classes
from vmoe.models.factory import save_pretrained

NAMES = ["cat", "dog", "fox"]
TEMPLATES = ["{}", "a {}"]


@pytest.fixture
def make_loaded(tmp_path):
    def make(seed=0, **settings):
        file = tmp_path / f"model{seed}.safetensors"
        if not file.exists():
            torch.manual_seed(seed)
            model = vmoe.create_model("limoe_tiny_patch8_48", depth=2, width=32, num_heads=2, embed_dim=16)
            save_pretrained(model, file)
        return load_model(str(file), "cpu", **settings)

    return make


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("VMOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "zero_shot"


@pytest.fixture
def encodings(monkeypatch):
    """How often the text side was really encoded."""
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return encode_classes(*arguments)

    monkeypatch.setattr("vmoe.evaluation.zero_shot.encode_classes", counted)
    return calls


def test_the_second_time_nothing_is_encoded(make_loaded, folder, encodings):
    loaded = make_loaded()
    with torch.no_grad():
        expected = encode_classes(loaded.model, loaded.tokenizer, NAMES, TEMPLATES, "cpu")
    first = cached_classes(loaded, NAMES, TEMPLATES)
    again = cached_classes(make_loaded(), NAMES, TEMPLATES)
    assert len(encodings) == 1
    assert torch.equal(first, again)
    assert torch.equal(first, expected)
    assert not first.requires_grad
    assert len(list(folder.iterdir())) == 1


def test_whatever_changes_the_embeddings_changes_the_key(make_loaded, folder, encodings):
    loaded = make_loaded()
    cached_classes(loaded, NAMES, TEMPLATES)
    cached_classes(loaded, NAMES[::-1], TEMPLATES)
    cached_classes(loaded, NAMES, TEMPLATES[:1])
    cached_classes(make_loaded(seed=1), NAMES, TEMPLATES)
    cached_classes(make_loaded(precision="bf16"), NAMES, TEMPLATES)
    cached_classes(loaded._replace(tokenizer=vmoe.get_tokenizer(loaded.model, context_length=8)), NAMES, TEMPLATES)
    next(m for m in loaded.model.modules() if isinstance(m, vmoe.SparseMoE)).eval_capacity_factor = 0.5
    cached_classes(loaded, NAMES, TEMPLATES)
    assert len(encodings) == len(list(folder.iterdir())) == 7


def test_the_cache_repeats_the_warning_of_cut_prompts(make_loaded, folder, encodings, caplog):
    names = ["cat", "a dog " * 20]
    for _ in range(2):
        cached_classes(make_loaded(), names, TEMPLATES)
        assert caplog.text.count("2 of 4 prompts are longer than the model's context and are cut") == 1
        caplog.clear()
        warn_once.cache_clear()  # another process
    assert len(encodings) == 1


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "folder"])
def test_a_broken_file_is_written_anew(make_loaded, folder, encodings, damage, caplog):
    loaded = make_loaded()
    first = cached_classes(loaded, NAMES, TEMPLATES)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    if damage == "folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes({"cut": whole[:-5], "empty": b"", "other": b"\x80\x04N."}[damage])
    assert torch.equal(cached_classes(loaded, NAMES, TEMPLATES), first)
    assert len(encodings) == 2
    assert str(file) in caplog.text
    if damage != "folder":
        assert torch.equal(cached_classes(loaded, NAMES, TEMPLATES), first)
        assert len(encodings) == 2


def test_a_folder_that_cannot_be_written_costs_only_time(make_loaded, tmp_path, monkeypatch, encodings, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("VMOE_CACHE", str(tmp_path / "file"))
    loaded = make_loaded()
    assert torch.equal(cached_classes(loaded, NAMES), cached_classes(loaded, NAMES))
    assert len(encodings) == 2
    assert "cannot be written" in caplog.text
