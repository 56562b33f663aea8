"""ImageNet-C (arXiv 1903.12261): ImageNet-1k's validation set under corruptions of five severities."""

from __future__ import annotations

import logging
from pathlib import Path

from vmoe.data.sources.folder import LabelledFiles, flatten
from vmoe.data.sources.folder_layout import TreeReader
from vmoe.data.sources.imagenet import imagenet_prompt_names, imagenet_synsets, imagenet_words

logger = logging.getLogger("vmoe.data")

# The 15 of the benchmark, in the paper's order; the 4 further ones of its download do not count into the mean.
CORRUPTIONS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
EXTRA_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
SEVERITIES = (1, 2, 3, 4, 5)
LAYOUT = """
FOLDER/
├── gaussian_noise/         (corruptions)
│   ├── 1/                  (severities, 1 to 5)
│   │   ├── n01440764/      (1,000 synset folders)
│   │   │   ├── ILSVRC2012_val_00000293.JPEG
│   │   │   └── ...
│   │   └── ...
│   └── ...
└── shot_noise/
"""


class ImageNetC(LabelledFiles):
    """Any of the corruptions and severities; every sample knows its condition, as "gaussian_noise/3".

    The pictures were cropped to 224 pixels before they were corrupted: an evaluation takes all of each, as the authors'
    own does.

    Args:
        path: the folder of the corruptions' folders.

    Attributes:
        missing_conditions: those of the benchmark's 75 that are not there; also logged.

    Raises:
        ValueError: the layout is another, a class is missing, or conditions do not have the same pictures.
    """

    crop_pct = 1.0

    def __init__(self, path: str | Path) -> None:
        tree = TreeReader(path, LAYOUT)
        found = tree.folders(known=[*CORRUPTIONS, *EXTRA_CORRUPTIONS], kind="corruption")
        self.conditions = []
        for corruption in (name for name in (*CORRUPTIONS, *EXTRA_CORRUPTIONS) if name in found):
            severities = tree.folders(corruption, known=[str(severity) for severity in SEVERITIES], kind="severity")
            self.conditions += [f"{corruption}/{severity}" for severity in severities]
        first, names, labels = self.conditions[0], [], []
        for condition in self.conditions:
            folders = tree.folders(condition, known=imagenet_synsets())
            tree.check_complete(folders, imagenet_synsets(), condition)
            here = flatten({name: tree.pictures(f"{condition}/{name}") for name in folders}, range(len(folders)))
            if condition == first:
                names, labels = here
            elif here[0] != names:
                other = min(set(names).symmetric_difference(here[0]))
                has, lacks = (first, condition) if other in names else (condition, first)
                raise ValueError(
                    f"{path}: {other} is in {has} and not in {lacks}; each condition must have the same pictures"
                )
        tree.warn_of_junk()
        # One list of names serves all conditions: the whole benchmark is 3.75 million pictures.
        super().__init__(path, names, labels * len(self.conditions))
        self.condition_of = [place for place in range(len(self.conditions)) for _ in names]
        self.classes = list(imagenet_words())
        self.prompt_names = list(imagenet_prompt_names())
        wanted = [f"{corruption}/{severity}" for corruption in CORRUPTIONS for severity in SEVERITIES]
        self.missing_conditions = [condition for condition in wanted if condition not in self.conditions]
        if self.missing_conditions:
            absent = [corruption for corruption in CORRUPTIONS if corruption not in found]
            single = [name for name in self.missing_conditions if name.partition("/")[0] in found]
            logger.warning(
                "imagenet_c: %d of 75 conditions are missing, so there is no mean corruption error: %s",
                len(self.missing_conditions),
                ", ".join(absent + single),
            )

    def __len__(self) -> int:
        return len(self.labels)

    def file_of(self, index: int) -> tuple[str, Path]:
        condition, place = divmod(index, len(self.names))
        name = f"{self.conditions[condition]}/{self.names[place]}"
        return name, self.root / name
