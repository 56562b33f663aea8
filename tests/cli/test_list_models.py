from pathlib import Path

import pytest

import vmoe
from vmoe.cli.list_models import HEAD, main, table_row
from vmoe.models.spec import list_models

DOCS = Path(__file__).parents[2] / "docs" / "models.md"


def table() -> list[str]:
    text = DOCS.read_text(encoding="utf-8")
    return text.partition("<!-- table -->\n")[2].partition("\n<!-- end of table -->")[0].splitlines()


def test_the_docs_list_every_model():
    lines = table()
    assert "\n".join(lines[:2]) == HEAD
    assert [line.split("`")[1] for line in lines[2:]] == list_models()


@pytest.mark.parametrize(
    "name", ["vmoe_small_patch32_224", "softmoe_small_patch16_224", "limoe_base_patch32", "two_tower_base_patch16"]
)
def test_the_docs_hold_what_the_command_prints(name):
    assert table_row(name) in table()


def test_the_command(capsys):
    main(["vmoe_tiny_patch8_48"])
    assert capsys.readouterr().out == f"{HEAD}\n{table_row('vmoe_tiny_patch8_48')}\n"
    main(["limoe_tiny_*"])
    listed = capsys.readouterr().out.splitlines()[2:]
    assert [line.split("`")[1] for line in listed] == vmoe.list_models("limoe_tiny_*") != []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vmoe_tiny_patch8_84", "unknown model 'vmoe_tiny_patch8_84'; did you mean 'vmoe_tiny_patch8_48'?"),
        ("nope*", "unknown model 'nope*'"),
    ],
)
def test_an_unknown_name_is_one_sentence_without_a_table(capsys, name, message):
    assert main(["vmoe_tiny_patch8_48", name]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"vmoe-list-models: error: {message}")
    assert shown.err.count("\n") == 1
