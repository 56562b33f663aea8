import errno
import json
import os
import random
import shutil
import threading

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import vmoe
from vmoe.models import manifest, safetensors_writer
from vmoe.models.manifest import find_problems, list_checkpoints, step_of
from vmoe.models.serialization import WeightsError, find_weights
from vmoe.training import checkpoint as module
from vmoe.training.checkpoint import Checkpointer, CheckpointError, latest_checkpoint, load_checkpoint

from .conftest import TINY_VIT

FILES = ["ema.safetensors", "manifest.json", "model.safetensors", "optimizer.safetensors", "trainer.json"]


def build(**kwargs):
    return vmoe.create_model(
        "vmoe_tiny_patch8_48",
        num_classes=3,
        **{**TINY_VIT, "depth": 1, "moe_layers": "every1", "embed_dim": 8, **kwargs},
    )


def trained(model):
    """An optimizer after one step."""
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build()


@pytest.fixture
def optimizer(model):
    return trained(model)


def save(run, step, model, optimizer, keep_last=2, ema=None, trainer=None, **kwargs):
    checkpointer = Checkpointer(run, keep_last, **kwargs)
    folder = checkpointer.save(step, model, ema, optimizer, trainer or {"step": step}, {"class_names": ["a", "b", "c"]})
    checkpointer.wait()
    return folder


def steps(run):
    return [step_of(folder) for folder in list_checkpoints(run)]


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


# --- what is written is read -----------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(tmp_path, model, optimizer):
    ema = build()
    trainer = {"loss": 0.1 + 0.2, "best": float("nan"), "none": None, "evaluation": {"top1": 1}}
    folder = save(tmp_path, 12, model, optimizer, ema=ema, trainer=trainer)
    assert sorted(file.name for file in folder.iterdir()) == FILES
    loaded, loaded_ema = build(), build()
    again = torch.optim.AdamW([{"params": list(loaded.parameters())[::-1], "lr": 7.0}])
    state = load_checkpoint(folder, loaded, loaded_ema, again)
    assert repr(state) == repr(trainer)
    for source, target in ((model, loaded), (ema, loaded_ema)):
        for name, tensor in source.state_dict().items():
            assert torch.equal(tensor, target.state_dict()[name]), name
    assert again.param_groups[0]["lr"] == 1e-3
    assert again.param_groups[0]["betas"] == (0.9, 0.999)
    for ours, theirs in zip(model.parameters(), loaded.parameters()):  # by name, whatever the order in the groups
        before, after = optimizer.state[ours], again.state[theirs]
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert find_weights(tmp_path) == folder / "ema.safetensors"


def test_the_state_of_the_moment_is_written_while_training_goes_on(tmp_path, model, optimizer, monkeypatch):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    go, write = threading.Event(), module.write_tensors
    monkeypatch.setattr(module, "write_tensors", lambda *a: (go.wait(20), write(*a)))
    checkpointer = Checkpointer(tmp_path, 2, asynchronous=True)
    trainer = {"progress": {"step": 1}}
    folder = checkpointer.save(1, model, None, optimizer, trainer, {})
    trainer["progress"]["step"] = 2
    moment = optimizer.state[next(model.parameters())]["exp_avg"].clone()
    with torch.no_grad():
        for tensor in [*model.parameters(), *(state["exp_avg"] for state in optimizer.state.values())]:
            tensor.add_(1)
    assert not folder.exists()
    go.set()
    checkpointer.wait()
    assert all(torch.equal(before[name], tensor) for name, tensor in load_file(folder / "model.safetensors").items())
    name = next(name for name, _ in model.named_parameters())
    assert torch.equal(load_file(folder / "optimizer.safetensors")[f"exp_avg/{name}"], moment)
    assert load_checkpoint(folder, build(), None, None) == {"progress": {"step": 1}}


def test_both_ways_of_writing_give_the_same(tmp_path, model, optimizer):
    folders = [save(tmp_path / str(way), 1, model, optimizer, ema=model, asynchronous=way) for way in (False, True)]
    assert (folders[0] / "trainer.json").read_bytes() == (folders[1] / "trainer.json").read_bytes()
    for part in ("model", "ema", "optimizer"):
        first, second = (load_file(folder / f"{part}.safetensors") for folder in folders)
        assert list(first) == list(second)
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_error_in_the_background_is_raised_at_the_next_call(tmp_path, model, optimizer, monkeypatch):
    checkpointer = Checkpointer(tmp_path, 2, asynchronous=True)
    checkpointer.save(1, model, None, optimizer, {}, {})
    checkpointer.wait()
    monkeypatch.setattr(module, "write_tensors", _raiser(OSError(errno.ENOSPC, "No space left on device")))
    checkpointer.save(2, model, None, optimizer, {}, {})
    with pytest.raises(CheckpointError, match="step_000002: the disk is full; free some space"):
        checkpointer.save(3, model, None, optimizer, {}, {})
    monkeypatch.undo()
    checkpointer.save(4, model, None, optimizer, {}, {})
    checkpointer.wait()
    assert steps(tmp_path) == [1, 4]


def test_a_checkpoint_of_another_model_or_optimizer_is_refused_by_names_and_shapes(tmp_path, model, optimizer):
    folder = save(tmp_path, 1, model, optimizer)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(folder, build(embed_dim=16), None, None)
    for part in ("patch_embed.proj.weight", "(8, 3, 8, 8)", "(16, 3, 8, 8)"):
        assert part in str(error.value)
    with pytest.raises(CheckpointError, match="holds no moving average"):
        load_checkpoint(folder, model, build(), None)
    fewer = torch.optim.AdamW(list(model.parameters())[1:])
    with pytest.raises(CheckpointError, match=r"lacks '\w.*' \(one of 1\).*train\.freeze"):
        load_checkpoint(folder, model, None, fewer)


# --- damage ----------------------------------------------------------------------------------------------------------


def test_damage_to_any_file_is_found_named_and_skipped(tmp_path, model, optimizer, caplog):
    """100 flipped bytes and 60 cuts, in all files."""
    older = save(tmp_path, 1, model, optimizer, ema=model)
    newer = save(tmp_path, 2, model, optimizer, ema=model)
    assert latest_checkpoint(tmp_path) == newer
    whole, draw = contents(newer), random.Random(0)
    assert sorted(whole) == FILES
    for number in range(160):
        name = FILES[number % len(FILES)]
        content = bytearray(whole[name])
        offset = draw.randrange(len(content))
        if number < 100:
            content[offset] ^= draw.randrange(1, 256)
        else:
            del content[offset:]
        (newer / name).write_bytes(content)
        caplog.clear()
        if number % 4 == 0:
            assert latest_checkpoint(tmp_path) == older, (name, offset)
        elif number % 4 == 1:
            assert find_weights(tmp_path).parent == older, (name, offset)
        elif number % 4 == 2:
            with pytest.raises(CheckpointError, match=f"step_000002 is damaged: {name}"):
                load_checkpoint(newer, model, None, None)
        else:
            with pytest.raises(WeightsError, match=f"step_000002 is damaged: {name}"):
                find_weights(newer)
        assert number % 4 > 1 or f"step_000002 is damaged ({name}" in caplog.text
        (newer / name).write_bytes(whole[name])
    assert latest_checkpoint(tmp_path) == newer


def test_missing_and_foreign_files_are_found(tmp_path, model, optimizer):
    older, newer = (save(tmp_path, step, model, optimizer) for step in (1, 2))
    for name in contents(newer):
        moved = (newer / name).rename(tmp_path / name)
        assert find_problems(newer) == [f"{name} is missing"]
        assert latest_checkpoint(tmp_path) == older
        (newer / name).mkdir()
        assert latest_checkpoint(tmp_path) == older
        (newer / name).rmdir()
        (newer / name).symlink_to(moved)
        assert latest_checkpoint(tmp_path) == older
        (newer / name).unlink()
        moved.rename(newer / name)
    (newer / "inner").mkdir()
    (newer / "inner" / "notes.txt").touch()
    assert find_problems(newer) == ["inner/notes.txt is not one of its files"]
    (newer / "inner" / "notes.txt").unlink()
    os.mkfifo(newer / "pipe")
    assert find_problems(newer) == ["pipe is not one of its files"]
    (newer / "pipe").unlink()
    assert latest_checkpoint(tmp_path) == newer


def test_weights_alone_are_no_checkpoint_of_a_run(tmp_path, model, optimizer):
    older, newer = (save(tmp_path, step, model, optimizer) for step in (1, 2))
    for name in contents(newer).keys() - {"model.safetensors"}:
        (newer / name).unlink()
    assert latest_checkpoint(tmp_path) == older
    assert find_weights(tmp_path).parent == older
    with pytest.raises(WeightsError, match=r"step_000002 is damaged: manifest\.json is missing"):
        find_weights(newer)
    copy = shutil.copytree(newer, tmp_path / "weights")  # outside of a run they are what `save_pretrained` writes
    assert find_weights(copy) == copy / "model.safetensors"


def test_one_file_of_a_checkpoint_is_compared_too(tmp_path, model, optimizer):
    folder = save(tmp_path, 1, model, optimizer)
    file = folder / "model.safetensors"
    assert find_weights(file) == file
    (folder / "trainer.json").write_text("{}")  # is not read with it
    assert find_weights(file) == file
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=r"model\.safetensors does not have the SHA-256 with which it was written"):
        vmoe.create_model(pretrained=file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "nested too deep"),
        (b"9" * 10_000, "a whole number of thousands of digits"),
        (b"[]", "not a manifest"),
        (b'{"files": {}}', "does not have the SHA-256|not a manifest"),
        (b"\xff\xfe", "not UTF-8 at byte 0|not valid JSON"),
        (b"", "Expecting value"),
    ],
)
def test_a_strange_manifest_is_one_sentence(tmp_path, model, optimizer, content, message):
    folder = save(tmp_path, 1, model, optimizer)
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"manifest.json is damaged: .*({message})"):
        latest_checkpoint(tmp_path)


def test_a_manifest_that_names_files_elsewhere_reads_none(tmp_path, model, optimizer):
    folder = save(tmp_path, 1, model, optimizer)
    (tmp_path / "secret").write_text("x")
    names = [file.name for file in folder.iterdir() if file.name != "manifest.json"]
    manifest.write_manifest(folder, {}, manifest.describe_files(folder, [*names, "../../secret"]))
    assert find_problems(folder) == ["../../secret is missing"]


def test_a_manifest_that_the_disk_cannot_read_is_damaged(tmp_path, model, optimizer, monkeypatch, caplog):
    save(tmp_path, 1, model, optimizer)
    damaged, read = save(tmp_path, 2, model, optimizer) / "manifest.json", type(tmp_path).read_bytes
    error = _raiser(OSError(errno.EIO, os.strerror(errno.EIO)))  # an error of reading names no file
    monkeypatch.setattr(type(tmp_path), "read_bytes", lambda file: (error if file == damaged else read)(file))
    assert latest_checkpoint(tmp_path).name == "step_000001"
    assert "manifest.json cannot be read" in caplog.text


# --- writing that fails ----------------------------------------------------------------------------------------------


def _raiser(error):
    def fail(*_, **__):
        raise error

    return fail


def test_a_stop_at_any_moment_of_writing_leaves_the_checkpoint_before(tmp_path, model, optimizer, monkeypatch):
    """A kill before each write, sync and rename in turn; whatever is left is not seen, and cleared away by the next."""
    save(tmp_path, 1, model, optimizer, ema=model)

    class Killed(BaseException):
        pass

    reached, moment = [], 0
    for target, name in [
        (module, "write_tensors"),
        (manifest, "write_manifest"),
        (module, "_write_text"),
        (module, "_sync"),
        (safetensors_writer, "save_file"),
        (os, "replace"),
    ]:
        real, calls = getattr(target, name), 0
        while True:
            left = [calls]

            def stop(*args, real=real, left=left, name=name, **kwargs):
                if left[0] == 0:
                    reached.append(name)
                    raise Killed
                left[0] -= 1
                return real(*args, **kwargs)

            moment += 1
            with monkeypatch.context() as context:
                context.setattr(target, name, stop)
                try:
                    save(tmp_path, 2, model, optimizer, ema=model)
                    break
                except Killed:
                    pass
            calls += 1
            assert latest_checkpoint(tmp_path).name in ("step_000001", "step_000002")
            if steps(tmp_path) == [1, 2]:  # after the last rename
                assert name == "_sync"
                assert not find_problems(tmp_path / "checkpoints" / "step_000002")
                break
        shutil.rmtree(tmp_path / "checkpoints" / "step_000002", ignore_errors=True)
    assert len(reached) > 15
    save(tmp_path, 3, model, optimizer)
    assert sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == ["step_000001", "step_000003"]


def test_a_stop_while_a_damaged_one_is_replaced_leaves_no_half_of_it(tmp_path, model, optimizer, monkeypatch):
    folder = [save(tmp_path, step, model, optimizer) for step in (1, 2)][1]
    (folder / "trainer.json").unlink()

    class Killed(BaseException):
        pass

    def stop(removed, **_):
        (removed / "manifest.json").unlink()
        raise Killed

    monkeypatch.setattr(shutil, "rmtree", stop)
    with pytest.raises(Killed):
        save(tmp_path, 2, model, optimizer)
    monkeypatch.undo()
    assert steps(tmp_path) == [1]
    assert not find_problems(save(tmp_path, 2, model, optimizer))
    assert sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == ["step_000001", "step_000002"]


@pytest.mark.parametrize("function", ["save_file", "replace", "fsync", "write_manifest"])
def test_an_error_of_the_disk_is_one_sentence_and_leaves_nothing(tmp_path, model, optimizer, monkeypatch, function):
    before = contents(save(tmp_path, 1, model, optimizer))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if function == "save_file":  # as safetensors tells it
        full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    monkeypatch.setattr(
        {"save_file": safetensors_writer, "write_manifest": manifest}.get(function, os), function, _raiser(full)
    )
    with pytest.raises(CheckpointError, match=r"step_000002: the disk is full; free some space"):
        save(tmp_path, 2, model, optimizer)
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]
    assert contents(tmp_path / "checkpoints" / "step_000001") == before


def test_what_json_cannot_hold_is_an_error_at_once(tmp_path, model, optimizer):
    with pytest.raises(CheckpointError, match="not JSON serializable"):
        save(tmp_path, 1, model, optimizer, trainer={"model": model}, asynchronous=True)


# --- which are kept --------------------------------------------------------------------------------------------------


def test_the_last_ones_stay(tmp_path, model, optimizer):
    for step in (5, 999_999, 1_000_000, 1_000_001):
        save(tmp_path, step, model, optimizer, keep_last=2)
    assert steps(tmp_path) == [1_000_000, 1_000_001]


def test_a_damaged_one_does_not_count_among_the_kept(tmp_path, model, optimizer):
    for step in (10, 20):
        save(tmp_path, step, model, optimizer)
    damaged = tmp_path / "checkpoints" / "step_000020"
    (damaged / "trainer.json").unlink()
    save(tmp_path, 15, model, optimizer, keep_last=1)  # continued from 10
    assert steps(tmp_path) == [15, 20]
    save(tmp_path, 30, model, optimizer, keep_last=2)
    assert steps(tmp_path) == [15, 20, 30]
    assert latest_checkpoint(tmp_path).name == "step_000030"
    save(tmp_path, 20, model, optimizer, keep_last=3)  # replaces the damaged one
    assert not find_problems(damaged)


def test_a_step_that_is_saved_already_is_not_written_again(tmp_path, model, optimizer):
    folder = save(tmp_path, 1, model, optimizer)
    inode = folder.stat().st_ino
    assert save(tmp_path, 1, model, optimizer) == folder
    assert folder.stat().st_ino == inode


def test_the_manifest_says_how_it_was_made(tmp_path, model, optimizer):
    manifest = json.loads((save(tmp_path, 7, model, optimizer) / "manifest.json").read_text())
    assert {key: manifest[key] for key in ("step", "world_size")} == {"step": 7, "world_size": 1}
