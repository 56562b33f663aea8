"""Any bytes of a checkpoint changed, where no manifest tells: what is loaded is what the files hold, all of it, or one
sentence says what is wrong."""

import json
import shutil

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import vmoe
from vmoe.models.manifest import MANIFEST, describe_files, write_manifest
from vmoe.models.serialization import StoredTensors, WeightsError
from vmoe.training.checkpoint import Checkpointer, CheckpointError, load_checkpoint

from .bounds import damaged, damaged_tree, fuzz, outcome

SETTINGS = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 2, "num_experts": 2}
PIECES = (b'"dtype":"F32"', b'"shape":[', b"9" * 30, b'"data_offsets":[0,', b'{"', b"[" * 50, b'"tensor"', b"1e999")
FILES = ("model.safetensors", "optimizer.safetensors", "trainer.json")


def build():
    torch.manual_seed(0)
    model = vmoe.create_model("vmoe_tiny_patch8_48", num_classes=3, moe_layers="every1", **SETTINGS)
    return model, torch.optim.AdamW(model.parameters())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with an undamaged checkpoint, and a path for a damaged copy."""
    model, optimizer = build()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    root = tmp_path_factory.mktemp("saved")
    folder = Checkpointer(root, 1).save(1, model, None, optimizer, {"step": 1}, {"class_names": ["a", "b", "c"]})
    return folder, root / "damaged", build()


def copy_of(saved):
    shutil.rmtree(saved[1], ignore_errors=True)
    return shutil.copytree(saved[0], saved[1])


def sign(folder):
    """Makes a manifest that says that all is well."""
    files = [file.name for file in folder.iterdir() if file.name != MANIFEST]
    write_manifest(folder, {}, describe_files(folder, files))


def load_and_look(folder, model, optimizer):
    """Loads a checkpoint; all numbers must be those that safetensors itself reads."""
    assert isinstance(load_checkpoint(folder, model, None, optimizer), dict)
    for file, tensors in (
        ("model", model.state_dict()),
        ("optimizer", {f"{key}/{n}": v for n, p in model.named_parameters() for key, v in optimizer.state[p].items()}),
    ):
        stored = load_file(folder / f"{file}.safetensors")
        for name, tensor in tensors.items():
            if isinstance(tensor, torch.Tensor):
                wanted = stored[name].to(tensor.dtype)
                torch.testing.assert_close(tensor, wanted, rtol=0, atol=0, equal_nan=True, msg=f"{file} {name}")


def any_bytes_under_a_fitting_manifest(saved, data):
    folder = copy_of(saved)
    file = folder / data.draw(st.sampled_from(FILES))
    file.write_bytes(data.draw(damaged(file.read_bytes(), PIECES)))
    sign(folder)
    _, _, (model, optimizer) = saved
    outcome(lambda: load_and_look(folder, model, optimizer), (CheckpointError, WeightsError), megabytes=None)


test_any_bytes, test_many_bytes = fuzz(any_bytes_under_a_fitting_manifest, few=20, many=3000)


def any_change_of_the_trainers_state(saved, data):
    folder = copy_of(saved)
    content = json.loads((folder / "trainer.json").read_text())
    (folder / "trainer.json").write_text(json.dumps(data.draw(damaged_tree(content))))
    sign(folder)
    _, _, (model, optimizer) = saved
    outcome(lambda: load_and_look(folder, model, optimizer), (CheckpointError,), megabytes=None)


test_any_trainers_state, test_many_trainers_states = fuzz(any_change_of_the_trainers_state, few=20, many=3000)


def any_bytes_without_a_fitting_manifest(saved, data):
    """Then every change is found, in the manifest too."""
    folder = copy_of(saved)
    file = folder / data.draw(st.sampled_from([*FILES, MANIFEST]))
    before = file.read_bytes()
    file.write_bytes(data.draw(damaged(before, PIECES)))
    _, _, (model, optimizer) = saved
    found = outcome(lambda: load_checkpoint(folder, model, None, optimizer), (CheckpointError,))
    if file.read_bytes() == before:
        assert found == {"step": 1}
    else:
        assert f"is damaged: {file.name}" in found


test_any_bytes_are_found, test_many_bytes_are_found = fuzz(any_bytes_without_a_fitting_manifest, few=20, many=3000)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two shards of each matrix in a folder, as processes write them."""
    root = tmp_path_factory.mktemp("shards")
    whole = {"a": torch.arange(24.0).view(4, 6), "b": torch.arange(5.0)}
    (root / "whole").mkdir()
    for number in range(2):
        parts = {"a": whole["a"][2 * number : 2 * number + 2].clone(), "b": whole["b"][3 * number :][:3].clone()}
        info = {"a": {"saved_offsets": [2 * number, 0]}, "b": {"saved_offsets": [3 * number]}}
        file = root / "whole" / f"shard-0000{number + 1}-model-00001-of-00001.safetensors"
        save_file(parts, file, {"DCP_SHARDING_INFO": json.dumps(info)})
    assert all(torch.equal(StoredTensors(root / "whole").read(name), tensor) for name, tensor in whole.items())
    return root


def read_all(folder):
    """Reads all tensors; what was in memory before must not be seen in any."""
    stored = StoredTensors(folder)
    for name, shape in stored.shapes.items():
        dtype, found = stored.dtypes[name], []
        for fill in (0, 1):
            memory = torch.full((shape.numel() * dtype.itemsize,), fill, dtype=torch.uint8)
            stored.read_into({name: memory.view(dtype).view(shape)})
            found.append(memory)
        assert torch.equal(*found), f"{name} {shape} is not read in whole"


def any_bytes_of_shards(shards, data):
    folder = shards / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(shards / "whole", folder)
    file = data.draw(st.sampled_from(sorted(folder.iterdir())))
    pieces = (*PIECES, b'"a":', b"-2", b"saved_offsets", b"[1, 0]", b"[2]")
    file.write_bytes(data.draw(damaged(file.read_bytes(), pieces)))
    outcome(lambda: read_all(folder), (WeightsError,), megabytes=None)


test_any_bytes_of_shards, test_many_bytes_of_shards = fuzz(any_bytes_of_shards, few=40, many=10_000)
