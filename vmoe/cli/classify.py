"""Classify images from the command line: `vmoe-classify IMAGE... --labels "cat,dog" --checkpoint RUN`."""

from __future__ import annotations

import argparse
import csv
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from PIL import Image
from rich.console import Console
from rich.progress import track

from vmoe.cli.command import exit_code
from vmoe.data.images import MAX_PIXELS, BadSample, Reading, find_images, load_image
from vmoe.evaluation.class_names import known_sets
from vmoe.utils.config import ConfigError
from vmoe.utils.files import atomic_file
from vmoe.utils.paths import check_checkpoint, check_output
from vmoe.utils.printable import escaped, printable
from vmoe.utils.tables import MetricTable, make_console

if TYPE_CHECKING:
    from torch import Tensor

    from vmoe.evaluation.loaded_model import LoadedModel

logger = logging.getLogger("vmoe.cli.classify")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, see `exit_code`."""
    arguments = _parser().parse_args(argv)
    return exit_code("vmoe-classify", lambda: run(arguments))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: ") and " -" not in message:
            message += "; labels are one text with commas, as in --labels 'cat,hot dog'"
        self.exit(2, f"{self.prog}: error: {message}\n")  # one sentence, without the usage before it


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="vmoe-classify",
        description="Print the most probable labels of images, by an image-text model or a classifier.",
        epilog="exit code: 0; 1 if an image cannot be read (all others are classified); 2: wrong arguments. "
        "Known sets of class names: " + ", ".join(known_sets()),
    )
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="an image, or a folder: all images in and below it, but hidden ones")
    add("--checkpoint", required=True, help="folder of a run or of a checkpoint, or a .safetensors file")
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument("--labels", metavar="TEXT,TEXT", help="what an image may show, separated by commas")
    labels.add_argument("--labels_file", metavar="FILE", help="the same, one per line; or a known set, as imagenet")
    templates = (
        "text with {} for the label, also several times (the embeddings are averaged); a file with one per line, "
        "openai_imagenet, simple_imagenet or a known set. Default: the set's own, or {}"
    )
    add("--templates", action="append", metavar="TEXT", help=templates)
    add("--top", type=int, default=5, metavar="K", help="how many labels to show (default 5)")
    outputs = parser.add_mutually_exclusive_group()
    outputs.add_argument("--json", action="store_true", help="print JSON instead of tables")
    file = "write a row per image to this .csv or .jsonl file instead, in place of a file that is there"
    outputs.add_argument("--output", metavar="FILE", type=Path, help=file)
    add("--batch_size", type=int, default=64, help="images per forward pass (default 64)")
    add("--precision", choices=["float32", "bf16", "fp16"], default="float32", help="of the forward pass")
    add("--device", default="auto", help="auto (default), cpu, cuda, mps")
    exif = "turn images upright as their EXIF data say (the default)"
    add("--exif_orientation", action=argparse.BooleanOptionalAction, default=True, help=exif)
    add("--max_pixels", type=int, default=MAX_PIXELS, help=f"the largest image, in pixels (default {MAX_PIXELS})")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Prints or writes the most probable labels of each image. ValueError: what cannot be read or used, images after
    all others.

    The JSON is a list of {"image": path, "predictions": [{"label", "probability"}, ...]}, the most probable first.
    """
    if arguments.output is not None:
        check_output(arguments.output, ".csv", ".jsonl")
    for name in ("top", "batch_size", "max_pixels"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name} must be >= 1, got {getattr(arguments, name)}")
    files = find_images(arguments.images)
    check_checkpoint(arguments.checkpoint)
    from vmoe.evaluation.inference import evaluating
    from vmoe.evaluation.loaded_model import load_model

    names, templates = _read_labels(arguments)
    loaded = load_model(arguments.checkpoint, arguments.device, arguments.precision)
    if loaded.tokenizer is None:
        names = _own_classes(loaded, arguments)
    elif names is None:
        raise ConfigError(f"{arguments.checkpoint} compares images with texts: give some, as --labels 'cat,dog'")
    bad: list[BadSample] = []
    reading = Reading(arguments.exif_orientation, arguments.max_pixels)
    with evaluating(loaded.model, loaded.device, loaded.precision):
        score = loaded.scorer(names, templates)
        found = _predictions(loaded, score, names, _readable(files, reading, bad), arguments)
        if arguments.output is not None:
            _write(found, arguments.output, min(arguments.top, len(names)))
        elif arguments.json:
            print(json.dumps(list(found), indent=2, ensure_ascii=False))
        else:
            _print_tables(list(found))
    if bad and arguments.output is not None:
        for error in bad:
            logger.warning("%s", printable(str(error)))
        raise ValueError(f"{len(bad)} of {len(files)} images cannot be read, each named above")
    if bad:
        several = f"{len(bad)} of {len(files)} images cannot be read: " if len(files) > 1 else ""
        raise ValueError(several + "; ".join(map(str, bad)))


def _predictions(
    loaded: LoadedModel,
    score: Callable[[Tensor], Tensor],
    names: list[str],
    images: Iterator[tuple[Path, Image.Image]],
    arguments: argparse.Namespace,
) -> Iterator[dict]:
    """What the JSON lists, batch after batch."""
    from vmoe.evaluation.zero_shot import image_batches

    paths: list[Path] = []

    def of_batch() -> Iterator[Image.Image]:
        for path, image in images:
            paths.append(path)
            yield image

    for images_B3HW in image_batches(loaded.model, of_batch(), arguments.batch_size):
        for path, probabilities_C in zip(paths, score(images_B3HW).softmax(dim=1).cpu(), strict=True):
            best = probabilities_C.sort(descending=True, stable=True)
            pairs = zip(best.indices[: arguments.top].tolist(), best.values.tolist())
            rows = [{"label": names[index], "probability": value} for index, value in pairs]
            yield {"image": str(path), "predictions": rows}
        paths.clear()


def _write(found: Iterator[dict], file: Path, top: int) -> None:
    """Writes the predictions atomically, a row per image; nothing if there are none."""
    first = next(found, None)
    if first is None:
        return
    number = 0
    # Names of files need not be UTF-8; what is not becomes an escape.
    with atomic_file(file) as draft, draft.open("w", encoding="utf-8", errors="backslashreplace", newline="") as stream:
        if file.suffix == ".csv":
            write = csv.writer(stream).writerow
            write(["image", *(f"{name}_{rank}" for rank in range(1, top + 1) for name in ("label", "probability"))])
        for number, one in enumerate(chain([first], found), start=1):  # noqa: B007
            if file.suffix == ".csv":
                write([one["image"], *(value for each in one["predictions"] for value in each.values())])
            else:
                stream.write(json.dumps(one, ensure_ascii=False) + "\n")
    make_console().print(f"{number} images: {file}", markup=False, highlight=False, soft_wrap=True)


def _print_tables(found: list[dict]) -> None:
    console = make_console()
    for one in found:
        table = MetricTable("", ["label", "probability"], left=["label"])
        for prediction in one["predictions"]:
            table.add_row(prediction["label"], f"{prediction['probability']:.4f}")
        console.print(one["image"], style="bold", markup=False, highlight=False, soft_wrap=True)
        console.print(table)


def _readable(files: Sequence[Path], reading: Reading, bad: list[BadSample]) -> Iterator[tuple[Path, Image.Image]]:
    """(file, image), each read when it is needed; `bad` collects what cannot be read."""
    console = Console(stderr=True)
    for file in track(files, "images", console=console, transient=True, disable=not console.is_terminal):
        try:
            image = load_image(file, reading=reading)
        except BadSample as error:
            bad.append(error)
        else:
            yield file, image


def _read_labels(arguments: argparse.Namespace) -> tuple[list[str] | None, list | None]:
    """(names, resolved templates); names are None without labels."""
    from vmoe.evaluation.zero_shot import resolve_prompts, resolve_templates

    given, names, option = arguments.labels_file, None, "--labels_file"
    templates = arguments.templates
    if templates is not None and len(templates) == 1:
        [templates] = templates  # it may be a file or a known set
    try:
        if arguments.labels is not None:
            option, given = "--labels", [label.strip() for label in arguments.labels.split(",")]
            if given[0].startswith("["):
                raise ValueError(f"must be one text with commas, as in 'cat,hot dog', got {arguments.labels}")
        if given is not None:
            names, templates = resolve_prompts(given, templates)
            if len(names) == 1:
                raise ValueError(f"{names[0]!r} alone would always get the probability 1; give at least two labels")
        option = "--templates"
        return names, None if templates is None else resolve_templates(templates)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from None


def _own_classes(loaded: LoadedModel, arguments: argparse.Namespace) -> list[str]:
    """The class names in a classifier's file; ConfigError if it has none, or if labels were given too."""
    for name in ("labels", "labels_file", "templates"):
        if getattr(arguments, name) is not None:
            what = f"{loaded.checkpoint} holds a classifier, which knows only its own classes"
            raise ConfigError(f"{what}: leave --{name} out, or take an image-text model")
    if not loaded.class_names:
        remedy = "vmoe.models.factory.save_pretrained(model, file, extra={'class_names': [...]})"
        raise ConfigError(f"{loaded.weights} holds a classifier without class names; save it again with {remedy}")
    return [escaped(name) for name in loaded.class_names]
