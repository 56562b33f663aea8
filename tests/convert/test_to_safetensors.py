"""The command, the files that it writes, and the released checkpoints by name."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from timm.data import resolve_model_data_config

import vmoe
from benchmarks import convert as benchmark
from tests.convert.golden import GOLDEN, close, load, part
from tests.convert.write_sharded import write_arrays
from vmoe.cli.convert import main
from vmoe.convert import RELEASED, CheckpointError, convert_checkpoint, from_reference, pretrained_cfg, to_reference
from vmoe.convert.layout import reference_layout
from vmoe.convert.settings import model_settings
from vmoe.models.factory import create_model, create_model_and_transforms, read_pretrained_metadata, save_pretrained

CONFIG = GOLDEN / "vmoe_k2_vanilla.json"
SHARDED, ORBAX = GOLDEN / "vmoe_checkpoint" / "vmoe_tiny", GOLDEN / "vmoe_checkpoint_orbax"
needs_tensorstore = pytest.mark.skipif(
    importlib.util.find_spec("tensorstore") is None, reason="needs the convert extra"
)


@pytest.fixture
def checkpoint(tiny, tmp_path):
    """A sharded checkpoint of a small model and its config in a file."""
    _, config, arrays = tiny
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_arrays(tmp_path / "c", arrays, rows=2)
    return tmp_path


def run(folder, *more):
    source, config = str(folder / "c"), str(folder / "config.json")
    return main(["--from", source, "--config", config, "--to", str(folder / "out.safetensors"), *more])


@pytest.mark.parametrize("source", [SHARDED, pytest.param(ORBAX, marks=needs_tensorstore)], ids=["sharded", "orbax"])
def test_golden_checkpoints(source, tmp_path, capsys):
    file = tmp_path / "deep" / "vmoe.safetensors"
    assert main(["--from", str(source), "--config", str(CONFIG), "--to", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "read     74 arrays, 248,488 bytes" in printed
    assert f'create_model_and_transforms(pretrained="{file}")' in printed
    assert ("1 others skipped" in printed) == (source == ORBAX)
    _, figures = load("vmoe_k2_vanilla")
    images = torch.tensor(figures["images_nhwc"]).permute(0, 3, 1, 2)
    model, _, _ = create_model_and_transforms(pretrained=file)
    with torch.no_grad():
        close(model(images), figures["logits"], "logits")
    back = to_reference(model)
    assert all(np.array_equal(back[name], array) for name, array in part(figures, "params/").items())


def test_file_is_what_save_pretrained_writes(tiny, checkpoint, tmp_path):
    assert run(checkpoint) == 0
    save_pretrained(from_reference(*tiny[1:]), tmp_path / "saved.safetensors")
    with safe_open(checkpoint / "out.safetensors", "pt") as ours, safe_open(tmp_path / "saved.safetensors", "pt") as by:
        assert set(ours.keys()) == set(by.keys())
        assert all(torch.equal(ours.get_tensor(name), by.get_tensor(name)) for name in by.keys())  # noqa: SIM118
    metadata = [read_pretrained_metadata(tmp_path / name) for name in ("out.safetensors", "saved.safetensors")]
    assert metadata[0].pop("extra") == {"converted_from": "c"}
    assert metadata[1].pop("extra") == {}
    assert metadata[0] == metadata[1]


def test_the_optimizer_of_a_training_checkpoint_is_skipped(tiny, checkpoint, capsys):
    _, config, arrays = tiny
    nested = {f"params/{name}": array for name, array in arrays.items()}
    nested |= {f"opt_state/0/mu/{name}": np.zeros_like(array) for name, array in arrays.items()}
    nested |= {"step": np.zeros((), np.float32)}
    write_arrays(checkpoint / "ckpt_7", nested)
    write_arrays(checkpoint / "ckpt_9", nested)
    done = convert_checkpoint(checkpoint / "ckpt", {"model": config, "seed": 0}, checkpoint / "out.safetensors")
    assert (done.arrays, done.skipped) == (len(arrays), len(arrays) + 1)
    assert done.source.endswith("ckpt_9")
    assert convert_checkpoint(checkpoint / "ckpt", config, checkpoint / "out.safetensors", step=7).source[-1] == "7"


def test_bfloat16_and_another_image_size(tiny, checkpoint):
    model, config, arrays = tiny
    bits = {
        name: (np.ascontiguousarray(array).view(np.uint32) >> 16).astype(np.uint16) for name, array in arrays.items()
    }
    write_arrays(checkpoint / "half", bits, dtype="bfloat16")
    convert_checkpoint(checkpoint / "half", config, checkpoint / "out.safetensors", image_size=32)
    read = create_model(pretrained=checkpoint / "out.safetensors")
    torch.testing.assert_close(read.head.weight, model.head.weight, rtol=1e-2, atol=0)
    assert read.pos_embed.shape == (1, 17, 16)


def test_two_towers(tmp_path):
    config, figures = load("two_tower_bias")
    write_arrays(tmp_path / "c", part(figures, "params/"))
    convert_checkpoint(tmp_path / "c", config, tmp_path / "out.safetensors")
    model, _, _ = create_model_and_transforms(pretrained=tmp_path / "out.safetensors")
    with torch.no_grad():
        close(model.encode_text(torch.tensor(figures["texts"]), normalize=True), figures["ztxt"], "ztxt")
    with pytest.raises(ValueError, match="which timm does not know; use vmoe.create_model"):
        pretrained_cfg(tmp_path / "out.safetensors")


def test_settings_go_over_those_of_the_file(tiny, checkpoint):
    assert run(checkpoint) == 0
    file = checkpoint / "out.safetensors"
    images = torch.randn(6, 3, 16, 16)
    limited, free = (
        create_model_and_transforms(pretrained=file, **settings)[0]
        for settings in ({}, {"eval_capacity_factor": float("inf"), "group_size": 10_000})
    )
    with torch.no_grad():
        assert not torch.equal(limited(images), free(images))
        torch.testing.assert_close(free(images)[:2], free(images[:2]))


# --- timm ------------------------------------------------------------------------------------------------------------


def test_timm_needs_nothing_but_the_file(tiny, checkpoint):
    assert run(checkpoint) == 0
    file, images = checkpoint / "out.safetensors", torch.randn(5, 3, 16, 16)
    config = pretrained_cfg(file)
    with torch.no_grad():
        wanted = tiny[0](images)
        for kwargs in ({"pretrained_cfg": config}, {"pretrained_cfg_overlay": {"file": str(file)}}):
            model = timm.create_model(config["architecture"], pretrained=True, **kwargs).eval()
            assert torch.equal(model(images), wanted)
            assert resolve_model_data_config(model)["input_size"] == (3, 16, 16)
        # Another head and another size, as with any of timm's models.
        other = timm.create_model(config["architecture"], pretrained=True, pretrained_cfg=config, num_classes=7)
        assert other(images).shape == (5, 7)
        assert torch.equal(other.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
        larger = timm.create_model(config["architecture"], pretrained=True, pretrained_cfg=config, img_size=32)
        assert larger(torch.randn(1, 3, 32, 32)).shape == (1, 3)


def test_timm_makes_the_model_of_the_file(tiny, checkpoint, caplog):
    assert run(checkpoint) == 0
    overlay = {"file": str(checkpoint / "out.safetensors")}
    model = timm.create_model("softmoe_tiny_patch8_48", pretrained=True, pretrained_cfg_overlay=overlay)
    assert model.embed_dim == 16
    assert "that is made, not softmoe_tiny_patch8_48" in caplog.text


# --- errors write nothing --------------------------------------------------------------------------------------------


def cut_last_shard(folder):
    file = folder / "c.data-00002-of-00003"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_last_shard, "c.data-00002-of-00003 is truncated"),
        (lambda folder: (folder / "c.data-00001-of-00003").unlink(), "c.data-00001-of-00003 is missing"),
        (lambda folder: (folder / "c.index").unlink(), "no checkpoint at"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not a readable JSON file"),
        (lambda folder: (folder / "config.json").write_text('{"model": null}'), "model must be a dictionary, got None"),
        (lambda folder: (folder / "config.json").unlink(), "--config must be a JSON file or one of"),
        (
            lambda folder: (folder / "config.json").write_text(
                (folder / "config.json").read_text().replace('"num_experts": 3', '"num_experts": 4')
            ),
            "does not fit the config: .*Mlp/Dense_0/kernel has shape",
        ),
    ],
)
def test_errors_are_one_sentence_and_write_nothing(checkpoint, capsys, damage, message):
    (checkpoint / "out.safetensors").write_text("precious")
    damage(checkpoint)
    before = sorted(path.name for path in checkpoint.iterdir())
    assert run(checkpoint) == 1
    error = capsys.readouterr().err
    assert error.startswith("vmoe-convert: error: ")
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert (checkpoint / "out.safetensors").read_text() == "precious"
    assert sorted(path.name for path in checkpoint.iterdir()) == before


def test_a_file_that_shrinks_while_it_is_read_leaves_nothing(tiny, checkpoint, monkeypatch):
    import vmoe.convert.to_safetensors as files

    opened = files.open_checkpoint

    def open_then_cut(*args):
        result = opened(*args)
        for number in range(3):
            file = checkpoint / f"c.data-{number:05d}-of-00003"
            file.write_bytes(file.read_bytes()[:200])
        return result

    with pytest.raises(ValueError, match=r"out.bin must end with \.safetensors"):
        convert_checkpoint(checkpoint / "c", tiny[1], checkpoint / "out.bin")
    monkeypatch.setattr(files, "open_checkpoint", open_then_cut)
    before = sorted(path.name for path in checkpoint.iterdir())
    with pytest.raises(CheckpointError, match="was cut short"):
        convert_checkpoint(checkpoint / "c", tiny[1], checkpoint / "out.safetensors")
    assert sorted(path.name for path in checkpoint.iterdir()) == before


# --- released checkpoints --------------------------------------------------------------------------------------------


def count(width, depth, sparse, patch, size, classes, representation):
    """Parameters of a V-MoE with 8 experts."""
    tokens = (size // patch) ** 2 + 1
    mlp = 8 * width**2 + 5 * width
    block = 4 * (width**2 + width) + 4 * width
    total = patch**2 * 3 * width + width + (tokens + 1) * width + 2 * width
    total += depth * block + (depth - sparse) * mlp + sparse * 8 * (mlp + width)
    return total + representation * (width**2 + width) + classes * (width + 1)


PARAMETERS = {
    "vmoe_s32_last2_ilsvrc2012_randaug_light1": count(512, 8, 2, 32, 224, 1000, 1),
    "vmoe_s32_last2_ilsvrc2012_randaug_light1_ft_ilsvrc2012": count(512, 8, 2, 32, 384, 1000, 0),
    "vmoe_s32_last2_ilsvrc2012_randaug_medium": count(512, 8, 2, 32, 224, 1000, 1),
    "vmoe_b16_imagenet21k_randaug_strong": count(768, 12, 6, 16, 224, 21843, 0),
    "vmoe_b16_imagenet21k_randaug_strong_ft_ilsvrc2012": count(768, 12, 6, 16, 384, 1000, 0),
    "eee_s32_last2_ilsvrc2012": count(512, 8, 2, 32, 224, 1000, 1),
    "eee_s32_last2_ilsvrc2012_ft_cifar100": count(512, 8, 2, 32, 128, 100, 1),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_structure(name):
    released = RELEASED[name]
    size = released.preprocess["input_size"][1]
    sizes = {"cifar100": 128, "ilsvrc2012": 384}
    assert size == released.config["image_size"] == (sizes[name.rpartition("_")[2]] if "_ft_" in name else 224)
    model_name, kwargs = model_settings(released.config, {})
    with torch.device("meta"):
        model = create_model(model_name, **kwargs, pretrained_cfg_overlay=released.preprocess)
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == PARAMETERS[name]
    assert model_name == ("vmoe_small_patch32_224" if "s32" in name else "vmoe_base_patch16_224")
    shapes = {
        theirs: entry.view(np.empty(tuple(model.state_dict()[entry.tensor].shape), np.float32)).shape
        for theirs, entry in reference_layout(model).items()
    }
    width, last = (512, 7) if "s32" in name else (768, 11)
    block = f"Encoder/encoderblock_{last}"
    assert shapes[f"{block}/Moe/Mlp/Dense_0/kernel"] == (8, width, 4 * width)
    assert shapes[f"{block}/Moe/Router/dense/kernel"] == ((width, 2, 4) if name.startswith("eee") else (width, 8))
    assert shapes[f"{block}/SelfAttention/query/kernel"] == (width, width // 64, 64)
    assert f"Encoder/encoderblock_{last - 1}/Mlp/Dense_0/kernel" in shapes
    patch = released.config["patch_size"][0]
    assert shapes["Encoder/posembed_input/pos_embedding"] == (1, (size // patch) ** 2 + 1, width)


def test_a_released_name_gives_the_published_preprocessing(tmp_path, monkeypatch):
    # The published architecture is too large for a quick test; its preprocessing is not.
    name = "vmoe_s32_last2_ilsvrc2012_randaug_light1_ft_ilsvrc2012"
    small = json.loads(json.dumps(RELEASED[name].config))
    small |= {"hidden_size": 16, "num_classes": 3}
    small["encoder"] |= {"num_layers": 2, "mlp_dim": 16, "num_heads": 2}
    small["encoder"]["moe"] |= {"layers": [1]}
    monkeypatch.setitem(RELEASED, name, RELEASED[name]._replace(config=small))
    _, kwargs = model_settings(small, {})
    arrays = to_reference(create_model("vmoe_base_patch16_224", **kwargs))
    write_arrays(tmp_path / "c", arrays)
    file = tmp_path / "out.safetensors"
    assert main(["--from", str(tmp_path / "c"), "--config", name, "--to", str(file)]) == 0
    model, _, transform = create_model_and_transforms(pretrained=file)
    sides = [step.size for step in transform.transforms if hasattr(step, "size")]
    assert (384, 384) in [tuple(np.atleast_1d(side)) for side in sides]  # squashed, not cropped
    config = resolve_model_data_config(model)
    assert (config["crop_mode"], config["crop_pct"], config["interpolation"]) == ("squash", 1.0, "bilinear")
    assert (config["mean"], config["std"]) == ((0.5,) * 3, (0.5,) * 3)
    model = timm.create_model(
        pretrained_cfg(file)["architecture"], pretrained=True, pretrained_cfg=pretrained_cfg(file)
    )
    assert resolve_model_data_config(model)["crop_mode"] == "squash"


# --- what it needs ---------------------------------------------------------------------------------------------------


IN_A_FRESH_PROCESS = """
import pickle, sys
from pathlib import Path
import vmoe.models.factory
from benchmarks.convert import convert

pickle.loads = pickle.load = pickle.Unpickler = None
convert(Path(sys.argv[1]))
bad = {"jax", "flax", "tensorflow", "orbax", "tensorstore"} & sys.modules.keys()
assert not bad, bad
"""


@pytest.mark.slow
def test_memory_stays_small_and_neither_jax_nor_tensorflow_nor_pickle_is_used(tmp_path):
    """The short form of benchmarks/convert.py, with many arrays: only one passes through the memory at a time."""
    config = benchmark.config_of(16)  # of which the experts' two arrays in each of 12 blocks have 4.5 MiB
    config["encoder"]["num_layers"] = 12
    config["encoder"]["moe"]["layers"] = list(range(12))
    (tmp_path / "synthetic.json").write_text(json.dumps(config))
    mebibytes = benchmark.write(config, tmp_path / "synthetic") / 2**20
    assert mebibytes >= 100
    command, root = [sys.executable, "-c", IN_A_FRESH_PROCESS, str(tmp_path)], Path(__file__).parents[2]
    done = subprocess.run(command, check=True, timeout=240, cwd=root, stdout=subprocess.PIPE, text=True)
    memory = json.loads(done.stdout.splitlines()[-1])
    # Beyond what importing takes: two copies and the pages of one array, never the whole model once more.
    assert memory["peak"] - memory["start"] < 0.5 * mebibytes
    assert vmoe.create_model(pretrained=tmp_path / "synthetic.safetensors").embed_dim == config["hidden_size"]
