"""The real wandb, offline."""

import sys

import pytest

from vmoe.utils.config import ConfigError

from .test_trainer import _path, ctrl_c, interrupt_after, metrics_of, run


@pytest.mark.slow  # wandb takes seconds to start
def test_a_continued_run_is_one_run(make_config, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs wandb (pip install -e '.[wandb]')")
    monkeypatch.setenv("WANDB_MODE", "offline")
    logged, log = [], wandb.Run.log

    def watch(run, metrics, step):
        logged.append((run.id, step, metrics["loss"]))
        log(run, metrics, step=step)

    monkeypatch.setattr(wandb.Run, "log", watch)
    config = make_config(**{"train.steps": 4, "train.wandb": "project"})
    with monkeypatch.context() as context:
        interrupt_after(context, 2, ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    run(config)
    number = (_path(config) / "wandb_id.txt").read_text()
    assert logged == [(number, line["step"], pytest.approx(line["loss"])) for line in metrics_of(config)]
    assert len(list(_path(config).glob(f"wandb/offline-run-*-{number}/run-{number}.wandb"))) == 2


def test_a_missing_package_is_named(make_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = make_config(**{"train.wandb": "project"})
    with pytest.raises(ConfigError, match=r"train.wandb needs the package wandb: pip install -e '.\[wandb\]'"):
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
