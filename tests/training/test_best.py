"""The best checkpoint and early stopping: by hand, and in whole runs that are killed and continued."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import vmoe
from vmoe.evaluation.retrieval import RECALL_NAMES, retrieval_recall
from vmoe.models.manifest import find_problems, list_checkpoints, step_of
from vmoe.models.serialization import find_weights
from vmoe.training.best import BestWatch
from vmoe.training.objectives import Classification
from vmoe.utils.config import ConfigError

from .test_trainer import _path, ctrl_c, fail, interrupt_after, metrics_of, run

VALUES = [0.2, 0.5, 0.5, 0.4, 0.7, 0.6, 0.1, 0.2, 0.3, 0.9]


def _watch(setting="top1", patience=None, values=VALUES, state=None):
    watch = BestWatch(setting, patience, lambda: ["top1", "ece", "val_loss"])
    watch.load(state)
    for step, value in enumerate(values):
        watch.update(step, {watch.metric: value})
    return watch


def test_the_first_of_the_best_is_kept():
    assert _watch(values=VALUES[:4]).step == 1
    assert _watch().step == 9
    assert _watch("ece").step == 6
    assert _watch("val_loss").step == 6
    watch = BestWatch(None, None, list)
    watch.update(1, {"top1": 1.0})
    assert watch.state is None


def test_what_is_not_finite_is_not_better():
    watch = _watch(values=[float("nan"), 0.3, float("nan"), float("inf")], patience=3)
    assert watch.state == {"metric": "top1", "value": 0.3, "step": 1, "since": 2}
    watch.update(4, {})  # there is no ece where scores are NaN
    assert watch.exhausted


def test_patience_counts_evaluations_without_a_better_one():
    assert not _watch(patience=4, values=VALUES[:8]).exhausted
    assert _watch(patience=4, values=VALUES[:9]).exhausted
    state = json.loads(json.dumps(_watch(values=VALUES[:7]).state))
    assert _watch(patience=4, values=VALUES[7:9], state=state).exhausted
    assert _watch("ece", patience=2, values=[0.9], state=state).state["since"] == 0  # of another metric


def test_names_are_those_of_the_evaluations():
    assert list(retrieval_recall(torch.eye(2), torch.eye(2), torch.arange(2))) == RECALL_NAMES


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train.keep_best": "top1"}, "train.keep_best needs evaluations; set train.eval_every"),
        ({"train.eval_every": 1, "train.patience": 2}, "train.patience needs train.keep_best"),
        ({"train.patience": 0}, "train.patience must be >= 1, got 0; null never stops early"),
        ({"train.eval_every": 1, "train.keep_best": "recall"}, r"\(top1, mean_per_class, nll, ece\), got 'recall'"),
    ],
)
def test_settings_that_do_not_go_together(make_config, overrides, message):
    config = make_config(**overrides)
    with pytest.raises(ConfigError, match=message):
        run(config)
    assert not _path(config).exists()


@pytest.fixture
def scripted(monkeypatch):
    """The evaluations give VALUES in turn."""
    real = Classification.evaluate

    def evaluate(self, model, device):
        results = real(self, model, device)
        weights = sum(parameter.detach().double().abs().sum().item() for parameter in model.parameters())
        return results | {"top1": values.setdefault(weights, [*VALUES, 0, 0][len(values)])}  # same weights, same value

    values = {}
    monkeypatch.setattr(Classification, "evaluate", evaluate)


KEEP = {"train.steps": 12, "train.eval_every": 1, "train.keep_best": "top1", "train.checkpoint_every": 5}
KEEP |= {"train.keep_last": 1}


@pytest.mark.usefixtures("scripted")
def test_a_run_that_stops_early_keeps_its_best(make_config, tmp_path, monkeypatch):
    settings = {**KEEP, "train.patience": 4}
    straight, stopped = make_config(**settings), make_config(**settings, output_dir=tmp_path / "stopped")
    summary, printed = run(straight)
    assert (summary["steps"], summary["best"]["step"], summary["best"]["value"]) == (9, 5, 0.7)
    assert "stopped early, after 4 evaluations without a better one: the best top1 is that of step 5" in printed
    assert [step_of(folder) for folder in list_checkpoints(_path(straight))] == [5, 9]

    for step, action, error in (
        (1, ctrl_c, KeyboardInterrupt),
        (4, fail, RuntimeError),
        (2, ctrl_c, KeyboardInterrupt),
    ):
        with monkeypatch.context() as context:
            interrupt_after(context, step, action)
            with pytest.raises(error):
                run(stopped)
    again, _ = run(stopped)
    assert again["best"] == summary["best"]
    assert metrics_of(stopped) == metrics_of(straight)
    best = [_path(config) / "best" for config in (straight, stopped)]
    assert [folder.resolve().name for folder in best] == ["step_000005"] * 2
    assert [find_problems(folder) for folder in best] == [[], []]
    ours, theirs = (load_file(find_weights(folder)) for folder in best)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(vmoe.create_model(pretrained=best[1]).head.weight, ours["head.weight"])
    assert "a larger train.patience continues it" in run(stopped)[1]
    more, _ = run(make_config(**{**settings, "train.patience": 5}, output_dir=tmp_path / "stopped"))
    assert (more["steps"], more["best"]["step"]) == (12, 10)


@pytest.mark.usefixtures("scripted")
def test_a_run_killed_before_the_best_is_named_names_it(make_config, tmp_path):
    config = make_config(**{**KEEP, "train.steps": 3, "train.async_checkpoints": True})
    run(config)
    best = _path(config) / "best"
    assert best.readlink().as_posix() == "checkpoints/step_000002"
    best.unlink()  # as if it was killed between the two
    (_path(config) / "summary.json").unlink()
    run(config)
    assert best.resolve().name == "step_000002"
    moved = shutil.move(_path(config), tmp_path / "moved")
    assert find_weights(tmp_path / "moved" / "best").exists(), moved


@pytest.mark.usefixtures("scripted")
def test_the_best_is_kept_where_there_are_no_links(make_config, monkeypatch):
    def no_link(*_):
        raise OSError("Operation not permitted")

    monkeypatch.setattr("pathlib.Path.symlink_to", no_link)
    config = make_config(**{**KEEP, "train.steps": 8})
    assert run(config)[0]["best"]["step"] == 5
    assert [step_of(folder) for folder in list_checkpoints(_path(config))] == [5, 8]
