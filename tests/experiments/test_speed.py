import json
import subprocess
from itertools import count
from pathlib import Path

import pytest

from experiments import speed
from vmoe.training.config import Config, with_one_length
from vmoe.utils.config import read_config


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """The configs with which train.py was called; each run is 100 images/s faster than the one before."""
    configs, speeds, real_run = [], count(100, 100), subprocess.run
    monkeypatch.setattr(speed, "RESULTS", tmp_path / "results")

    def run(command, env=None, **others):
        if "train.py" not in str(command[1]):
            return real_run(command, env=env, **others)
        config = read_config(Config, with_one_length(command[2:]))
        configs.append((config, env["OMP_NUM_THREADS"]))
        if config.optim.lr == 0.5:
            return subprocess.CompletedProcess(command, 1, "", "no such data")
        Path(config.output_dir, "summary.json").write_text(json.dumps({"images_per_second": next(speeds) + 0.04}))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(speed.subprocess, "run", run)
    return configs


def test_runs_take_turns_and_the_report_shows_their_speed(lab, trained):
    lab.launch()
    assert speed.main([str(lab.file), "--rounds", "2", "--steps", "7", "--threads", "3"]) == 0
    assert [config.optim.lr == 0.002 for config, _ in trained] == [False, True, False, True]  # dense, sparse
    assert all((config.train.steps, config.train.eval_every, config.seed) == (7, 0, 0) for config, _ in trained)
    assert {threads for _, threads in trained} == {"3"}
    assert not any(Path(config.output_dir).exists() for config, _ in trained)
    assert speed.read_speed("lab")["images_per_second"] == {"dense": [100, 300], "sparse": [200, 400]}
    lab.report()
    text = lab.page.read_text()
    assert "| images/s |" in text
    assert "| 200 (100-300) |" in text
    assert "3 threads" in text


def test_a_run_that_fails_is_named_and_nothing_is_written(lab, trained, capsys):
    lab.write(runs={"dense": {}, "wild": {"optim.lr": 0.5}})
    assert speed.main([str(lab.file)]) == 1
    assert "experiments.speed: error: run 'wild' failed: no such data" in capsys.readouterr().err
    assert not speed.speed_file("lab").exists()


def test_runs_that_need_others_are_skipped(lab, trained):
    lab.write(runs={"dense": {}, "longer": {"model.name": None, "model.pretrained": {"run": "dense"}}})
    assert speed.main([str(lab.file), "--rounds", "1"]) == 0
    assert list(speed.read_speed("lab")["images_per_second"]) == ["dense"]
