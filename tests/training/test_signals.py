"""Signals before and after the steps; those between steps are in test_trainer.py and tests/cli/test_train.py."""

import hashlib
import io
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from vmoe.cli import train
from vmoe.models.manifest import list_checkpoints
from vmoe.training import trainer
from vmoe.training.config import to_yaml
from vmoe.training.signals import interruptible


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGUSR1, 0)])
def test_a_signal_before_the_first_step_ends_with_the_documented_code(
    number, code, make_config, tmp_path, monkeypatch, capsys
):
    config = make_config()
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    create_task, went_on, before = trainer.create_task, [], signal.getsignal(number)

    def create(given):
        try:
            os.kill(os.getpid(), number)
        finally:  # a second one, as torchrun sends after the terminal's, changes nothing
            os.kill(os.getpid(), signal.SIGTERM)
        went_on.append(1)
        return create_task(given)

    monkeypatch.setattr(trainer, "create_task", create)
    assert train.main(["--config", str(tmp_path / "config.yaml")]) == code
    assert not went_on
    assert "the same command starts or continues the run" in capsys.readouterr().err
    assert list_checkpoints(Path(config.output_dir)) == []
    assert signal.getsignal(number) is before
    assert signal.set_wakeup_fd(-1) == -1


class Heard(io.StringIO):
    """Standard error that notes whether the main thread had heard the signal when something was written."""

    def __init__(self):
        super().__init__()
        self.stop, self.heard, self.written = None, None, threading.Event()

    def write(self, text):
        super().write(text)
        if self.heard is None:
            self.heard = self.stop.interrupted or self.stop.planned
        self.written.set()
        return len(text)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_in_a_long_operation_is_answered_at_once(number, monkeypatch):
    said = Heard()
    monkeypatch.setattr(sys, "stderr", said)

    def send():
        time.sleep(0.05)
        os.kill(os.getpid(), number)

    with interruptible() as said.stop, said.stop.between_steps():
        threading.Thread(target=send).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 1_000_000)  # Python's handlers wait for its end
        assert said.written.wait(60)
        os.kill(os.getpid(), signal.SIGUSR1)  # another one is not told again
        assert said.stop.planned
    assert said.heard is False
    assert said.getvalue() == "\nvmoe-train: stopping after this step; Ctrl-C again stops at once\n"


def test_a_forked_process_does_not_answer_for_the_run(monkeypatch):
    said = Heard()
    monkeypatch.setattr(sys, "stderr", said)
    with interruptible() as said.stop, said.stop.between_steps():
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        os.kill(os.getpid(), signal.SIGUSR1)  # a byte behind the child's, if there were one
        assert said.written.wait(60)
    assert said.getvalue().count("stopping") == 1
    assert said.stop.planned
    assert not said.stop.interrupted
