"""The command itself, in a process of its own where that matters."""

import os
import runpy
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from vmoe.training import cli
from vmoe.training.checkpoint import list_checkpoints
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
    assert "GFLOPs per picture" in printed


# Starts a run for each configuration file in a process group of its own, as shells and schedulers do, and prints their
# process ids; then, a line for each, the exit codes in the order in which the runs end. The runs are forked from a
# process that has imported what train.py imports, because importing is what takes the time; they end as any process.
START = """
import os, sys
from train import main  # first, as in `python train.py`
import vmoe.training.loop

runs = {}
for file in sys.argv[1:]:
    runs[run := os.fork()] = file
    if run == 0:
        os.setsid()
        os.dup2(os.open(file + ".errors", os.O_WRONLY | os.O_CREAT), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(main(["--config", file]))
print(*runs, flush=True)
for _ in runs:
    run, status = os.wait()
    print(run, os.waitstatus_to_exitcode(status), flush=True)
"""


def test_a_signal_to_the_group_leaves_a_checkpoint_and_a_clean_message(make_config, tmp_path):
    # SIGUSR1 (SLURM's --signal) says that the job goes on later, so nothing is wrong
    expected = {signal.SIGINT: 130, signal.SIGTERM: 130, signal.SIGUSR1: 0}
    folders = {number: tmp_path / number.name for number in expected}
    for folder in folders.values():
        folder.mkdir()
        config = make_config(output_dir=folder / "run", **{"train.steps": 100_000, "data.loader.num_workers": 1})
        (folder / "config.yaml").write_text(to_yaml(config))
    files = [str(folder / "config.yaml") for folder in folders.values()]
    starter = subprocess.Popen([sys.executable, "-c", START, *files], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    runs = {}
    try:
        runs = dict(zip(expected, map(int, starter.stdout.readline().split()), strict=True))
        for number, run in runs.items():
            metrics = folders[number] / "run" / "metrics.jsonl"
            deadline = time.monotonic() + 120
            said = folders[number] / "config.yaml.errors"
            while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
                assert not (said.exists() and "Error" in said.read_text()), said.read_text()
                time.sleep(0.1)
            os.killpg(run, number)  # the whole group, data workers too, as terminals and schedulers do
        ended = [line.split() for line in starter.communicate(timeout=120)[0].splitlines()]
        codes = {int(run): int(code) for run, code in ended}
        for number, folder in folders.items():
            errors = (folder / "config.yaml.errors").read_text()
            assert codes[runs[number]] == expected[number], (number, errors)
            assert "Traceback" not in errors
            assert "the same command continues" in errors
            assert len(list_checkpoints(folder / "run")) == 1
    finally:
        for run in runs.values():
            with suppress(ProcessLookupError):  # the group is gone
                os.killpg(run, signal.SIGKILL)
        starter.kill()


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
