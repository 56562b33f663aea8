"""The command itself, in a process of its own where that matters."""

import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vmoe.training import cli
from vmoe.training.checkpoint import list_checkpoints
from vmoe.training.config import to_yaml

ROOT = Path(__file__).parents[2]


def command(config, tmp_path, *arguments):
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    return [sys.executable, str(ROOT / "train.py"), "--config", str(file), *arguments]


def test_train_py_trains_and_prints_a_table(make_config, tmp_path, monkeypatch, capsys):
    _, script, *arguments = command(make_config(), tmp_path, "--train.steps", "2")
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(script, run_name="__main__")
    assert done.value.code == 0
    printed = capsys.readouterr().out
    assert "step 2/2" in printed
    assert "GFLOPs per picture" in printed


def test_a_signal_to_the_group_leaves_a_checkpoint_and_a_clean_message(make_config, tmp_path):
    # SIGUSR1 (SLURM's --signal) says that the job goes on later, so nothing is wrong
    codes = {signal.SIGINT: 130, signal.SIGTERM: 130, signal.SIGUSR1: 0}
    runs = {number: tmp_path / number.name for number in codes}
    processes = {}
    try:
        for number, folder in runs.items():  # at the same time: starting is what takes the time
            folder.mkdir()
            config = make_config(output_dir=folder / "run", **{"train.steps": 100_000, "data.loader.num_workers": 1})
            processes[number] = subprocess.Popen(
                command(config, folder),
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
            )
        for number, process in processes.items():
            metrics = runs[number] / "run" / "metrics.jsonl"
            deadline = time.monotonic() + 120
            while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
                time.sleep(0.1)
            os.killpg(process.pid, number)  # the whole group, data workers too, as terminals and schedulers do
        for number, process in processes.items():
            _, errors = process.communicate(timeout=120)
            assert process.returncode == codes[number], (number, errors)
            assert "Traceback" not in errors
            assert "the same command continues" in errors
            assert len(list_checkpoints(runs[number] / "run")) == 1
    finally:
        for process in processes.values():
            process.kill()


def test_errors_are_one_sentence_and_an_exit_code(make_config, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("VMOE_TRACEBACK", raising=False)
    config = make_config()
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    arguments = ["--config", str(tmp_path / "config.yaml")]
    assert cli.main([*arguments, "--model.name", "vmoe_tinny_patch8_48"]) == 1
    message = capsys.readouterr().err
    assert "vmoe_tiny_patch8_48" in message
    assert "Traceback" not in message
    assert cli.main([*arguments, "--train.freeze", "[nothing.*]"]) == 2
    assert "nothing.*" in capsys.readouterr().err
    monkeypatch.setenv("VMOE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="vmoe_tinny"):
        cli.main([*arguments, "--model.name", "vmoe_tinny_patch8_48"])
