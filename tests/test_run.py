import sys

import pytest

from vmoe.run import main

SCRIPT = "import sys, timm, helper\nprint(__name__, sys.argv, timm.is_model('vmoe_tiny_patch8_48'), helper.VALUE)\n"


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.mark.parametrize("as_module", [True, False])
def test_it_runs_scripts_and_modules_as_python_does(tmp_path, capsys, monkeypatch, as_module):
    (tmp_path / "script_of_theirs.py").write_text(SCRIPT)
    (tmp_path / "helper.py").write_text("VALUE = 7\n")
    file = str(tmp_path / "script_of_theirs.py")
    if as_module:
        monkeypatch.syspath_prepend(str(tmp_path))
    main([*(["-m", "script_of_theirs"] if as_module else [file]), "--flag", "-m"])
    assert capsys.readouterr().out == f"__main__ {[file, '--flag', '-m']} True 7\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "use: python -m vmoe.run"),
        (["--help"], "use: python -m vmoe.run"),
        (["-m"], "use: python -m vmoe.run"),
        (["nowhere.py"], "there is no script nowhere.py"),
        (["-m", "nowhere.train"], "there is no module nowhere.train"),
        (["-m", "json.nowhere"], "there is no module json.nowhere"),
    ],
)
def test_what_cannot_run_is_one_sentence(argv, message):
    with pytest.raises(SystemExit, match=message):
        main(argv)
