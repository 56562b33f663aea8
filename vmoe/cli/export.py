"""The export command: a model or a run's checkpoint as a file for other programs (docs/export.md).

It exports what `eval.py` measures: the moving average of the weights, if the run kept one.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vmoe.cli.command import exit_code
from vmoe.export.formats import check_export
from vmoe.utils.paths import check_checkpoint
from vmoe.utils.tables import MetricTable, make_console

if TYPE_CHECKING:
    from vmoe.export.check import Difference


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, see `exit_code`."""
    description = "Write a model as a file for other programs, and compare the file with the model."
    parser = argparse.ArgumentParser(prog="vmoe-export", description=description)
    source = "folder of a run (its newest) or of a checkpoint, a safetensors file, local-dir:FOLDER or hf-hub:ORG/NAME"
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help=source)
    parser.add_argument("--output", required=True, metavar="FILE", help="the file (hub: a folder), named by its format")
    parser.add_argument("--format", default="safetensors", help="safetensors (default), hub, pt2 or onnx")
    parser.add_argument("--raw", action="store_true", help="the trained weights, instead of their moving average")
    parser.add_argument("--part", help="of an image-text model: image, text or both (default: both)")
    parser.add_argument("--compile", action="store_true", help="pt2: a package of AOTInductor, for this machine")
    parser.add_argument("--license", help="hub: of the model card, such as apache-2.0")
    args = parser.parse_args(argv)

    def run() -> None:
        options = {"part": args.part, "compile": args.compile, "license": args.license}
        check_checkpoint(args.source)
        check_export(args.output, args.format, **options)
        from vmoe.export.exporter import export_model

        def progress(step: str) -> None:
            print(f"{step} ...", file=sys.stderr, flush=True)

        exported = export_model(args.source, args.output, args.format, raw=args.raw, progress=progress, **options)
        print(f"read     {exported.read}")
        if exported.differences:
            make_console().print(_table(exported.differences))
        print(f"wrote    {args.output}: {_content(args.output, args.format, exported.differences)}")

    return exit_code("vmoe-export", run)


def _content(output: str, format: str, differences: Sequence[Difference]) -> str:
    if format != "safetensors":
        outputs = ", ".join(dict.fromkeys(row.output for row in differences))
        return f"{outputs}; equal to the model up to rounding"
    from vmoe.models.serialization import StoredTensors, read_pretrained_metadata

    shapes, name = StoredTensors(output).shapes.values(), read_pretrained_metadata(output)["name"]
    return f"{name}, {len(shapes)} tensors, {sum(map(math.prod, shapes)):,} numbers"


def _table(differences: Sequence[Difference]) -> MetricTable:
    title = "Largest differences from the model on random inputs; relative: of the largest magnitude of the output"
    header = ["batch", "output", "absolute", "relative", "redrawn"]
    table = MetricTable(title, header, keys=2, left=("output",))
    for row in differences:
        table.add_row(str(row.batch), row.output, f"{row.absolute:.1e}", f"{row.relative:.1e}", str(row.redrawn))
    return table
