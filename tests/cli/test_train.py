"""The command itself, in a process of its own where that matters."""

import json
import os
import runpy
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from vmoe.cli import train
from vmoe.models.manifest import list_checkpoints
from vmoe.training.config import to_yaml

ROOT = Path(__file__).parents[2]


def test_train_py_trains_and_prints_a_table(make_config, tmp_path, monkeypatch, capsys):
    (tmp_path / "config.yaml").write_text(to_yaml(make_config()))
    script = str(ROOT / "train.py")
    monkeypatch.setattr(sys, "argv", [script, "--config", str(tmp_path / "config.yaml"), "--train.steps", "2"])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(script, run_name="__main__")
    assert done.value.code == 0
    printed = capsys.readouterr().out
    assert "step 2/2" in printed
    assert "GFLOPs per image" in printed


@pytest.mark.parametrize("output", ["ascii", "closed pipe"])
def test_what_cannot_be_printed_ends_no_run(make_config, tmp_path, monkeypatch, output):
    from vmoe_command import train

    (tmp_path / "config.yaml").write_text(to_yaml(make_config(**{"train.steps": 2, "train.eval_every": 1})))
    reading, writing = os.pipe()
    with os.fdopen(reading, closefd=output == "ascii") as reader:
        with os.fdopen(writing, "w", encoding="ascii") as stdout:
            monkeypatch.setattr(sys, "stdout", stdout)
            if output == "closed pipe":
                os.close(reading)
            assert train(["--config", str(tmp_path / "config.yaml")]) == 0
        if output == "ascii":
            assert "final task loss" in reader.read()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2
    assert len(list_checkpoints(tmp_path / "run")) == 1


def test_a_signal_to_the_group_leaves_a_checkpoint_and_a_clean_message(forks, make_config, tmp_path):
    # SIGUSR1 (SLURM's --signal) says that the job goes on later, so nothing is wrong
    expected = {signal.SIGINT: 130, signal.SIGTERM: 130, signal.SIGUSR1: 0}
    folders = {number: tmp_path / number.name for number in expected}
    runs = {}
    for number, folder in folders.items():
        folder.mkdir()
        config = make_config(output_dir=folder / "run", **{"train.steps": 100_000, "data.loader.num_workers": 1})
        (folder / "config.yaml").write_text(to_yaml(config))
        # Each in a process group of its own, as shells and schedulers do.
        runs[number] = forks.start(["--config", str(folder / "config.yaml")], folder / "said")
    try:
        for number, run in runs.items():
            metrics = folders[number] / "run" / "metrics.jsonl"
            deadline = time.monotonic() + 120
            while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
                assert run.poll() is None, (folders[number] / "said").read_text()
                time.sleep(0.1)
            os.killpg(run.pid, number)  # the whole group, data workers too, as terminals and schedulers do
        for number, folder in folders.items():
            code, said = runs[number].wait(120), (folder / "said").read_text()
            assert code == expected[number], (number, said)
            assert "Traceback" not in said
            assert said.count("stopping after this step") == 1
            assert "the same command continues" in said
            assert len(list_checkpoints(folder / "run")) == 1
    finally:
        for run in runs.values():
            with suppress(ProcessLookupError):  # the group is gone
                os.killpg(run.pid, signal.SIGKILL)


def test_errors_are_one_sentence_and_an_exit_code(make_config, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("VMOE_TRACEBACK", raising=False)
    config = make_config()
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    arguments = ["--config", str(tmp_path / "config.yaml")]
    assert train.main([*arguments, "--model.name", "vmoe_tinny_patch8_48"]) == 1
    message = capsys.readouterr().err
    assert "vmoe_tiny_patch8_48" in message
    assert "Traceback" not in message
    assert train.main([*arguments, "--train.freeze", "[nothing.*]"]) == 2
    assert "nothing.*" in capsys.readouterr().err
    monkeypatch.setenv("VMOE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="vmoe_tinny"):
        train.main([*arguments, "--model.name", "vmoe_tinny_patch8_48"])
