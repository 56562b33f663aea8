"""The files of ImageNet-1k's validation set: pictures in synset folders or flat, and the usual files of labels."""

from __future__ import annotations

import csv
import json
import pkgutil
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from vmoe.data.sources.folder import flatten
from vmoe.data.sources.folder_layout import TreeReader, read_class_tree
from vmoe.utils.safe_json import read_json

VAL_LAYOUT = """
FOLDER/
├── n01440764/       (a folder per synset)
│   ├── ILSVRC2012_val_00000293.JPEG
│   └── ...
├── n01443537/
└── ... (1,000 folders)
or, with a file of labels in it or beside it,
FOLDER/
├── ILSVRC2012_val_00000001.JPEG
└── ... (50,000 pictures)
"""
# Looked for in this order, in the folder of the pictures and in the one above.
LABELS_FILES = (
    "imagenet_2012_validation_synset_labels.txt",
    "synset_labels.txt",
    "LOC_val_solution.csv",
    "val.txt",
    "ILSVRC2012_validation_ground_truth.txt",
    "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt",
)
DEVKIT_FILE = "ILSVRC2012_validation_ground_truth.txt"
_VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.jpe?g", re.IGNORECASE)


def val_number(name: str) -> int | None:
    """The number in a picture's official name (ILSVRC2012_val_00000001.JPEG: 1), or None for another name."""
    match = _VAL_NAME.fullmatch(name.rpartition("/")[2])
    return int(match[1]) if match and int(match[1]) > 0 else None


def find_val_pictures(
    path: str | Path, synsets: Sequence[str], labels_file: str | Path | None, need_labels: bool = True
) -> tuple[list[str], list[int]]:
    """Names and labels of the pictures in either layout.

    Args:
        path: the folder.
        synsets: in the order of the labels.
        labels_file: of a flat folder; None: the first of LABELS_FILES that is there.
        need_labels: False: pictures of a flat folder get the label 0 and need no file.

    Raises:
        ValueError: the folder has another layout, a class is missing, or labels are missing, too many or unknown.
    """
    tree = TreeReader(path, VAL_LAYOUT)
    folders, files = tree.entries()
    in_folders = not set(synsets).isdisjoint(folders)
    if in_folders or not any(val_number(name) for name in files):
        if in_folders and labels_file is not None:
            raise ValueError(f"labels_file {labels_file}: not for {path}, whose folders are the labels; leave it out")
        remedy = " (for a tree with other classes use data type image_folder)"
        return flatten(read_class_tree(path, VAL_LAYOUT, synsets, remedy), range(len(synsets)))
    names = tree.pictures("", allowed=[*LABELS_FILES, *([Path(labels_file).name] if labels_file else [])])
    tree.warn_of_junk()
    strange = [name for name in names if val_number(name) is None]
    if strange:
        raise tree.error(f"picture {strange[0]} among those of the validation set; move or remove it")
    if not need_labels:
        return names, [0] * len(names)
    if labels_file is None:
        places = [folder / name for folder in (tree.root, tree.root.resolve().parent) for name in LABELS_FILES]
        labels_file = next((file for file in places if file.is_file()), None)
        if labels_file is None:
            raise tree.error(
                "the pictures lie in no class folders, and there is no file of their labels: set labels_file, or put "
                f"one of {', '.join(LABELS_FILES[:4])} beside them"
            )
    labels = _match_labels(names, read_val_labels(labels_file, synsets), labels_file)
    tree.check_complete([synsets[label] for label in set(labels)], synsets)
    return names, labels


def read_val_labels(file: str | Path, synsets: Sequence[str]) -> dict[int, int]:
    """{number of the picture: label} from one of the files in which the labels are handed around.

    Known are: a line per picture in their order, with a synset (TensorFlow's
    imagenet_2012_validation_synset_labels.txt) or, in the development kit's ground truth, the kit's own class number,
    which meta.mat beside it explains (needs scipy); a line `NAME LABEL` with a synset or a label 0..999 (Caffe's
    val.txt); and Kaggle's LOC_val_solution.csv.

    Args:
        file: one of them.
        synsets: in the order of the labels.

    Raises:
        ValueError: the file cannot be read, or a line is none of these.
        ModuleNotFoundError: the development kit's file without scipy.
    """
    file = Path(file)
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ValueError(f"labels_file {file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError(f"labels_file {file}: not UTF-8 text") from None
    label_of = {synset: label for label, synset in enumerate(synsets)}
    kit = _read_devkit_classes(file) if file.name == DEVKIT_FILE else None
    labels: dict[int, int] = {}
    for line, name, text in _rows(file, lines):
        number = line if name is None else val_number(name if "." in name else f"{name}.JPEG")
        if kit is not None:
            label = label_of.get(kit.get(text, ""))
        elif re.fullmatch("[0-9]{1,9}", text) and name is not None:
            label = int(text) if int(text) < len(synsets) else None
        else:
            label = label_of.get(text)
        if number is None:
            raise ValueError(f"labels_file {file} line {line}: {name!r} is no name of a validation picture")
        if label is None:
            raise ValueError(
                f"labels_file {file} line {line}: {text!r} is no label; it must be a synset as {synsets[0]}"
                + (f", or a number 0..{len(synsets) - 1}" if name is not None else "")
            )
        if number in labels:
            raise ValueError(f"labels_file {file} line {line}: picture {number} has a label already")
        labels[number] = label
    return labels


def read_real_labels(file: str | Path | None) -> list[tuple[int, ...]]:
    """The label list of each validation picture, from real.json; None: timm's copy.

    Raises:
        ValueError: the file is no list of lists of labels 0..999.
    """
    if file is None:
        lists = json.loads(pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json"))
    else:
        try:
            lists = read_json(file)
        except OSError as error:
            raise ValueError(f"labels_file {file}: cannot be read ({error.strerror})") from None
        except ValueError as error:
            raise ValueError(f"labels_file {file}: {error}") from None
    if not isinstance(lists, list) or not lists:
        raise ValueError(f"labels_file {file}: must be a JSON list with a list of labels for each picture")
    for number, labels in enumerate(lists, start=1):
        if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < 1000 for label in labels):
            raise ValueError(f"labels_file {file}: entry {number} must be a list of labels 0..999, got {labels!r}")
    return [tuple(labels) for labels in lists]


def _rows(file: Path, lines: list[str]) -> Iterator[tuple[int, str | None, str]]:
    """(line number, picture's name or None, text of its label) of each line that is not empty."""
    if file.suffix.lower() == ".csv":
        try:
            rows = list(csv.reader(lines))
        except csv.Error as error:
            raise ValueError(f"labels_file {file}: malformed ({error})") from None
        for line, row in enumerate(rows, start=1):
            if len(row) < 2 or not row[1].split():
                raise ValueError(f"labels_file {file} line {line}: needs two columns, ImageId and PredictionString")
            if line > 1 or row[0] != "ImageId":
                yield line, row[0], row[1].split()[0]
        return
    for line, text in enumerate(lines, start=1):
        words = text.split()
        if len(words) > 2:
            raise ValueError(f"labels_file {file} line {line}: {text!r} is neither LABEL nor NAME LABEL")
        if words:
            yield line, words[0] if len(words) == 2 else None, words[-1]


def _read_devkit_classes(file: Path) -> dict[str, str]:
    """{class number of the development kit, as text: synset} from meta.mat beside its ground truth."""
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{file} needs scipy to read meta.mat (pip install scipy); or give a list of synsets as labels_file"
        ) from None
    try:
        rows = loadmat(file.with_name("meta.mat"), squeeze_me=True)["synsets"]
        return {str(int(row["ILSVRC2012_ID"])): str(row["WNID"]) for row in rows if int(row["num_children"]) == 0}
    except OSError:
        raise ValueError(
            f"labels_file {file}: its class numbers need the development kit's meta.mat beside it"
        ) from None
    except Exception as error:  # on broken bytes scipy raises struct.error, zlib.error, IndexError, MemoryError ...
        raise ValueError(f"{file.with_name('meta.mat')}: not the development kit's ({error})") from None


def _match_labels(names: list[str], labels: dict[int, int], file: str | Path) -> list[int]:
    numbers = [val_number(name) for name in names]
    missing = [name for name, number in zip(names, numbers) if number not in labels]
    if missing:
        raise ValueError(f"labels_file {file}: has no label for {len(missing)} pictures, as {missing[0]}")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{file}: two pictures have one number; a validation picture must be there once")
    return [labels[number] for number in numbers]
