"""ImageNet-1k's validation set and the test sets made for its classifiers, in the layouts of their downloads.

Labels and words are timm's (sorted synsets), names for prompts open_clip's; both in the order of ImageNet-1k's outputs.
"""

from __future__ import annotations

import functools
import logging
import pkgutil
from pathlib import Path

from timm.data import ImageNetInfo

from vmoe.data.sources.folder import LabelledFiles, flatten, synset_words
from vmoe.data.sources.folder_layout import read_class_tree
from vmoe.data.sources.imagenet_val import find_val_pictures, read_real_labels, val_number

logger = logging.getLogger("vmoe.data")

SYNSET_LAYOUT = """
FOLDER/
├── n01440764/       (a folder per synset)
│   ├── sketch_0.JPEG
│   └── ...
├── n01443537/
└── ... (1,000 folders)
"""
SUBSET_LAYOUT = """
FOLDER/
├── n01498041/       (a folder per synset, 200 in all)
│   ├── 1.jpg
│   └── ...
├── ...
└── README.txt
"""
V2_LAYOUT = """
FOLDER/
├── 0/               (a folder per label)
│   ├── 1.jpeg
│   └── ...
├── 1/
└── ... (up to 999)
"""
PART_OF_CLASSES = " (for a tree with other classes use data type image_folder)"
# Pictures in the published sets; another number is pointed out, since figures are then not comparable.
PUBLISHED_SIZES = {
    "imagenet": 50_000,
    "imagenet_v2": 10_000,
    "imagenet_a": 7_500,
    "imagenet_r": 30_000,
    "imagenet_sketch": 50_889,
    "imagenet_real": 46_837,
}


@functools.cache
def imagenet_synsets() -> tuple[str, ...]:
    """The 1,000 synsets of ImageNet-1k in the order of its labels."""
    return tuple(ImageNetInfo("imagenet-1k").label_names())


@functools.cache
def imagenet_words() -> tuple[str, ...]:
    """WordNet's words for the 1,000 classes, in the order of the labels; no two are equal."""
    return tuple(synset_words(list(imagenet_synsets())))


@functools.cache
def imagenet_prompt_names() -> tuple[str, ...]:
    """open_clip's names of the 1,000 classes, in the order of the labels.

    Two pairs are equal in the published list, and stay so: "missile" (657 and 744) and "sunglasses" (836 and 837).
    """
    from open_clip import IMAGENET_CLASSNAMES

    return tuple(IMAGENET_CLASSNAMES)


def warn_of_size(kind: str, number: int) -> None:
    """Logs that a set has another number of pictures than was published."""
    if number != PUBLISHED_SIZES[kind]:
        logger.warning("%s: %s pictures, the published set has %s", kind, f"{number:,}", f"{PUBLISHED_SIZES[kind]:,}")


class ImageNet(LabelledFiles):
    """ImageNet-1k's validation set: in synset folders, or flat as in its archive, with a file of labels.

    Args:
        path: the folder of the synset folders, or of ILSVRC2012_val_00000001.JPEG and so on.
        labels_file: of a flat folder only, see `read_val_labels`; None: the one found in the folder or beside it.

    Raises:
        ValueError: the layout is another, a class is missing, or labels do not fit the pictures.
    """

    def __init__(self, path: str | Path, labels_file: str | Path | None = None) -> None:
        super().__init__(path, *find_val_pictures(path, imagenet_synsets(), labels_file))
        self.classes = list(imagenet_words())
        self.prompt_names = list(imagenet_prompt_names())
        warn_of_size("imagenet", len(self))


class ImageNetReal(LabelledFiles):
    """ImageNet-1k's validation set with the reassessed labels of "Are we done with ImageNet?" (arXiv 2006.07159).

    A picture has all labels that its raters found in it. Those with none are left out, as the paper does.

    Args:
        path: as for `ImageNet`; a flat folder needs no file of labels.
        labels_file: real.json, a list with the list of labels of each picture; None: timm's copy of it.

    Raises:
        ValueError: the layout is another, or the labels do not fit the pictures.
    """

    def __init__(self, path: str | Path, labels_file: str | Path | None = None) -> None:
        names, _ = find_val_pictures(path, imagenet_synsets(), None, need_labels=False)
        real = read_real_labels(labels_file)
        label_sets = []
        for name in names:
            number = val_number(name)
            if number is None or number > len(real):
                raise ValueError(
                    f"{Path(path) / name}: ReaL knows pictures by their official names, ILSVRC2012_val_00000001.JPEG "
                    f"to {len(real):08d}; rename it or remove it"
                )
            label_sets.append(real[number - 1])
        kept = [index for index, labels in enumerate(label_sets) if labels]
        if not kept:
            raise ValueError(f"{path}: none of the {len(names)} pictures has a label in ReaL")
        self.label_sets = [label_sets[index] for index in kept]
        super().__init__(path, [names[index] for index in kept], [labels[0] for labels in self.label_sets])
        self.left_out = {"pictures without a label in ReaL": len(names) - len(kept)}
        self.classes = list(imagenet_words())
        self.prompt_names = list(imagenet_prompt_names())
        warn_of_size("imagenet_real", len(self))


class ImageNetV2(LabelledFiles):
    """ImageNet-V2 (arXiv 1902.10811): folders named by label, 0 to 999.

    Args:
        path: the folder of one of its variants, as imagenetv2-matched-frequency-format-val.

    Raises:
        ValueError: the layout is another, or a class is missing.
    """

    def __init__(self, path: str | Path) -> None:
        tree = read_class_tree(path, V2_LAYOUT, [str(label) for label in range(1000)], " (folders are named 0 to 999)")
        tree = {str(label): tree[str(label)] for label in range(1000)}  # as numbers, not as texts
        super().__init__(path, *flatten(tree, range(1000)))
        self.classes = list(imagenet_words())
        self.prompt_names = list(imagenet_prompt_names())
        warn_of_size("imagenet_v2", len(self))


class ImageNetSketch(LabelledFiles):
    """ImageNet-Sketch (arXiv 1905.13549): one folder for each of the 1,000 synsets.

    Args:
        path: the folder of the synset folders.

    Raises:
        ValueError: the layout is another, or a class is missing.
    """

    def __init__(self, path: str | Path) -> None:
        tree = read_class_tree(path, SYNSET_LAYOUT, imagenet_synsets(), PART_OF_CLASSES)
        super().__init__(path, *flatten(tree, range(1000)))
        self.classes = list(imagenet_words())
        self.prompt_names = list(imagenet_prompt_names())
        warn_of_size("imagenet_sketch", len(self))


class ImageNetSubset(LabelledFiles):
    """ImageNet-A (arXiv 1907.07174) or ImageNet-R (arXiv 2006.16241): 200 of the synsets, by timm's tables.

    Labels are 0 to 199. A classifier of 1,000 classes is judged by its outputs for the 200, as in the papers.

    Args:
        path: the folder of the synset folders.
        kind: "imagenet_a" or "imagenet_r".

    Raises:
        ValueError: the layout is another, or a class is missing.
    """

    def __init__(self, path: str | Path, kind: str) -> None:
        columns = [int(line) for line in pkgutil.get_data("timm.data", f"_info/{kind}_indices.txt").split()]
        synsets = [imagenet_synsets()[column] for column in columns]
        remedy = f" ({kind} has 200 of ImageNet's synsets; for a tree with other classes use data type image_folder)"
        tree = read_class_tree(path, SUBSET_LAYOUT, synsets, remedy, allowed=["README.txt"])  # in both downloads
        super().__init__(path, *flatten({synset: tree[synset] for synset in synsets}, range(len(synsets))))
        self.class_columns = [[column] for column in columns]
        self.classes = [imagenet_words()[column] for column in columns]
        self.prompt_names = [imagenet_prompt_names()[column] for column in columns]
        warn_of_size(kind, len(self))
