"""Signals before and after the steps; those between steps are in test_loop.py and test_cli.py."""

import os
import signal
from pathlib import Path

import pytest

from vmoe.training import cli, loop
from vmoe.training.checkpoint import list_checkpoints
from vmoe.training.config import to_yaml


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGUSR1, 0)])
def test_a_signal_before_the_first_step_ends_with_the_documented_code(
    number, code, make_config, tmp_path, monkeypatch, capsys
):
    config = make_config()
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    create_task, went_on, before = loop.create_task, [], signal.getsignal(number)

    def create(given):
        try:
            os.kill(os.getpid(), number)
        finally:  # a second one, as torchrun sends after the terminal's, changes nothing
            os.kill(os.getpid(), signal.SIGTERM)
        went_on.append(1)
        return create_task(given)

    monkeypatch.setattr(loop, "create_task", create)
    assert cli.main(["--config", str(tmp_path / "config.yaml")]) == code
    assert not went_on
    assert "the same command starts or continues the run" in capsys.readouterr().err
    assert list_checkpoints(Path(config.output_dir)) == []
    assert signal.getsignal(number) is before
    assert signal.set_wakeup_fd(-1) == -1
