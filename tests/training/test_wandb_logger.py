"""The real wandb, offline: its files are read back."""

import json
import struct

import pytest

from vmoe.training import wandb_logger
from vmoe.utils.config import ConfigError

from .test_trainer import _path, ctrl_c, interrupt_after, metrics_of, run


def chunks(content, block=2**15):
    """The records of a .wandb file: a header of 7 bytes, then blocks of chunks with checksum, length and type, as in
    LevelDB's log."""
    at, parts = 7, []
    while at + 7 <= len(content):
        if block - at % block < 7:  # the rest of a block is filled with zeros
            at += block - at % block
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        parts.append(content[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def records(folder):
    """(run ids, {step: loss}) of all offline runs in a folder."""
    from wandb.proto import wandb_internal_pb2

    ids, losses = [], {}
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in chunks(file.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.append(record.run.run_id)
            if record.WhichOneof("record_type") == "history":
                row = {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                losses[row["_step"]] = row["loss"]
    return ids, losses


@pytest.mark.slow  # wandb takes seconds to start
def test_a_continued_run_is_one_run(make_config, monkeypatch):
    pytest.importorskip("wandb", reason="needs wandb (pip install -e '.[wandb]')")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = make_config(**{"train.steps": 4, "train.wandb": "project"})
    with monkeypatch.context() as context:
        interrupt_after(context, 2, ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    run(config)
    ids, losses = records(_path(config))
    assert set(ids) == {(_path(config) / "wandb_id.txt").read_text()}
    assert len(ids) == 2
    assert losses == {line["step"]: pytest.approx(line["loss"]) for line in metrics_of(config)}


def test_a_missing_package_is_named(make_config, monkeypatch):
    monkeypatch.setattr(wandb_logger.importlib.util, "find_spec", lambda name: None)
    config = make_config(**{"train.wandb": "project"})
    with pytest.raises(ConfigError, match=r"train.wandb needs the package wandb \(from a checkout `pip install -e '"):
        run(config)
    assert not _path(config).exists()


def test_a_refusal_of_wandb_is_one_sentence(make_config, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs wandb (pip install -e '.[wandb]')")

    def init(**_):
        raise wandb.errors.UsageError("No API key configured.\nMore lines")

    monkeypatch.setattr(wandb, "init", init)
    config = make_config(**{"train.wandb": "project"})
    with pytest.raises(
        ConfigError, match=r"^train.wandb project: No API key configured; run `wandb login`, or set WAN"
    ):
        run(config)
    assert list(_path(config).iterdir()) == []
