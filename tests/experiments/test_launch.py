"""The launcher: which runs follow from a YAML, which are made, what is kept of them, and what it refuses."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import yaml
from PIL import Image

from experiments import worker
from experiments.compare import unpacked
from experiments.launch import Sweep
from experiments.plan import ROOT, load
from experiments.records import read_records
from vmoe.training.config import Config
from vmoe.utils.config import ConfigError, read_config

UPCYCLED = {"dense": {}, "upcycled": {"model.pretrained": {"run": "dense"}, "model.upcycle.num_experts": 4}}


def names(file):
    return [cell.name for cell in load(file)[1]]


def test_the_grid_makes_the_names_and_a_run_may_have_its_own(lab):
    grid = {"model.kwargs.num_experts": [4, 8], "optim.lr": [1e-3]}
    lab.write(seeds=[3], runs={"a b": None, "longer": {"grid": {"train.steps": [5]}}}, grid=grid, baseline=None)
    assert names(lab.file) == [
        "a_b_num_experts=4_lr=0.001-seed3",
        "a_b_num_experts=8_lr=0.001-seed3",
        "longer_steps=5-seed3",
    ]
    lab.write(seeds=[3], runs={}, grid=grid, baseline="num_experts=8, lr=0.001")
    assert names(lab.file) == ["num_experts=4_lr=0.001-seed3", "num_experts=8_lr=0.001-seed3"]


def test_a_run_that_needs_another_comes_after_it_and_changes_with_it(lab):
    cells = load(lab.write(runs=UPCYCLED, seeds=[7]))[1]
    assert [cell.name for cell in cells] == ["dense-seed7", "upcycled-seed7"]
    words = "--model.pretrained runs/experiments/lab/dense-seed7 --model.upcycle.num_experts 4 --seed 7"
    assert words in cells[1].command()
    before = cells[1].settings["model.pretrained"]
    later = load(lab.write(runs={**UPCYCLED, "dense": {"optim.lr": 0.5}}))[1]
    assert before != later[1].settings["model.pretrained"]
    guided = {"train.superclasses.source": {"run": "dense", "file": "m.csv"}}
    cells = load(lab.write(runs={"dense": {}, "guided": guided}, seeds=[7]))[1]
    assert "--train.superclasses.source runs/experiments/lab/dense-seed7/m.csv" in cells[1].command()
    assert cells[1].settings["train.superclasses.source"].endswith(") m.csv")


def test_a_list_of_runs_is_that_of_their_folders(lab):
    joined = {"model.pretrained": {"run": "dense"}, "model.upcycle.others": [{"run": "b"}, {"run": "c"}]}
    runs = {"dense": {}, "b": None, "c": None, "joined": joined}
    cell = load(lab.write(runs=runs, seeds=[7]))[1][-1]
    assert [parent.name for parent in cell.needs] == ["dense-seed7", "b-seed7", "c-seed7"]
    folders = [f"runs/experiments/lab/{run}-seed7" for run in "bc"]
    assert f"--model.upcycle.others '{json.dumps(folders)}'" in cell.command()
    grid = {"optim.lr": [0.25, 0.5]}
    later = load(lab.write(runs=runs, seeds=[7], grid=grid, baseline=None))[1]
    assert [parent.run for parent in later[-1].needs] == ["dense, lr=0.5", "b, lr=0.5", "c, lr=0.5"]


def test_a_second_run_of_other_seeds_is_evaluated_with_the_first(lab):
    runs = {"one": {}, "both": {"reseed": 100}}
    test = {"config": "classification_folder", "data.path": "x", "with": {"both": "one"}}
    one, both = load(lab.write(runs=runs, seeds=[7], baseline="one", evaluate={"test": test}))[1]
    assert "--seed 107 --output_dir runs/experiments/lab/both-seed7" in both.command()
    assert one.settings != both.settings
    found = both.evaluations_in(lab.runs)["test"]
    assert found["with"] == str(one.folder(lab.runs))
    assert found["arguments"][-2:] == ["--ensemble", "true"]
    assert both.needs == [one]
    assert "with" not in one.evaluations["test"]
    assert one.evaluations["test"]["digest"] != found["digest"]
    for partners, sentence in (
        ({"one": "both"}, "test.with is of run 'both', which is none of those above it"),
        ({"ghost": "one"}, "evaluate.test: with must be {RUN: OTHER}"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            load(lab.write(runs=runs, baseline="one", evaluate={"test": {**test, "with": partners}}))


def test_a_run_needs_the_same_point_of_the_grid(lab):
    runs = {**UPCYCLED, "longer": {"model.pretrained": {"run": "dense, lr=0.5"}, "grid": {}}}
    cells = load(lab.write(runs=runs, seeds=[0], grid={"optim.lr": [0.25, 0.5]}, baseline=None))[1]
    needs = {cell.run: [parent.run for parent in cell.needs] for cell in cells}
    assert needs["upcycled, lr=0.25"] == ["dense, lr=0.25"]
    assert needs["upcycled, lr=0.5"] == needs["longer"] == ["dense, lr=0.5"]


def test_a_mapping_of_a_run_keeps_what_it_does_not_name(lab):
    settings = {"model.kwargs.depth": 2, "optim": {"lr": 0.5}, "train.precision": "float32"}
    runs = {"dense": {"model": {"kwargs": {"num_experts": 0}}}, "bare": {"model.kwargs": {}, "model.kwargs.depth": 3}}
    dense, bare = load(lab.write(settings=settings, runs=runs, seeds=[0]))[1]
    assert (dense.settings["model.kwargs.depth"], dense.settings["model.kwargs.num_experts"]) == (2, 0)
    assert dense.settings["optim.lr"] == bare.settings["optim.lr"] == 0.5
    assert [key for key in bare.settings if key.startswith("model.kwargs")] == ["model.kwargs.depth"]


def test_values_come_back_from_the_command_line_as_they_are(lab):
    odd = {"model.kwargs.router": "12", "optim.betas": [0.9, 0.98], "train.ema_decay": None, "optim.lr": 1e-05}
    [cell] = load(lab.write(runs={"dense": odd}, seeds=[0]))[1]
    assert cell.settings["model.kwargs.router"] == "12"
    assert cell.settings["optim.betas"] == [0.9, 0.98]
    assert cell.settings["optim.lr"] == 1e-5


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sedes": [0]}, "unknown key 'sedes'; the nearest known key is 'seeds'"),
        ({"base": "nowhere.yaml"}, "lab.yaml: base nowhere.yaml: no such file"),
        ({"seeds": []}, "seeds must be numbers, none twice, got []"),
        ({"seeds": ["a"]}, "seeds[0] must be"),
        ({"baseline": "ghost"}, "baseline 'ghost' is none of the runs: dense, sparse"),
        ({"runs": {"dense": {"optim.lrr": 1}}}, "run 'dense': command line: unknown key 'optim.lrr'"),
        ({"runs": {"dense": {"optim.lr": -1}}}, "run 'dense': optim.lr must be > 0 and finite, got -1"),
        ({"runs": {"dense": {"train.precision": "auto"}}}, "run 'dense': train.precision is auto, which depends on"),
        ({"runs": {"dense": [1]}}, "runs.dense must be settings of train.py"),
        (
            {"runs": {"dense": {"model.pretrained": {"run": "ghost"}}}},
            "model.pretrained is of run 'ghost', which is none",
        ),
        ({"runs": {"dense": {"model.pretrained": {"run": "dense"}}}}, "run 'dense', which is none of those above it"),
        ({"runs": {"dense": {}, "a b": {}, "a_b": {}}}, "runs 'a b' and 'a_b' would share a folder"),
        ({"grid": {"optim.lr": 1}}, "grid must be {setting: [values]}, got 1 for 'optim.lr'"),
        ({"evaluate": {"x": "nowhere"}}, "evaluate.x: --config nowhere: no such file"),
        ({"evaluate": {"x": {"config": "emoji_knn", "features.kk": 1}}}, "evaluate.x: command line: unknown key"),
        ({"evaluate": {"x": {"config": "inspect", "num_imges": 1}}}, "the nearest known key is 'num_images'"),
        ({"evaluate": {"x": {"config": "emoji_knn", "runs": ["ghost"]}}}, "evaluate.x: runs must be a list of names"),
        ({"evaluate": {"x": {"config": "emoji_knn", "runs": 5}}}, "evaluate.x: runs must be a list of names"),
        ({"evaluate": {"x": 5}}, "evaluate.x: write a config of eval.py"),
        ({"evaluate": {"val": "emoji_knn"}}, "evaluate.val: choose another name"),
        ({"metrics": []}, "metrics must name at least one"),
        ({"metrics": ["top1:maximum"]}, "metrics: 'top1:maximum' is no metric"),
        ({"plot": {"y": ["a_*", "b"]}}, "plot.y: all or none of a_*, b must have one '*'"),
        ({"settings": {"seed": 5}}, "seed is set by the launcher; leave it out (seeds has the seeds)"),
        ({"runs": {"dense": {"output_dir": "x"}}}, "output_dir is set by the launcher; leave it out"),
        ({"grid": {"seed": [1, 2]}}, "seed is set by the launcher"),
        (
            {"evaluate": {"x": {"config": "emoji_knn", "checkpoint": "y"}}},
            "evaluate.x: checkpoint is set by the launcher",
        ),
        ({"evaluate": {"x": {"config": "emoji_knn", "output": "y.json"}}}, "evaluate.x: output is set by the launcher"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_is_made(lab, capsys, changes, sentence):
    lab.write(**changes)
    assert lab.launch() == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "lab.yaml" in error
    assert error.count("\n") == 1
    assert not lab.runs.exists()


def test_what_is_finished_is_not_made_again_also_elsewhere(lab, capsys):
    assert lab.launch("--only", "*seed0") == 0
    assert lab.calls() == ["dense-seed0", "sparse-seed0"]
    assert lab.launch("--jobs", "2") == 0
    assert sorted(lab.calls()) == ["dense-seed1", "sparse-seed1"]
    shutil.rmtree(lab.runs)
    assert lab.launch() == 0
    assert lab.calls() == []
    assert "0 of 4 runs to make" in capsys.readouterr().out
    record = read_records(lab.records)["sparse", 1]
    assert record["metrics"]["top1"] == 0.61
    assert record["metrics"]["routing/share_dropped"] == 0.5
    assert record["metrics"]["routing/text/share_dropped"] == 0.2
    assert record["metrics"]["routing/collapsed_layers"] == 1
    assert record["metrics"]["train_loss"] == 2.0
    assert record["settings"]["optim.lr"] == 0.002
    assert str(lab.runs) not in lab.records.read_text()


def test_a_failed_run_shows_its_log_and_the_others_go_on(lab, capsys):
    lab.write(runs={**UPCYCLED, "third": {}}, seeds=[0])
    lab.act("if run == 'dense': sys.exit('no memory')")
    assert lab.launch() == 1
    error = capsys.readouterr().err
    assert "dense-seed0: failed with exit code 1\n    | no memory" in error
    assert "upcycled-seed0: not made, since it needs dense-seed0" in error
    assert "2 runs are not finished: dense-seed0, upcycled-seed0" in error
    assert lab.calls() == ["dense-seed0", "third-seed0"]
    lab.act()
    assert lab.launch() == 0
    assert lab.calls() == ["dense-seed0", "upcycled-seed0"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--only", "ghost"], "--only ghost: matches none of dense-seed0, sparse-seed0"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
    ],
)
def test_a_wrong_option_is_one_sentence(lab, capsys, words, sentence):
    with suppress(SystemExit):
        assert lab.launch(*words) == 2
    assert sentence in capsys.readouterr().err


def test_an_error_of_the_launcher_stops_its_runs(lab, capsys):
    lab.act(
        "ready, ended = folder.parent / 'ready', folder.parent / 'ended'\n"
        "if run == 'sparse':\n"
        "    signal.signal(signal.SIGTERM, lambda *_: (ended.touch(), sys.exit(130)))\n"
        "    ready.touch(), time.sleep(60)\n"
        "while not ready.exists():\n"
        "    time.sleep(0.01)\n"
        "(folder / 'summary.json').write_text('{'), sys.exit(0)\n"
    )
    assert lab.launch("--jobs", "2", "--only", "*seed0") == 2
    assert "dense-seed0/summary.json: not valid JSON" in capsys.readouterr().err
    for _ in range(500):
        if (lab.runs / "ended").exists():
            return
        time.sleep(0.02)
    pytest.fail("the other run goes on")


def test_a_run_of_another_launcher_is_left_to_it(lab, capsys):
    folder = lab.runs / "dense-seed0"
    folder.mkdir(parents=True)
    (folder / "job.json").write_text("{}")
    with open(folder / "log.txt", "ab") as log:  # as the first launcher starts it, which may be gone by now
        fcntl.flock(log, fcntl.LOCK_EX)
        other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=log, stderr=log)
    try:
        assert lab.launch("--only", "*seed0") == 1
    finally:
        other.communicate(b"\n")
    error = capsys.readouterr().err
    assert "dense-seed0: is being made by another launcher\n1 runs are not finished: dense-seed0" in error
    assert "|" not in error
    assert (folder / "job.json").read_text() == "{}"
    assert lab.calls() == ["sparse-seed0"]
    lab.act()
    assert lab.launch("--only", "*seed0") == 0
    assert lab.calls() == ["dense-seed0"]


def test_a_planned_stop_is_not_finished(lab, capsys):
    lab.act("sys.exit(0)")
    assert lab.launch("--only", "dense-seed0") == 1
    assert "dense-seed0: stopped before its last step" in capsys.readouterr().err


def test_a_signal_stops_the_runs_and_the_same_command_continues(lab, capsys):
    lab.act(
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(130)); os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    )
    assert lab.launch() == 130
    assert "stopped; the same command continues" in capsys.readouterr().err
    assert lab.calls() == ["dense-seed0"]
    lab.act()
    assert lab.launch() == 0
    assert len(lab.calls()) == 4


@pytest.mark.parametrize("with_record", [True, False])
def test_a_base_that_changed_meanwhile_names_the_run_and_the_setting(lab, capsys, tmp_path, with_record):
    base = yaml.safe_load((ROOT / "configs" / "vmoe_tiny_emoji_groups.yaml").read_text())
    base["train"]["precision"] = "float32"
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    lab.write(base=str(tmp_path / "base.yaml"))
    if with_record:
        assert lab.launch("--only", "dense-seed0") == 0
    else:  # begun only: train.py has written config.yaml
        (lab.runs / "dense-seed0").mkdir(parents=True)
        begun = {**base, "output_dir": "x", "model": {**base["model"], "kwargs": {"num_experts": 0}}}
        (lab.runs / "dense-seed0" / "config.yaml").write_text(yaml.safe_dump(begun))
    base["data"]["train"]["path"], base["train"]["checkpoint_every"] = "elsewhere", 5  # no result depends on them
    base["optim"]["weight_decay"] = 0.5
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    lab.calls()
    capsys.readouterr()
    assert lab.launch() == 2
    assert "dense-seed0: optim.weight_decay was 'the default' and is 0.5 now, since" in capsys.readouterr().err
    assert lab.calls() == []
    base["optim"]["weight_decay"] = 0.05
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    assert lab.launch() == 0


def test_the_runs_that_a_chosen_run_needs_are_checked_too(lab, capsys):
    lab.write(runs=UPCYCLED, seeds=[0])
    assert lab.launch("--only", "dense") == 0
    lab.write(runs={**UPCYCLED, "dense": {"optim.lr": 0.5}}, seeds=[0])
    assert lab.launch("--only", "upcycled") == 2
    assert "dense-seed0: optim.lr was 'the default' and is 0.5 now" in capsys.readouterr().err


def test_an_evaluation_that_is_added_later_is_made_up_for(lab, capsys):
    assert lab.launch("--only", "*seed0") == 0
    lab.calls()
    lab.write(evaluate={"capacity": {"config": "emoji_capacity", "runs": ["spa*"]}})
    assert lab.launch("--only", "*seed0") == 0
    assert lab.calls() == ["sparse-seed0"]
    assert read_records(lab.records)["sparse", 0]["metrics"]["capacity/top1_bpr_0.5"] == 0.25
    lab.write(evaluate={"knn": {"config": "emoji_knn", "runs": ["spa*"]}})
    shutil.rmtree(lab.runs)
    assert lab.launch("--only", "*seed0") == 0
    assert "sparse-seed0: its record lacks the evaluation knn, and its folder is not here" in capsys.readouterr().out


def test_a_record_elsewhere_does_not_replace_the_run_that_another_starts_from(lab):
    lab.write(runs=UPCYCLED, seeds=[0])
    assert lab.launch("--only", "dense") == 0
    shutil.rmtree(lab.runs)
    assert lab.launch() == 0
    assert lab.calls() == ["dense-seed0", "upcycled-seed0"]


@pytest.mark.parametrize("finished", [True, False])
def test_old_weights_do_not_get_the_name_of_a_new_parent(lab, capsys, finished):
    lab.write(runs=UPCYCLED, seeds=[0])
    assert lab.launch("--only", "*" if finished else "dense") == 0
    folder, parent = lab.runs / "upcycled-seed0", load(lab.file)[1]
    base = yaml.safe_load((ROOT / "configs" / "vmoe_tiny_emoji_groups.yaml").read_text())
    if not finished:
        folder.mkdir()
        (folder / "job.json").write_text(json.dumps({"settings": parent[1].settings}))
    model = {**base["model"], "pretrained": str(lab.runs / "dense-seed0"), "upcycle": {"num_experts": 4}}
    (folder / "config.yaml").write_text(yaml.safe_dump({**base, "output_dir": "x", "model": model}))
    lab.records.unlink()
    shutil.rmtree(lab.runs / "dense-seed0")
    assert lab.launch("--list") == 0
    lab.write(runs={**UPCYCLED, "dense": {"optim.warmup_steps": 7}}, seeds=[0])
    assert lab.launch() == 2
    assert "upcycled-seed0: model.pretrained was 'run dense (" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["data.train", "data.val", "train.distill.teacher"])
def test_runs_from_other_data_or_weights_are_not_compared(lab, capsys, key):
    assert lab.launch() == 0
    lines = [json.loads(line) for line in lab.records.read_text().splitlines()]
    for line in lines:
        line["inputs"][key] = "two" if line["run"] == "sparse" else "one"
    lab.records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for command in (lab.launch, lab.report):
        assert command() != 0
        sentence = f"sparse-seed0: {key} is not what dense-seed0 had (fingerprints two and one)"
        assert sentence in capsys.readouterr().err
    if key.startswith("data"):  # on purpose, in the file
        lab.write(runs={"dense": {"model.kwargs.num_experts": 0}, "sparse": {"optim.lr": 0.002, f"{key}.path": "x"}})
        assert lab.report() == 0


def test_only_what_changes_its_metrics_makes_an_evaluation_anew(lab):
    def digest(**settings):
        given = {"config": "few_shot_folder", "train_data.path": "a", "data.path": "b", **settings}
        return load(lab.write(evaluate={"x": given}))[1][0].evaluations["x"]["digest"]

    same = digest()
    assert digest(**{"data.path": "c", "loader.num_workers": 3, "device": "cpu", "features.temperature": 0.07}) == same
    assert digest(**{"features.shots": [3]}) != same


def test_slurm_gets_a_job_for_each_run_after_those_that_it_needs(lab, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert lab.launch("--slurm") == 2
    assert "--slurm needs submitit: from a checkout pip install -e '.[slurm]'" in capsys.readouterr().err
    jobs = []

    class Executor:
        def __init__(self, folder, cluster):
            if cluster == "none":
                raise RuntimeError('Could not detect "srun"')
            self.parameters = {"cluster": cluster}

        def update_parameters(self, **parameters):
            self.parameters |= parameters

        def submit(self, call, command, **options):
            jobs.append((command, self.parameters))
            return SimpleNamespace(job_id=str(100 + len(jobs)))

    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(AutoExecutor=Executor))
    assert lab.launch("--slurm", "gpu") == 2
    assert "--slurm: write KEY=VALUE, got gpu" in capsys.readouterr().err
    assert lab.launch("--slurm", "cluster=none") == 2
    assert '--slurm: Could not detect "srun"' in capsys.readouterr().err
    lab.write(runs=UPCYCLED, seeds=[0])
    assert lab.launch("--slurm", "slurm_partition=gpu", "timeout_min=60") == 0
    (first, one), (second, two) = jobs
    assert first[-2:] == ["--only", "dense-seed0"]
    assert second[-2:] == ["--only", "upcycled-seed0"]
    assert one == {"cluster": "slurm", "name": "dense-seed0", "slurm_partition": "gpu", "timeout_min": 60}
    assert two["slurm_additional_parameters"] == {"dependency": "afterok:101"}


def test_a_real_run_leaves_a_record_with_the_right_images(lab, tmp_path, monkeypatch, capsys):
    for number in range(8):
        folder = tmp_path / "photos" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((16, 16), 50 + 20 * number).save(folder / f"{number}.png")
    data = {"type": "image_folder", "path": str(tmp_path / "photos")}
    settings = {
        "model.kwargs": {"img_size": 16, "depth": 2},
        "data.train": data,
        "data.val": {**data},
        "train.steps": 2,
    }
    settings |= {"data.loader.batch_size": 4, "train.eval_every": 2, "train.tensorboard": False}
    settings |= {"evaluate.examples": 0}
    capacity = {"config": "classification_folder", "task": "capacity", "data.path": data["path"]}
    capacity |= {"loader.num_workers": 0, "capacity.factors": [0.5], "capacity.timing_rounds": 0}
    inspect = {"config": "inspect", "num_images": 1, "num_patches": 1}
    lab.write(runs={"dense": settings}, seeds=[0], evaluate={"capacity": capacity, "experts": inspect})

    def start(sweep, cell):  # in this process, which has PyTorch already
        sweep.write_job(cell, cell.folder(sweep.output))
        code = worker.main([str(cell.folder(sweep.output))])
        return Mock(**{"poll.return_value": code})

    monkeypatch.setattr(Sweep, "start", start)
    assert lab.launch() == 0
    record = read_records(lab.records)["dense", 0]
    summary = json.loads((lab.runs / "dense-seed0" / "summary.json").read_text())
    assert record["metrics"]["top1"] == summary["evaluation"]["top1"]
    assert unpacked(record["images"]["correct"]).sum() == record["metrics"]["top1"] * 8
    assert {"capacity/top1_bpr_0.5", "experts/image/entropy", "ece", "gflops_per_image", "parameters_active"} <= record[
        "metrics"
    ].keys()
    assert record["metrics"]["routing/share_dropped"] >= 0
    assert str(tmp_path) not in lab.records.read_text()
    assert record["inputs"].keys() == {"data.train", "data.val", "evaluate.capacity"}
    assert record["inputs"]["data.train"] == record["inputs"]["data.val"] == record["images"]["data"]
    Image.new("RGB", (16, 16)).save(tmp_path / "photos" / "a" / "more.png")
    config = read_config(Config, ["--config", str(lab.runs / "dense-seed0" / "config.yaml")])
    worker.prepare(lab.runs / "dense-seed0", config)  # finished: what is there does not matter
    (lab.runs / "dense-seed0" / "summary.json").unlink()
    with pytest.raises(ConfigError, match="data.train is not what it was when the run began"):
        worker.prepare(lab.runs / "dense-seed0", config)


def test_weights_are_known_by_their_content_and_not_by_their_path(lab, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"one")
    (tmp_path / "b.safetensors").write_bytes(b"one")
    one, two = ({"train.distill.teacher": str(tmp_path / name)} for name in ("a.safetensors", "b.safetensors"))
    runs = {"one": one, "two": two, "hub": {"train.distill.teacher": "resnet18.a1_in1k"}}
    cells = load(lab.write(runs=runs, seeds=[0], baseline=None))[1]
    assert cells[0].settings == cells[1].settings
    assert cells[0].settings["train.distill.teacher"] == "weights of a file"
    assert cells[2].settings["train.distill.teacher"] == "resnet18.a1_in1k"
    assert str(tmp_path) in cells[0].command()
    config = read_config(Config, ["--config", str(ROOT / cells[0].base), "--output_dir", "x"])
    config.data.train.type = config.data.val.type = None
    config.train.distill.teacher = str(tmp_path / "a.safetensors")
    assert worker.inputs_of(config) == {"train.distill.teacher": hashlib.sha256(b"one").hexdigest()}
