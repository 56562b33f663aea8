"""Pictures with a class: one folder per class (ImageNet's layout among them), and torchvision's own data sets."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import torchvision
from timm.data import ImageNetInfo
from torchvision.datasets import DatasetFolder

from vmoe.data.dataset import ImageDataset, Sample
from vmoe.data.images import IMAGE_SUFFIXES, BadSample, load_image, to_rgb


class ImageFolder(ImageDataset):
    """One folder per class; labels are the positions of the sorted folder names, as in torchvision.

    ImageNet-1k's validation set in synset folders (n01440764, ...) is such a tree, and its labels are those of timm's
    ImageNet-1k classifiers.

    Args:
        path: the folder that holds the class folders.
        class_names: .txt (a name per line) or .json (list, or {folder: name}) file; None: the folders' names, or
            WordNet's words for them where all are known synsets.

    Raises:
        ValueError: the folder or its pictures are missing, or class_names does not fit it.
    """

    def __init__(self, path: str | Path, class_names: str | Path | None = None) -> None:
        try:
            tree = DatasetFolder(str(path), loader=load_image, extensions=IMAGE_SUFFIXES)
        except FileNotFoundError as error:
            raise ValueError(f"{path}: not a folder with one folder of pictures per class ({error})") from None
        self.samples: list[tuple[str, int]] = tree.samples
        self.folders: list[str] = tree.classes
        if class_names is not None:
            self.classes = _read_class_names(Path(class_names), self.folders, path)
        else:
            self.classes = _synset_names(self.folders) or self.folders

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        path, label = self.samples[index]
        return Sample(load_image(path), label, None, path)


class TorchvisionDataset(ImageDataset):
    """A classification data set of torchvision that is already on disk; nothing is downloaded.

    Args:
        name: class in torchvision.datasets ("FashionMNIST").
        path: torchvision's `root`.
        split: "train" or "test" for data sets with a `train` argument; else passed on as their `split`.

    Raises:
        ValueError: no such data set or split, or its files are not there.
    """

    def __init__(self, name: str, path: str | Path, split: str = "train") -> None:
        dataset_class = getattr(torchvision.datasets, name, None)
        if not inspect.isclass(dataset_class):
            raise ValueError(f"name {name!r} is no data set of torchvision; see the classes in torchvision.datasets")
        parameters = inspect.signature(dataset_class).parameters
        if "train" in parameters:
            if split not in ("train", "test"):
                raise ValueError(f"split of torchvision's {name} must be train or test, got {split!r}")
            arguments = {"train": split == "train"}
        elif "split" in parameters:
            arguments = {"split": split}
        else:
            raise ValueError(f"torchvision's {name} has no splits; save it as one folder per class (type image_folder)")
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

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        path = f"{self.name}[{index}]"
        try:
            image, label = self.dataset[index]
            image = to_rgb(image)
        except Exception as error:  # whatever the data set's own decoder raises on broken bytes
            raise BadSample(path, f"unreadable picture ({error})") from error
        return Sample(image, int(label), None, path)


def _synset_names(folders: list[str]) -> list[str] | None:
    """WordNet's words for ImageNet synsets, or None if a folder's name is not one."""
    info = ImageNetInfo("imagenet-22k")
    known = set(info.label_names()) | set(ImageNetInfo("imagenet-1k").label_names())
    if not known.issuperset(folders):
        return None
    names = [info.label_name_to_description(folder) for folder in folders]
    # "crane" is a bird and a machine; where the words are the same, WordNet's explanation tells them apart.
    return [
        info.label_name_to_description(folder, detailed=True) if names.count(name) > 1 else name
        for folder, name in zip(folders, names)
    ]


def _read_class_names(file: Path, folders: list[str], path: str | Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")
        names = json.loads(text) if file.suffix.lower() == ".json" else text.splitlines()
    except OSError as error:
        raise ValueError(f"class_names {file}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise ValueError(f"class_names {file}: not valid UTF-8 text or JSON") from None
    if isinstance(names, dict):
        missing = [folder for folder in folders if folder not in names]
        if missing:
            raise ValueError(f"class_names {file}: has no name for {len(missing)} folders of {path}, as {missing[0]!r}")
        names = [names[folder] for folder in folders]
    if not isinstance(names, list) or len(names) != len(folders):
        got = len(names) if isinstance(names, list) else "no list of"
        raise ValueError(f"class_names {file}: has {got} names, but {path} has {len(folders)} class folders")
    return [str(name) for name in names]
