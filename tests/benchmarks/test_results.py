"""Files of results: sections, what stands in them, and what they never hold."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from benchmarks.session import ROOT, Session, allocator, make_parser, read_results, slug, write_section

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


@pytest.mark.parametrize("keeps_memory", [True, False])
@pytest.mark.parametrize("name", [None, "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_the_allocator_is_said_as_it_is(keeps_memory, name, monkeypatch):
    for other in [other for other in os.environ if other.startswith("MALLOC_")]:
        monkeypatch.delenv(other)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if name:
        monkeypatch.setenv(name, "2")
    said = allocator(torch.device("cpu"), keeps_memory)
    assert ("keep_freed_memory" in said) == keeps_memory
    assert ("by itself" in said) == (not keeps_memory and name is None)
    assert name is None or f"{name}=2" in said


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
@pytest.mark.parametrize("set_by_user", [True, False])
def test_memory_is_kept_unless_the_user_says_otherwise(set_by_user):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    if set_by_user:
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    code = "import importlib.util as u; spec = u.spec_from_file_location('allocator', 'vmoe/utils/allocator.py');"
    code += "module = u.module_from_spec(spec); spec.loader.exec_module(module); print(module.keep_freed_memory())"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.stdout.strip() == str(not set_by_user), ran.stderr


def test_what_is_no_longer_compiled_is_not_measured_as_such(tmp_path):
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        make_session(tmp_path)
        assert not torch._dynamo.config.fail_on_recompile_limit_hit
        make_session(tmp_path, "--compile", "default")
        assert torch._dynamo.config.fail_on_recompile_limit_hit
    assert not torch._dynamo.config.fail_on_recompile_limit_hit


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
