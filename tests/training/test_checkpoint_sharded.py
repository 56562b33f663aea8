"""Checkpoints written and read on meshes of 4 processes: all of what reshard.py found, in one start of processes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import vmoe
from vmoe.evaluation.loaded_model import weights_fingerprint
from vmoe.export.weights import export
from vmoe.models.serialization import StoredTensors, WeightsError, find_weights

MESHES = ["2 copies, ep 2", "ep 4", "fsdp 2, ep 2", "ddp"]


@pytest.fixture(scope="module")
def root(forks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reshard")
    forks.run(Path(__file__).with_name("reshard.py"), [str(folder)], folder / "output.txt")
    return folder


@pytest.fixture(scope="module")
def processes(root):
    """What each of the 4 processes found."""
    return json.loads((root / "processes.json").read_text())


@pytest.fixture(scope="module")
def alone(root):
    """What one process found in what they wrote."""
    return json.loads((root / "alone.json").read_text())


@pytest.mark.parametrize("mesh", MESHES)
def test_each_mesh_continues_bit_by_bit_what_another_wrote(processes, alone, mesh):
    assert all(found["loads"][mesh] for found in processes)
    assert alone["loads"][mesh]


@pytest.mark.parametrize("mesh", MESHES)
def test_a_model_is_made_from_what_any_mesh_wrote(alone, mesh):
    assert alone["models"][mesh]
    assert alone["whole"][mesh] == ["ema.safetensors" if mesh == "ddp" else "ema"]


def test_shards_have_a_fingerprint_and_become_one_file(root, tmp_path):
    weights = find_weights(root / "ep 4")
    before = weights_fingerprint(weights)
    copy = shutil.copytree(weights, tmp_path / "copy")
    assert weights_fingerprint(copy) == before
    last = max(copy.iterdir())
    last.write_bytes(last.read_bytes()[:-1] + b"x")
    assert weights_fingerprint(copy) != before
    for raw, name in ((False, "ema"), (True, "model")):
        assert export(root / "ep 4", tmp_path / "model.safetensors", raw).name == name
        first, second = (
            vmoe.create_model(pretrained=each) for each in (tmp_path / "model.safetensors", weights.parent / name)
        )
        assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


def test_a_shard_that_is_gone_is_an_error_where_there_is_no_manifest(root, tmp_path):
    copy = shutil.copytree(find_weights(root / "ep 4"), tmp_path / "ema")
    min(copy.glob("shard-*")).unlink()
    with pytest.raises(WeightsError, match="its shards do not make the whole of|missing from the file"):
        vmoe.create_model(pretrained=copy)


@pytest.mark.parametrize(
    ("parts", "wrong"),
    [
        ([((0, 0), (4, 2)), ((0, 2), (4, 4))], False),
        ([((0, 0), (4, 2)), ((0, 2), (2, 4)), ((2, 2), (2, 4))], False),
        ([((0, 0), (4, 6)), ((0, 0), (4, 6))], False),  # written twice
        ([((0, 0), (0, 6)), ((0, 2), (4, 4)), ((0, 0), (4, 2))], False),
        ([((0, 0), (4, 2)), ((0, 1), (4, 2)), ((0, 4), (4, 2))], True),  # as many elements, but not all of them
        ([((0, 0), (1, 6)), ((0, 3), (2, 3)), ((2, 0), (2, 6))], True),
        ([((2, 0), (2, 6)), ((-2, 0), (2, 6))], True),
    ],
)
def test_shards_with_gaps_are_refused(tmp_path, parts, wrong):
    whole = torch.arange(24.0).view(4, 6)
    for number, ((row, column), size) in enumerate(parts, start=1):
        piece = whole[max(row, 0) :, column:][: size[0], : size[1]].clone()
        assert piece.shape == size
        info = json.dumps({"x": {"saved_offsets": [row, column]}})
        save_file({"x": piece}, tmp_path / f"shard-{number:05d}-model.safetensors", {"DCP_SHARDING_INFO": info})
    if wrong:
        with pytest.raises(WeightsError, match="its shards do not make the whole of x"):
            StoredTensors(tmp_path)
    else:
        assert torch.equal(StoredTensors(tmp_path).read("x"), whole)


def test_the_files_of_a_checkpoint(processes):
    files = processes[0]["files"]
    assert files["ddp"] == [
        "ema.safetensors",
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "trainer.json",
    ]
    shards = [f"shard-0000{number}-model-00001-of-00001.safetensors" for number in (1, 2, 3, 4)]
    assert files["ep 4"] == [
        "ema/settings.json",
        *(f"ema/{shard}" for shard in shards),
        "manifest.json",
        "model/settings.json",
        *(f"model/{shard}" for shard in shards),
        *(f"optimizer/{shard}" for shard in shards),
        "trainer.json",
    ]


def test_an_optimizer_without_tensors(processes):
    assert all(found["sgd"] for found in processes)


def test_all_processes_skip_a_damaged_checkpoint_and_one_says_so(processes):
    assert [found["latest"] for found in processes] == ["step_000001"] * 4
    (warning,) = processes[0]["warnings"]
    assert "step_000002 is damaged (model/shard-00004-model-00001-of-00001.safetensors does not have" in warning
    assert [found["warnings"] for found in processes[1:]] == [[], [], []]
    assert all("step_000002 is damaged: model/shard-00004" in found["damaged"] for found in processes)


@pytest.mark.parametrize("writer", ["full in torch", "full in ours"])
def test_a_disk_that_is_full_for_one_process_is_an_error_in_all(processes, writer):
    assert all("step_000003: the disk is full; free some space" in found[writer] for found in processes)


def test_state_that_cannot_be_split_is_an_error(processes):
    assert all("SGD's state 'rows' of" in found["rows"] for found in processes)


def test_nothing_is_left_of_checkpoints_that_failed(processes):
    assert processes[0]["left"] == ["step_000001", "step_000002"]
