import pytest

from vmoe.cli.command import exit_code
from vmoe.data import BadSample
from vmoe.utils.config import ConfigError


def raising(error):
    def run():
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("wrong"), 2, "vmoe-x: error: wrong\n"),
        (ValueError("bad file"), 1, "vmoe-x: error: bad file\n"),
        (BadSample("a.jpg", "torn"), 1, "vmoe-x: error: a.jpg: torn\n"),
        (ModuleNotFoundError("needs altair"), 1, "vmoe-x: error: needs altair\n"),
        (RuntimeError("shape"), 1, "vmoe-x: error: shape (VMOE_TRACEBACK=1 shows where)\n"),
        (KeyError(), 1, "vmoe-x: error: KeyError (VMOE_TRACEBACK=1 shows where)\n"),
        (KeyboardInterrupt(), 130, "\nvmoe-x: interrupted\n"),
    ],
)
def test_every_end_has_its_code_and_one_sentence(capsys, monkeypatch, error, code, message):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("VMOE_TRACEBACK", raising=False)
    assert exit_code("vmoe-x", raising(error)) == code
    assert capsys.readouterr().err == message


def test_success_is_silent(capsys):
    assert exit_code("vmoe-x", lambda: "anything") == 0
    assert capsys.readouterr().err == ""


def test_of_several_processes_one_reports_a_wrong_setting_and_each_its_own_error(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert exit_code("vmoe-x", raising(ConfigError("wrong"))) == 2
    assert capsys.readouterr().err == ""
    assert exit_code("vmoe-x", raising(BadSample("a.jpg", "torn"))) == 1
    assert "a.jpg" in capsys.readouterr().err


def test_the_traceback_is_there_for_who_asks(monkeypatch):
    monkeypatch.setenv("VMOE_TRACEBACK", "1")
    with pytest.raises(ConfigError):
        exit_code("vmoe-x", raising(ConfigError("wrong")))
