"""The chaos script in a short form; docs/scaling_launch.md tells of the long one."""

import pytest

from .chaos import Chaos, differences


def chaos(forks, folder, **settings):
    settings = {"train__checkpoint_every": 2, "train__eval_every": 5, "data__loader__num_workers": 1} | settings
    return Chaos(forks, folder, settings, seed=3)


def test_a_killed_run_ends_as_if_nothing_had_happened(forks, tmp_path):
    run = chaos(forks, tmp_path, train__steps=24)
    undisturbed, disturbed = run.undisturbed(), run.disturbed(3)
    assert len(run.kills) == 3
    assert differences(undisturbed, disturbed) == []


def test_differences_are_found(forks, tmp_path):
    run = chaos(forks, tmp_path, train__steps=4, data__loader__num_workers=0)
    one = run.undisturbed()
    run.settings["seed"] = 1
    other = run.disturbed(0)
    found = differences(one, other)
    assert any(name.startswith("model: ") for name in found)
    assert any(name.startswith("optimizer: ") for name in found)
    assert "metrics.jsonl: other figures" in found


@pytest.mark.exhaustive
def test_a_job_of_two_processes_survives_killed_workers(forks, tmp_path):
    run = Chaos(forks, tmp_path, {"train__steps": 30, "train__checkpoint_every": 3, "train__eval_every": 10}, 2)
    undisturbed, disturbed = run.undisturbed(), run.disturbed(3)
    assert differences(undisturbed, disturbed) == []
