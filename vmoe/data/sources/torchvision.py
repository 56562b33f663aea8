"""torchvision's own classification data sets, from disk."""

import inspect

import numpy as np
from torch import Tensor
from torchvision import datasets

from vmoe.data.config import SourceConfig
from vmoe.data.dataset import ImageDataset, Sample
from vmoe.data.images import BadSample, to_rgb

# Those with splits and class names that unpickle nothing, and CIFAR, whose pickles are checked against torchvision's
# own checksums before they are opened. Others unpickle what they read unchecked, as LSUN does.
TORCHVISION = (
    "CIFAR10", "CIFAR100", "Country211", "DTD", "EMNIST", "FGVCAircraft", "FashionMNIST", "Flowers102", "Food101",
    "ImageNet", "Imagenette", "KMNIST", "MNIST", "OxfordIIITPet", "Places365", "QMNIST", "RenderedSST2", "STL10",
    "StanfordCars",
)  # fmt: skip


class TorchvisionDataset(ImageDataset):
    """A classification data set of torchvision that is already on disk; nothing is downloaded."""

    def __init__(self, source: SourceConfig) -> None:
        name, path, split = source.name, source.path, source.split
        if name not in TORCHVISION:
            raise ValueError(
                f"name must be a data set of torchvision that can be read here ({', '.join(TORCHVISION)}), got "
                f"{name!r}; save others as one folder per class (type image_folder)"
            )
        dataset_class = getattr(datasets, name)
        parameters = inspect.signature(dataset_class).parameters
        if "train" in parameters and split not in ("train", "test"):
            raise ValueError(f"split of torchvision's {name} must be train or test, got {split!r}")
        arguments = {"train": split == "train", "split": split, "download": False}
        try:
            self.dataset = dataset_class(path, **{key: arguments[key] for key in arguments if key in parameters})
        except (RuntimeError, OSError, ValueError, TypeError) as error:
            problem = f"torchvision's {name}, split {split!r}, cannot be opened in {path} ({error})"
            raise ValueError(f"{problem}; check path and split, and download it first with torchvision") from None
        self.name = f"{name}/{split}"
        self.classes = [str(name) for name in getattr(self.dataset, "classes", [])]
        if not self.classes or not len(self.dataset):
            what = "is empty" if self.classes else "names no classes"
            raise ValueError(f"torchvision's {name}, split {split!r}, in {path} {what}; check its files")
        self.decoded = isinstance(getattr(self.dataset, "data", None), np.ndarray | Tensor)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        path = f"{self.name}[{index}]"
        try:
            image, label = self.dataset[index]
            image = to_rgb(image)
        except Exception as error:  # whatever the data set's own decoder raises on broken bytes
            raise BadSample(path, f"unreadable image ({error})") from error
        if not 0 <= label < len(self.classes):
            raise ValueError(f"{path}: label {label} is out of range, the data set has {len(self.classes)} classes")
        return Sample(image, int(label), None, path)
