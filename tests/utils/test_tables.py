import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from vmoe.utils.tables import FILE_WIDTH, MetricTable, make_console


def printed(table, width):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def cells_of(text):
    """The rows of the printed tables as lists of cells, headers included."""
    lines = [line.replace("┃", "│") for line in text.splitlines() if line[:1] in "│┃"]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


@settings(max_examples=30)
@given(
    st.lists(st.lists(st.floats(-1e6, 1e6), min_size=6, max_size=6), min_size=1, max_size=4),
    st.integers(40, 120),
    st.booleans(),
)
def test_no_metric_is_cut_in_any_width(rows, width, several_keys):
    keys = ["mesh", "ckpt"] if several_keys else ["layer"]
    header = [*keys, *(f"metric {index}" for index in range(6))]
    table = MetricTable("a title", header, keys=len(keys))
    rows = [[*(f"key {number}" for _ in keys), *(f"{value:.4f}" for value in row)] for number, row in enumerate(rows)]
    for row in rows:
        table.add_row(*row)
    text = printed(table, width)
    assert all(len(line) <= width for line in text.splitlines())
    assert text.count("a title") == 1
    # Put beside each other without the repeated keys, the parts are the table.
    found = cells_of(text)
    parts = [found[start : start + len(rows) + 1] for start in range(0, len(found), len(rows) + 1)]
    whole = [sum((row[len(keys) :] for row in same), start=same[0][: len(keys)]) for same in zip(*parts)]
    assert whole == [header, *rows]


def test_a_table_that_fits_is_one():
    table = MetricTable("", ["measure", "value"], left=["measure"])
    table.add_row("top1", "0.5000")
    assert printed(table, 22).count("measure") == 1
    assert "│ top1    │ 0.5000 │" in printed(table, 22)


def test_a_long_name_is_broken_before_a_metric_is():
    table = MetricTable("", ["measure", "value"], left=["measure"])
    table.add_row("visual.trunk.blocks.11.mlp[0]", "0.123456789")
    text = printed(table, 30)
    assert "0.123456789" in text
    assert "".join(row[0] for row in cells_of(text)[1:]) == "visual.trunk.blocks.11.mlp[0]"


@pytest.mark.parametrize(("columns", "width"), [(None, FILE_WIDTH), ("90", 90)])
def test_a_file_has_wide_lines(columns, width, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    assert make_console(file=io.StringIO()).width == width
