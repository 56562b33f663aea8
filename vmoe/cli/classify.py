"""Scores pictures from the command line: `vmoe-classify IMAGE... --labels "cat,dog" --checkpoint RUN`."""

from __future__ import annotations

import argparse
import glob
import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text
from torch import Tensor

from vmoe.cli.command import exit_code
from vmoe.data.images import IMAGE_SUFFIXES, MAX_PIXELS, BadSample, Reading, load_image
from vmoe.evaluation.class_names import known_sets
from vmoe.evaluation.inference import PRECISIONS, evaluating
from vmoe.evaluation.loaded_model import Subject, load_subject
from vmoe.evaluation.text_cache import cached_classes
from vmoe.evaluation.zero_shot import check_class_names, class_scorer, image_batches, resolve_prompts, resolve_templates
from vmoe.models.factory import is_contrastive
from vmoe.models.serialization import read_pretrained_metadata
from vmoe.utils.config import ConfigError
from vmoe.utils.printable import escaped, printable, safe_output
from vmoe.utils.tables import make_console

PROG = "vmoe-classify"
logger = logging.getLogger("vmoe.cli.classify")


@safe_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, 1 for an error, 2 for a wrong setting, 130 for Ctrl-C.

    An error is one sentence; set VMOE_TRACEBACK=1 to see where it comes from.
    """
    arguments = _parser().parse_args(argv)
    return exit_code(PROG, lambda: run(arguments))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: ") and " -" not in message:
            message += "; labels are one text with commas, as in --labels 'cat,hot dog'"
        self.exit(2, f"{self.prog}: error: {message}\n")  # one sentence, without the usage before it


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROG,
        description="Print the likeliest labels of pictures, by an image-text model that compares them with words, or "
        "by a classifier that knows its own classes.",
        epilog="known sets of class names: " + ", ".join(known_sets()),
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="a picture, a folder (all pictures in it and below, hidden ones aside) or a quoted pattern such as "
        "'photos/*.jpg'",
    )
    parser.add_argument(
        "--checkpoint", required=True, help="folder of a run or of a checkpoint, or a .safetensors file"
    )
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument("--labels", metavar="TEXT,TEXT", help="what a picture may show, separated by commas")
    labels.add_argument(
        "--labels_file", metavar="FILE", help="the same, one per line; or a known set of class names, as imagenet"
    )
    parser.add_argument(
        "--templates",
        action="append",
        metavar="TEXT",
        help="text with {} in the place of the label; may be given several times (the embeddings are averaged). Or a "
        "file with one per line, openai_imagenet, simple_imagenet or a known set. Without it: the set's own, or {}",
    )
    parser.add_argument("--top", type=int, default=5, metavar="K", help="how many labels to show (default 5)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--batch_size", type=int, default=64, help="pictures per forward pass (default 64)")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="float32", help="of the forward pass")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, mps")
    parser.add_argument(
        "--exif_orientation",
        action=argparse.BooleanOptionalAction,
        help="turn pictures as their EXIF data say (default: as the model was trained, else not)",
    )
    parser.add_argument(
        "--max_pixels", type=int, default=MAX_PIXELS, help=f"the largest picture, in pixels (default {MAX_PIXELS})"
    )
    return parser


def run(arguments: argparse.Namespace, console: Console | None = None) -> list[dict]:
    """Scores the pictures and prints the result.

    Args:
        arguments: of the command line.
        console: where to print; None: standard output.

    Returns:
        For each picture {"image": path, "predictions": [{"label", "probability"}, ...]}, the likeliest first.

    Raises:
        ConfigError: settings that do not go together, or labels that cannot be used.
        ValueError: a file or checkpoint that cannot be read, or a picture, once all others are printed.
    """
    for name in ("top", "batch_size", "max_pixels"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name} must be >= 1, got {getattr(arguments, name)}")
    names, templates = _read_labels(arguments)
    files = find_pictures(arguments.images)
    subject = load_subject(arguments.checkpoint, arguments.device, arguments.precision)
    if is_contrastive(subject.model):
        if names is None:
            raise ConfigError(f"{arguments.checkpoint} compares pictures with words: give some, as --labels 'cat,dog'")
    else:
        names = _own_classes(subject, arguments)
    turned = subject.exif_orientation if arguments.exif_orientation is None else arguments.exif_orientation
    pictures = Pictures(files, Reading(turned, arguments.max_pixels), len(files) <= arguments.batch_size)
    probabilities_NC = _probabilities(subject, pictures, names, templates, arguments.batch_size)
    values_NK, places_NK = probabilities_NC.sort(dim=1, descending=True, stable=True)
    found = [
        {
            "image": str(file),
            "predictions": [
                {"label": names[place], "probability": value}
                for value, place in zip(values[: arguments.top], places[: arguments.top])
            ],
        }
        for file, values, places in zip(pictures.read, values_NK.tolist(), places_NK.tolist(), strict=True)
    ]
    if arguments.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    elif found:
        _print_tables(found, console or make_console())
    if pictures.bad:
        several = f"{len(pictures.bad)} of {len(files)} pictures cannot be read: " if len(files) > 1 else ""
        raise ValueError(several + "; ".join(map(str, pictures.bad)))
    return found


class Pictures:
    """The pictures in files, each read when it is needed; those that cannot be read are left out.

    Attributes:
        read: files read so far.
        bad: what was wrong with the others.
    """

    def __init__(self, files: Sequence[Path], reading: Reading, quiet: bool) -> None:
        self.files, self.reading, self.quiet = files, reading, quiet
        self.read: list[Path] = []
        self.bad: list[BadSample] = []

    def __iter__(self) -> Iterator[Image.Image]:
        console = Console(stderr=True)
        quiet = self.quiet or not console.is_terminal
        shown = self.files if quiet else track(self.files, "images", console=console, transient=True)
        for file in shown:
            try:
                image = load_image(file, reading=self.reading)
            except BadSample as error:
                self.bad.append(error)
            else:
                self.read.append(file)
                yield image


def find_pictures(patterns: Sequence[str]) -> list[Path]:
    """The files that arguments stand for, each once, in the order of the arguments; those of a folder sorted.

    A folder stands for the pictures in it and below, and so does a pattern (*, ?, [...], ** for any folders), where
    nothing has exactly its name. A file given by its name is taken whatever its ending. Other files of a folder or
    pattern are counted in a warning.

    Raises:
        ValueError: nothing has the name, or a folder or pattern holds no picture.
    """
    files: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_file():
            files.append(path)
            continue
        if path.is_dir():
            matches = [
                one for one in path.rglob("*") if not any(part[0] == "." for part in one.relative_to(path).parts)
            ]
        elif glob.has_magic(pattern):
            matches = [Path(one) for one in glob.glob(pattern, recursive=True)]
        else:
            raise ValueError(f"{pattern}: no such file or folder")
        matches = sorted(one for one in matches if one.is_file())
        pictures = [one for one in matches if one.suffix.lower() in IMAGE_SUFFIXES]
        others = _others([one for one in matches if one.suffix.lower() not in IMAGE_SUFFIXES])
        if not pictures:
            skipped = f", and {others}" if others else ""
            raise ValueError(f"{pattern}: no picture there (endings looked for: {', '.join(IMAGE_SUFFIXES)}){skipped}")
        if others:
            logger.warning("%s: skipped %s", printable(pattern), others)
        files.extend(pictures)
    return list(dict.fromkeys(files))


def _others(files: Sequence[Path]) -> str:
    """`3 files with other endings (2 .heic, 1 .txt), such as IMG_1.heic`; "" without files."""
    if not files:
        return ""
    endings = Counter(file.suffix.lower() or "none" for file in files)
    counts = ", ".join(f"{count} {printable(ending)}" for ending, count in endings.most_common(5))
    what = "1 file with another ending" if len(files) == 1 else f"{len(files)} files with other endings"
    return f"{what} ({counts}), such as {printable(files[0].name)}"


def _read_labels(arguments: argparse.Namespace) -> tuple[list[str] | None, list | str | None]:
    """(names, resolved templates); names are None without labels."""
    templates = arguments.templates
    if templates is not None and len(templates) == 1:
        templates = templates[0]
    names = None
    try:
        if arguments.labels is not None:
            if not isinstance(arguments.labels, str) or re.fullmatch(r"\s*\[.*\]\s*", arguments.labels, re.DOTALL):
                raise ValueError(f"must be one text with commas, as in 'cat,hot dog', got the list {arguments.labels}")
            labels = [label.strip() for label in arguments.labels.split(",")]
            if "" in labels:
                raise ValueError(f"label {labels.index('') + 1} of {len(labels)} is empty; is there a comma too many?")
            names = check_class_names(labels)
        elif arguments.labels_file is not None:
            names, templates = resolve_prompts(arguments.labels_file, templates)
        if names is not None and len(names) == 1:
            raise ValueError(f"{names[0]!r} alone would always get the probability 1; give at least two labels")
    except ValueError as error:
        option = "--labels" if arguments.labels is not None else "--labels_file"
        raise ConfigError(f"{option}: {error}") from None
    try:
        return names, None if templates is None else resolve_templates(templates)
    except ValueError as error:
        raise ConfigError(f"--templates: {error}") from None


def _own_classes(subject: Subject, arguments: argparse.Namespace) -> list[str]:
    """The class names that a classifier's file holds.

    Raises:
        ConfigError: labels or templates were given, which it cannot use, or the file has no names.
    """
    given = [name for name in ("labels", "labels_file", "templates") if getattr(arguments, name) is not None]
    if given:
        raise ConfigError(
            f"{subject.checkpoint} holds a classifier, which knows only its own classes: leave --{given[0]} out, "
            "or take an image-text model"
        )
    names = read_pretrained_metadata(subject.weights)["extra"].get("class_names")
    if not names:
        raise ConfigError(
            f"{subject.weights} holds a classifier without class names; save it again with "
            "vmoe.models.factory.save_pretrained(model, file, extra={'class_names': [...]})"
        )
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"the class names in {subject.weights} are no list of texts")
    return [escaped(name) for name in names]


def _probabilities(subject: Subject, pictures: Pictures, names: Sequence[str], templates, batch_size: int) -> Tensor:
    """(N, C) float32 on the CPU, rows sum to 1; of the pictures that can be read.

    Raises:
        ValueError: a classifier has another number of outputs than names.
    """
    model = subject.model
    score = model
    if is_contrastive(model):
        score = class_scorer(model, cached_classes(subject, names, templates), names)
    rows = [torch.empty(0, len(names))]
    with evaluating(model, subject.device, subject.precision):
        for images_B3HW in image_batches(model, pictures, batch_size):
            rows.append(score(images_B3HW).float().softmax(dim=1).cpu())
            if rows[-1].shape[1] != len(names):
                raise ValueError(f"{subject.weights} names {len(names)} classes and has {rows[-1].shape[1]} outputs")
    return torch.cat(rows)


def _print_tables(found: list[dict], console: Console) -> None:
    for one in found:
        table = Table(box=box.SIMPLE_HEAD)
        table.add_column("label", overflow="fold")
        table.add_column("probability", justify="right", no_wrap=True)
        for prediction in one["predictions"]:
            table.add_row(Text(prediction["label"]), f"{prediction['probability']:.4f}")
        console.print(one["image"], style="bold", markup=False, highlight=False, soft_wrap=True)
        console.print(table)


if __name__ == "__main__":
    sys.exit(main())
