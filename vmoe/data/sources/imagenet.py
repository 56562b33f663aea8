"""ImageNet-1k's validation set and the test sets made for its classifiers, in the layouts of their downloads.

Labels and words are timm's (sorted synsets), names for prompts open_clip's; both in the order of ImageNet-1k's outputs.
All raise ValueError where the layout is another, a class is missing, or files do not fit together.
"""

import functools
import json
import logging
import pkgutil
import re
from collections.abc import Sequence
from pathlib import Path

from timm.data import ImageNetInfo

from vmoe.data.config import SourceConfig
from vmoe.data.dataset import ImageFiles
from vmoe.data.images import file_errors
from vmoe.data.sources.folder import synset_words
from vmoe.data.sources.folder_layout import TreeReader
from vmoe.utils.files import read_json, read_text

logger = logging.getLogger("vmoe.data")

LAYOUTS = {
    "imagenet": "SYNSET/IMAGE, such as n01440764/ILSVRC2012_val_00000293.JPEG, in 1,000 folders; or all images in one "
    "folder, with a file of labels in it or beside it",
    "imagenet_v2": "LABEL/IMAGE, such as 0/1.jpeg, in folders 0 to 999",
    "imagenet_a": "SYNSET/IMAGE, such as n01498041/1.jpg, in 200 folders",
    "imagenet_r": "SYNSET/IMAGE, such as n01443537/art_0.jpg, in 200 folders",
    "imagenet_sketch": "SYNSET/IMAGE, such as n01440764/sketch_0.JPEG, in 1,000 folders",
    "imagenet_c": "CORRUPTION/SEVERITY/SYNSET/IMAGE, such as fog/1/n01440764/ILSVRC2012_val_00000293.JPEG",
}
# Images in the published sets; another number is pointed out, since results are then not comparable.
PUBLISHED_SIZES = {
    **{"imagenet": 50_000, "imagenet_v2": 10_000, "imagenet_a": 7_500, "imagenet_r": 30_000},
    **{"imagenet_sketch": 50_889, "imagenet_real": 46_837},
}
# Looked for in this order, in the folder of the images and in the one above.
LABELS_FILES = ("imagenet_2012_validation_synset_labels.txt", "synset_labels.txt", "LOC_val_solution.csv", "val.txt")
# The 15 of the benchmark, in the paper's order; the 4 further ones of its download do not count into the mean.
CORRUPTIONS = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
EXTRA_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
SEVERITIES = (1, 2, 3, 4, 5)
_VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})(\.jpe?g)?", re.IGNORECASE)


@functools.cache
def imagenet_synsets() -> tuple[str, ...]:
    """The 1,000 synsets of ImageNet-1k in the order of its labels."""
    return tuple(ImageNetInfo("imagenet-1k").label_names())


@functools.cache
def imagenet_words() -> tuple[str, ...]:
    """WordNet's words for the 1,000 classes, in the order of the labels; no two are equal."""
    return tuple(synset_words(ImageNetInfo("imagenet-1k").label_names()))


@functools.cache
def imagenet_prompt_names() -> tuple[str, ...]:
    """open_clip's names of the 1,000 classes, in the order of the labels.

    Two pairs are equal in the published list, and stay so: "missile" (657 and 744) and "sunglasses" (836 and 837).
    """
    from open_clip import IMAGENET_CLASSNAMES

    return tuple(IMAGENET_CLASSNAMES)


class _ImageNetFiles(ImageFiles):
    """Images of ImageNet's classes, or of those in the given columns of its outputs.

    Logs if the set `kind` was published with another number of images.
    """

    def __init__(
        self, path: str, names: list[str], labels: list[int], kind: str, columns: Sequence[int] = range(1000)
    ) -> None:
        super().__init__(path, names, labels)
        self.classes = [imagenet_words()[column] for column in columns]
        self.prompt_names = [imagenet_prompt_names()[column] for column in columns]
        published = PUBLISHED_SIZES.get(kind, len(self))
        if len(self) != published:
            logger.warning("%s: %s images, the published set has %s", kind, f"{len(self):,}", f"{published:,}")


class ImageNet(_ImageNetFiles):
    """ImageNet-1k's validation set; ImageNet-V2 (1902.10811), -A (1907.07174), -R (2006.16241), -Sketch (1905.13549).

    A folder per class: named by label in V2, else by synset. The validation set may also be in one folder, with a file
    of labels. -A and -R have 200 of the classes, by timm's tables, and labels 0 to 199; a classifier of 1,000 classes
    is judged by its outputs for the 200, as in the papers.
    """

    def __init__(self, source: SourceConfig) -> None:
        path, kind, columns, allowed = source.path, source.type, range(1000), ()
        if kind in ("imagenet_a", "imagenet_r"):
            columns = [int(line) for line in pkgutil.get_data("timm.data", f"_info/{kind}_indices.txt").split()]
            self.class_columns = [[column] for column in columns]
            allowed = ("README.txt",)  # in both downloads
        named = kind != "imagenet_v2"
        folders = [imagenet_synsets()[column] if named else str(column) for column in columns]
        tree = TreeReader(path, LAYOUTS[kind])
        if kind == "imagenet" and any(val_number(name) for name in tree.entries()[1]):
            names, labels = flat_images(tree, source.labels_file)
        elif source.labels_file is not None:
            raise ValueError(f"labels_file {source.labels_file}: the folders of {path} are the labels; leave it out")
        else:
            _, names, labels = tree.class_tree(folders, allowed)
        super().__init__(path, names, labels, kind, columns)


class ImageNetReal(_ImageNetFiles):
    """ImageNet-1k's validation set with the reassessed labels of "Are we done with ImageNet?" (arXiv 2006.07159).

    The images are in synset folders, or all in one folder. An image has all labels that its raters found in it. Those
    with none are excluded, as in the paper.
    """

    def __init__(self, source: SourceConfig) -> None:
        path, real = source.path, read_real_labels(source.labels_file)
        tree = TreeReader(path, LAYOUTS["imagenet"])
        names = tree.class_tree(imagenet_synsets())[1] if tree.entries()[0] else tree.images()
        tree.warn_of_junk()
        numbers = [val_number(name) for name in names]
        if strange := [name for name, number in zip(names, numbers) if number not in range(1, len(real) + 1)]:
            raise ValueError(
                f"{Path(path) / strange[0]}: ReaL knows images by their official names, ILSVRC2012_val_00000001.JPEG "
                f"to {len(real):08d}; rename it or remove it"
            )
        kept = {name: tuple(real[number - 1]) for name, number in zip(names, numbers) if real[number - 1]}
        if not kept:
            raise ValueError(f"{path}: none of the {len(names)} images has a label in ReaL")
        self.label_sets = list(kept.values())
        self.left_out = {"images without a label in ReaL": len(names) - len(kept)}
        super().__init__(path, list(kept), [labels[0] for labels in self.label_sets], source.type)


class ImageNetC(_ImageNetFiles):
    """ImageNet-C (arXiv 1903.12261): any of the corruptions and severities; samples know theirs ("gaussian_noise/3").

    The images were cropped to 224 pixels before they were corrupted: an evaluation takes all of each, as the authors'.
    """

    crop_pct = 1.0

    def __init__(self, source: SourceConfig) -> None:
        path, known = source.path, (*CORRUPTIONS, *EXTRA_CORRUPTIONS)
        tree = TreeReader(path, LAYOUTS["imagenet_c"])
        self.conditions = []
        for corruption in sorted(tree.folders(known=known), key=known.index):
            severities = tree.folders(corruption, known=list(map(str, SEVERITIES)))
            self.conditions += [f"{corruption}/{severity}" for severity in severities]
        # One list of names serves all conditions: the whole benchmark is 3.75 million images.
        first, *others = self.conditions
        _, names, labels = tree.class_tree(imagenet_synsets(), inside=first)
        for condition in others:
            if (here := tree.class_tree(imagenet_synsets(), inside=condition)[1]) != names:
                other = min(set(names).symmetric_difference(here))
                problem = f"{other} is in one of {first} and {condition}"
                raise ValueError(f"{path}: {problem}; each condition must have the same images")
        self.condition_of = [number for number in range(len(self.conditions)) for _ in names]
        super().__init__(path, names, labels * len(self.conditions), source.type)
        wanted = [f"{corruption}/{severity}" for corruption in CORRUPTIONS for severity in SEVERITIES]
        if missing := [condition for condition in wanted if condition not in self.conditions]:
            message = "imagenet_c: %d of 75 conditions are missing, so there is no mean corruption error: %s"
            logger.warning(message, len(missing), ", ".join(missing))

    def __len__(self) -> int:
        return len(self.labels)

    def file_of(self, index: int) -> tuple[str, Path]:
        condition, position = divmod(index, len(self.names))
        name = f"{self.conditions[condition]}/{self.names[position]}"
        return name, self.root / name


def val_number(name: str) -> int | None:
    """The number in an image's official name (ILSVRC2012_val_00000001.JPEG: 1), or None for another name."""
    match = _VAL_NAME.fullmatch(name.rpartition("/")[2])
    return int(match[1]) if match else None


def flat_images(tree: TreeReader, labels_file: str | None) -> tuple[list[str], list[int]]:
    """(names, labels) of the validation images in one folder; without `labels_file`, the first of LABELS_FILES."""
    names = tree.images(allowed=[*LABELS_FILES, Path(labels_file or "").name])
    tree.warn_of_junk()
    if labels_file is None:
        candidates = [folder / name for folder in (tree.root, tree.root.resolve().parent) for name in LABELS_FILES]
        labels_file = next((file for file in candidates if file.is_file()), None)
        if labels_file is None:
            raise tree.error(f"has no file of labels: set labels_file, or put one of {', '.join(LABELS_FILES)} there")
    label_of = read_val_labels(labels_file)
    if missing := [name for name in names if val_number(name) not in label_of]:
        raise ValueError(
            f"labels_file {labels_file}: has no label for {len(missing)} images, as {missing[0]}; "
            "take the file that belongs to them, or move other images away"
        )
    labels = [label_of[val_number(name)] for name in names]
    if missing := set(range(1000)).difference(labels):
        raise ValueError(f"{tree.root}: {len(missing)} classes have no image, as {imagenet_synsets()[min(missing)]}")
    return names, labels


def read_val_labels(file: str | Path) -> dict[int, int]:
    """{number of the image: label} from one of the files in which the labels are published; ValueError: it is none.

    They have a synset per line, in the order of the images (TensorFlow's imagenet_2012_validation_synset_labels.txt),
    or lines `NAME LABEL` with a synset or a label 0..999 (Caffe's val.txt, and Kaggle's LOC_val_solution.csv).
    """
    with file_errors(f"labels_file {file}"):
        lines = read_text(file).splitlines()
    synsets = {synset: label for label, synset in enumerate(imagenet_synsets())}
    numbered = synsets | {str(label): label for label in range(1000)}
    labels: dict[int, int] = {}
    for line, text in enumerate(lines, start=1):
        first, *others = re.split(r"[,\s]+", text.strip())
        if first in ("", "ImageId"):  # Kaggle's header
            continue
        number, label = (val_number(first), numbered.get(others[0])) if others else (line, synsets.get(first))
        if number is None or label is None or number in labels:
            raise ValueError(
                f"labels_file {file} line {line}: must be a synset as n01440764, or the name of a validation image "
                f"with a synset or a label 0..999, each image once; got {text!r}"
            )
        labels[number] = label
    return labels


def read_real_labels(file: str | None) -> list[list[int]]:
    """The labels of each validation image, from ReaL's real.json (None: timm's copy); ValueError: it is malformed."""
    if file is None:
        return json.loads(pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json"))
    with file_errors(f"labels_file {file}"):
        lists = read_json(file)
        if not isinstance(lists, list) or not lists:
            raise ValueError("must be a JSON list with a list of labels for each image")
        for number, labels in enumerate(lists, start=1):
            if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < 1000 for label in labels):
                raise ValueError(f"entry {number} must be a list of labels 0..999, got {labels!r}")
    return lists
