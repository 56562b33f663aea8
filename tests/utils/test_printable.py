import errno
import io
import json
import os
import sys
from importlib import import_module

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from vmoe.utils.printable import safe_output

COMMANDS = ("train", "evaluate", "inspect_routing", "classify", "demo", "plan", "export", "convert", "write_shards")


class Failing(io.StringIO):
    """A stream that nobody reads any more."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, _text):
        raise self.error

    def flush(self):
        raise self.error


def written(encoding, write):
    """What `write` prints to a standard output of this encoding."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        with safe_output():
            write()
    return raw.getvalue().decode(encoding)


@given(st.text(st.characters(exclude_categories=[])), st.sampled_from(["ascii", "cp1252", "latin-1", "utf-8"]))
def test_json_stays_json_in_every_encoding(text, encoding):
    printed = written(encoding, lambda: print(json.dumps([text], ensure_ascii=False)))
    assert json.loads(printed) == [text]


def test_what_the_encoding_has_stays_as_it_is():
    assert written("cp1252", lambda: print("naïve 中 ± 😀")) == "naïve \\u4e2d ± \\ud83d\\ude00\n"
    assert written("utf-8", lambda: print("naïve 中 ± 😀")) == "naïve 中 ± 😀\n"


def test_tables_have_plain_borders_where_the_encoding_has_no_others():
    def show():
        table = Table("name", "value")
        table.add_row("möwe", "1")
        Console().print(table)

    printed = written("ascii", show)
    assert "m\\u00f6we" in printed
    assert "+---" in printed
    assert "\\u2" not in printed


@pytest.mark.parametrize(
    "error", [BrokenPipeError(), OSError(errno.ENOSPC, "no space"), OSError(errno.EIO, "gone"), ValueError("closed")]
)
def test_a_stream_that_fails_ends_nothing(error, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Failing(error))
    before = sys.stdout
    with safe_output():
        print("lost", flush=True)
        print("lost", file=sys.stderr)
        sys.stdout.writelines(["lost\n"])
        Console().print("lost")
    assert sys.stdout is before


def test_no_stream_at_all_ends_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with safe_output():
        print("lost")
        Console().print("lost")


def test_a_closed_pipe_does_not_fail_at_the_end_either(monkeypatch):
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with safe_output():
            print("read")
            os.close(reading)
            for _ in range(3):
                print("lost" * 10_000)
    # Closing flushes what is left: nothing was raised.


def test_errors_of_what_is_run_pass():
    with pytest.raises(BrokenPipeError), safe_output():
        raise BrokenPipeError


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_ends_as_it_would_where_nobody_reads(command, monkeypatch):
    monkeypatch.setattr(sys, "argv", [command, "--nonsense"])
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Failing(BrokenPipeError()))
    with pytest.raises(SystemExit) as end:
        getattr(import_module("vmoe_command"), command)()
    assert end.value.code == 2
