"""Pictures with a class: one folder per class (ImageNet's layout among them), and torchvision's own data sets."""

from __future__ import annotations

import functools
import inspect
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torchvision
from PIL import Image
from timm.data import ImageNetInfo

from vmoe.data.dataset import ImageDataset, Sample
from vmoe.data.images import BadSample, to_rgb
from vmoe.data.sources.folder_layout import read_class_tree
from vmoe.utils.printable import escaped, is_unprintable
from vmoe.utils.safe_json import read_json, read_text

logger = logging.getLogger("vmoe.data")

IMAGE_FOLDER_LAYOUT = """
FOLDER/
├── cat/        (one folder per class)
│   ├── 1.jpg
│   └── 2.png
└── dog/
    └── 1.jpg
"""


# Those with splits and class names whose files are pictures or arrays. Others unpickle what they read, as LSUN does.
TORCHVISION = (
    "Country211",
    "DTD",
    "EMNIST",
    "FGVCAircraft",
    "FashionMNIST",
    "Flowers102",
    "Food101",
    "ImageNet",
    "Imagenette",
    "KMNIST",
    "MNIST",
    "OxfordIIITPet",
    "Places365",
    "QMNIST",
    "RenderedSST2",
    "STL10",
    "StanfordCars",
)


class LabelledFiles(ImageDataset):
    """Pictures in files, each with a label.

    Args:
        root: folder that the names start from.
        names: of the files, with `/` between folders.
        labels: one for each.
    """

    def __init__(self, root: str | Path, names: list[str], labels: list[int]) -> None:
        self.root = Path(root)
        self.names = names
        self.labels = labels

    def __len__(self) -> int:
        return len(self.names)

    def file_of(self, index: int) -> tuple[str, Path]:
        return self.names[index], self.root / self.names[index]

    def __getitem__(self, index: int) -> Sample:
        _, path = self.file_of(index)
        return Sample(self.read(path), self.labels[index], None, str(path))

    def read(self, path: Path) -> Image.Image:
        """The picture in a file, as the data set wants it; raises BadSample."""
        return self.load(path)


class ImageFolder(LabelledFiles):
    """One folder per class; labels are the positions of the sorted folder names, as in torchvision.

    ImageNet-1k's validation set in synset folders (n01440764, ...) is such a tree, and its labels are those of timm's
    ImageNet-1k classifiers. Unlike in torchvision, nothing but pictures may lie in the class folders, and nothing but
    class folders (and the file of class names) beside them.

    Args:
        path: the folder that holds the class folders.
        class_names: .txt (a name per line) or .json (list, or {folder: name}) file; None: the folders' names, or
            WordNet's words for them where all are known synsets.

    Raises:
        ValueError: the tree is not one folder of pictures per class (see `read_class_tree`), or class_names does not
            fit it.
    """

    def __init__(self, path: str | Path, class_names: str | Path | None = None) -> None:
        beside = [Path(class_names).name] if class_names is not None else []
        tree = read_class_tree(path, IMAGE_FOLDER_LAYOUT, allowed=beside)
        self.folders = list(tree)
        super().__init__(path, *flatten(tree, range(len(tree))))
        if class_names is not None:
            self.classes = read_class_names(Path(class_names), self.folders, path)
        else:
            self.classes = synset_words(self.folders) or [escaped(folder) for folder in self.folders]


def flatten(tree: Mapping[str, Sequence[str]], labels: Iterable[int]) -> tuple[list[str], list[int]]:
    """(names of all pictures, their labels) of {folder: its pictures} with a label for each folder."""
    names, all_labels = [], []
    for (folder, pictures), label in zip(tree.items(), labels, strict=True):
        names += [f"{folder}/{picture}" for picture in pictures]
        all_labels += [label] * len(pictures)
    return names, all_labels


class TorchvisionDataset(ImageDataset):
    """A classification data set of torchvision that is already on disk; nothing is downloaded.

    Args:
        name: class in torchvision.datasets ("FashionMNIST"), one of TORCHVISION.
        path: torchvision's `root`.
        split: "train" or "test" for data sets with a `train` argument; else passed on as their `split`.

    Raises:
        ValueError: no such data set or split, or its files are not there.
    """

    def __init__(self, name: str, path: str | Path, split: str = "train") -> None:
        if name not in TORCHVISION:
            raise ValueError(
                f"name must be a data set of torchvision that can be read here ({', '.join(TORCHVISION)}, CIFAR10, "
                f"CIFAR100), got {name!r}; save others as one folder per class (type image_folder)"
            )
        dataset_class = getattr(torchvision.datasets, name)
        parameters = inspect.signature(dataset_class).parameters
        if "train" in parameters:
            if split not in ("train", "test"):
                raise ValueError(f"split of torchvision's {name} must be train or test, got {split!r}")
            arguments = {"train": split == "train"}
        else:
            arguments = {"split": split}
        if "download" in parameters:
            arguments["download"] = False
        try:
            self.dataset = dataset_class(str(path), **arguments)
        except (RuntimeError, OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"torchvision's {name}, split {split!r}, cannot be opened in {path} ({error}); "
                "check path and split, and download it first with torchvision"
            ) from None
        self.name = f"{name}/{split}"
        self.classes = [str(name) for name in getattr(self.dataset, "classes", [])]
        if not self.classes:
            raise ValueError(f"torchvision's {name} names no classes; save it as one folder per class")
        if not len(self.dataset):
            raise ValueError(f"torchvision's {name}, split {split!r}, in {path} is empty; check its files")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        path = f"{self.name}[{index}]"
        try:
            image, label = self.dataset[index]
            image = to_rgb(image)
        except Exception as error:  # whatever the data set's own decoder raises on broken bytes
            raise BadSample(path, f"unreadable picture ({error})") from error
        if not 0 <= label < len(self.classes):
            raise ValueError(f"{path}: label {label} is out of range, the data set has {len(self.classes)} classes")
        return Sample(image, int(label), None, path)


@functools.cache
def _synsets() -> tuple[ImageNetInfo, frozenset[str]]:
    """WordNet's words, and the synsets of ImageNet; timm reads large files for them."""
    info = ImageNetInfo("imagenet-22k")
    return info, frozenset(info.label_names()) | frozenset(ImageNetInfo("imagenet-1k").label_names())


def synset_words(folders: list[str]) -> list[str] | None:
    """WordNet's words for ImageNet synsets, or None if a folder's name is not one."""
    info, known = _synsets()
    if not known.issuperset(folders):
        return None
    names = [info.label_name_to_description(folder) for folder in folders]
    # "crane" is a bird and a machine; where the words are the same, WordNet's explanation tells them apart.
    return [
        info.label_name_to_description(folder, detailed=True) if names.count(name) > 1 else name
        for folder, name in zip(folders, names)
    ]


def read_class_names(file: Path, folders: list[str] | None = None, path: str | Path | None = None) -> list[str]:
    """Names of classes from a .txt (a name per line) or .json (list, or {folder: name}) file.

    Args:
        file: the file.
        folders: the class folders that they name, in order; None: there are none, so it must be a list.
        path: the folder that holds those, for messages.

    Raises:
        ValueError: the file cannot be read, does not fit the folders, or has an empty name or one twice.
    """
    try:
        names = read_json(file) if file.suffix.lower() == ".json" else read_text(file).splitlines()
    except OSError as error:
        raise ValueError(f"class_names {file}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"class_names {file}: not valid UTF-8 text or JSON ({error})") from None
    if folders is None:
        if not isinstance(names, list) or not names:
            raise ValueError(f"class_names {file}: must list the names of the classes, the name of class 0 first")
        folders = [str(number) for number in range(len(names))]
    if isinstance(names, dict):
        missing = [folder for folder in folders if folder not in names]
        if missing:
            raise ValueError(f"class_names {file}: has no name for {len(missing)} folders of {path}, as {missing[0]!r}")
        names = [names[folder] for folder in folders]
    elif path is not None:
        warn_of_text_order(folders, f"class_names {file}")
    if not isinstance(names, list) or len(names) != len(folders):
        got = len(names) if isinstance(names, list) else "no list of"
        raise ValueError(f"class_names {file}: has {got} names, but {path} has {len(folders)} class folders")
    names = [str(name) for name in names]
    empty = [folder for folder, name in zip(folders, names) if not name.strip()]
    if empty:
        raise ValueError(f"class_names {file}: the name of class folder {empty[0]} is empty")
    strange = [name for name in names if any(map(is_unprintable, name))]
    if strange:
        raise ValueError(f"class_names {file}: the name {escaped(strange[0])} holds a control character")
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"class_names {file}: {repeated[0]!r} is given twice; names of classes must differ")
    return names


def warn_of_text_order(classes: Sequence[str], what: str) -> None:
    """Logs which label is which class where classes that differ only by a number are sorted as text: 0, 1, 10, 11, 2.

    Args:
        classes: in the order of the labels.
        what: is paired with them by its order, and may be in the order of the numbers.
    """

    def numbers(name: str) -> list[tuple[int, str]]:
        digits = [part.lstrip("0") for part in re.findall("[0-9]+", name)]
        return [(len(part), part) for part in digits]

    numbered = len({re.sub("[0-9]+", "", name) for name in classes}) == 1
    if numbered and list(classes) == sorted(classes) != sorted(classes, key=numbers):
        pairs = [f"{label} is {name!r}" for label, name in enumerate(classes[:5])]
        logger.warning(
            "the data's classes are sorted as text, as in torchvision: label %s, ...; check that %s has the same order",
            escaped(", ".join(pairs)), escaped(what),
        )  # fmt: skip
