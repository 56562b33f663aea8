"""Files of results: sections, what stands in them, and what they never hold."""

from __future__ import annotations

import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

import pytest

from benchmarks.session import Session, make_parser, read_results, slug, write_section

CPU = {"kind": "cpu", "name": "Some CPU @ 2.6GHz", "cores": 2, "instructions": []}
DAY = datetime(2026, 3, 4, 23, 59, tzinfo=UTC)


def make_session(folder: Path, *words: str) -> Session:
    return Session(
        "layer",
        make_parser("layer", "A benchmark.", rounds=3),
        ["--results", str(folder), "--allocator=system", *words],
    )


def test_a_later_run_of_the_same_command_replaces_its_section_and_no_other(tmp_path):
    first = write_section(tmp_path / "new", CPU, DAY, "a", {"rows": [1]})
    assert first.name == "cpu-some-cpu-2-6ghz-2-cores-2026-03-04.json"
    write_section(tmp_path / "new", CPU, DAY, "b", {"rows": [2]})
    assert write_section(tmp_path / "new", CPU, DAY, "a", {"rows": [3]}) == first
    content = read_results(first)
    assert content["device"] == CPU
    assert content["date"] == "2026-03-04"
    assert content["sections"] == {"a": {"rows": [3]}, "b": {"rows": [2]}}
    assert os.listdir(tmp_path / "new") == [first.name]  # nothing is left beside it


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path):
    file = write_section(tmp_path, CPU, DAY, "a", {"rows": [1]})
    with pytest.raises(TypeError):
        write_section(tmp_path, CPU, DAY, "a", {"rows": [object()]})
    assert read_results(file)["sections"] == {"a": {"rows": [1]}}
    assert os.listdir(tmp_path) == [file.name]


@pytest.mark.parametrize("text", ["", "[]", '{"format": 99, "sections": {}}', '{"format": 1}'])
def test_a_damaged_file_is_named(tmp_path, text):
    file = tmp_path / f"{slug(CPU)}-2026-03-04.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"-2026-03-04\.json is not a file of benchmark results.*measure again"):
        write_section(tmp_path, CPU, DAY, "a", {})
    assert file.read_text() == text


def test_a_section_says_how_it_was_made_and_nothing_of_the_host(tmp_path):
    session = make_session(tmp_path, "--rounds", "2", "--dtype", "bfloat16")
    session.add({"comparison": "mlp", "name": "vmoe", "ratios": {}})
    session.note("Something was left out.")
    file = session.finish()
    text = file.read_text()
    content = json.loads(text)
    (key,) = content["sections"]
    section = content["sections"][key]
    assert key == "python -m benchmarks.layer --dtype bfloat16 --allocator system"  # rounds only say how long
    assert section["command"] == "python -m benchmarks.layer --rounds 2 --dtype bfloat16 --allocator system"
    assert section["versions"].keys() >= {"python", "torch", "timm"}
    assert section["rounds"] == 2
    assert section["threads"] >= 1
    assert "allocator" in section
    assert len(section["commit"]) == 40
    assert section["changed"] in (True, False)
    assert section["notes"] == ["Something was left out."]
    assert section["rows"][0]["name"] == "vmoe"
    assert str(tmp_path) not in text
    assert str(Path.home()) not in text
    assert len(socket.gethostname()) < 4 or socket.gethostname() not in text


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
    ],
)
def test_a_wrong_option_is_one_sentence(tmp_path, capsys, words, sentence):
    with pytest.raises(SystemExit):
        make_session(tmp_path, *words)
    assert capsys.readouterr().err.rstrip().endswith(f"error: {sentence}")
