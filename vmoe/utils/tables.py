"""Tables of metrics that lose none of them in a narrow terminal, and the console that shows them."""

import os
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

FILE_WIDTH = 200  # characters of a line that is not for a terminal


def make_console(**options: Any) -> Console:
    """A console, with wide lines if it is no terminal and COLUMNS is not set."""
    console = Console(**options)
    if not console.is_terminal and not os.environ.get("COLUMNS"):
        console.width = FILE_WIDTH
    return console


class MetricTable:
    """A table for rich whose metrics are never cut: if it is too wide, more columns follow in a second table below,
    with the first `keys` columns, which say what a row is about. Columns in `left` are aligned left."""

    def __init__(self, title: str, header: Sequence[str], keys: int = 1, left: Collection[str] = ()) -> None:
        self.title, self.header, self.keys, self.left = title, list(header), keys, left
        self.rows: list[Sequence[str]] = []

    def add_row(self, *cells: str) -> None:
        self.rows.append(cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        for number, columns in enumerate(self._parts(options.max_width)):
            table = Table(title=None if number else Text(self.title), title_justify="left")
            for index in columns:
                name = self.header[index]
                justify = "left" if name in self.left else "right"
                table.add_column(Text(name), justify=justify, no_wrap=index >= self.keys, overflow="fold")
            for row in self.rows:
                table.add_row(*(Text(row[index]) for index in columns))
            yield table

    def _parts(self, width: int) -> list[list[int]]:
        """The columns of each part."""
        widths = [max(map(cell_len, column)) + 3 for column in zip(self.header, *self.rows, strict=True)]
        keys = list(range(self.keys))
        parts = [keys]
        for index in range(self.keys, len(widths)):
            if len(parts[-1]) > self.keys and 1 + sum(widths[each] for each in [*parts[-1], index]) > width:
                parts.append(keys)
            parts[-1] = [*parts[-1], index]
        return parts
