"""Searches images by a text or an image: `vmoe-search "a red apple" --index photos.parquet`."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence

from vmoe.cli.command import exit_code
from vmoe.data.images import BadSample
from vmoe.utils.config import ConfigError
from vmoe.utils.paths import check_checkpoint, check_index
from vmoe.utils.printable import printable
from vmoe.utils.tables import MetricTable, make_console


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, see `exit_code`."""
    description = "Find the images of an index that are most similar to a text or an image."
    parser = argparse.ArgumentParser(prog="vmoe-search", description=description)
    add = parser.add_argument
    add("text", nargs="?", metavar="TEXT", help='what the images show, such as "a red apple"')
    add("--image", metavar="FILE", help="search for images like this one, instead of by text")
    add("--index", required=True, metavar="FILE", help="a file of vmoe-embed, .parquet or .npz")
    add("--checkpoint", metavar="RUN", help="the model that made the index, if it is no longer where it was")
    add("--top", type=int, default=10, metavar="K", help="how many images to show (default 10)")
    add("--json", action="store_true", help="print JSON instead of a table")
    add("--device", default="auto", help="auto (default), cpu, cuda, mps")
    arguments = parser.parse_args(argv)
    if (arguments.text is None) == (arguments.image is None):
        parser.error("give either a text or --image FILE")
    return exit_code("vmoe-search", lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    """Prints the images: a table, or a JSON list of {"score", "path", "caption", "label"}, the most similar first."""
    if arguments.top < 1:
        raise ConfigError(f"--top must be >= 1, got {arguments.top}")
    check_index(arguments.index)
    if arguments.checkpoint is not None:
        check_checkpoint(arguments.checkpoint)
    if arguments.image is not None and not os.path.exists(arguments.image):
        raise BadSample(arguments.image, "no such file")
    from vmoe.evaluation.search import SearchIndex

    index = SearchIndex(arguments.index, arguments.checkpoint, arguments.device)
    if arguments.image is None:
        hits = index.by_text(arguments.text, arguments.top)
    else:
        hits = index.by_image(arguments.image, arguments.top)
    if arguments.json:
        rows = [{name: value for name, value in hit._asdict().items() if value is not None} for hit in hits]
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    shown = [name for name in ("path", "caption", "label") if getattr(hits[0], name) is not None]
    table = MetricTable("", ["score", *shown], left=shown)
    for hit in hits:
        table.add_row(f"{hit.score:.4f}", *(printable(getattr(hit, name)) for name in shown))
    make_console().print(table)
