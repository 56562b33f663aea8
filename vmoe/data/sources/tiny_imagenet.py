"""Tiny-ImageNet-200, in the layout of its download (http://cs231n.stanford.edu/tiny-imagenet-200.zip)."""

import logging
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from vmoe.data.config import SourceConfig
from vmoe.data.dataset import ImageFiles
from vmoe.data.images import file_errors
from vmoe.data.sources.folder_layout import TreeReader
from vmoe.data.sources.imagenet import imagenet_prompt_names, imagenet_synsets
from vmoe.utils.files import read_text
from vmoe.utils.printable import escaped

logger = logging.getLogger("vmoe.data")

LAYOUT = "train/SYNSET/images/IMAGE, val/images/IMAGE, val/val_annotations.txt, wnids.txt and words.txt"
PUBLISHED_SIZES = {"train": 100_000, "val": 10_000}
FROM_DOWNLOAD = "take the file of tiny-imagenet-200.zip"


class TinyImageNet(ImageFiles):
    """The split "train" or "val"; labels are the positions of the sorted synsets, as of an image folder and timm's.

    The synsets are those of wnids.txt. ValueError: the layout is another, a class is missing, or an image of "val" has
    no line in val_annotations.txt, or a line no image.
    """

    def __init__(self, source: SourceConfig) -> None:
        self.tree = TreeReader(source.path, LAYOUT)
        folder = "train" if source.split == "train" else "val/images"
        if not (self.tree.root / folder).is_dir():
            raise self.tree.error(f"has no folder {folder}")
        self.synsets = self._read_synsets()
        names, labels = self._train_images() if source.split == "train" else self._val_images()
        self.tree.warn_of_junk()
        super().__init__(source.path, names, labels)
        self.classes = self._read_words()
        if set(self.synsets).issubset(imagenet_synsets()):
            name_of = dict(zip(imagenet_synsets(), imagenet_prompt_names()))
            self.prompt_names = [name_of[synset] for synset in self.synsets]
        if len(self) != (published := PUBLISHED_SIZES[source.split]):
            found = f"{len(self):,} images, the published set has {published:,}"
            logger.warning("tiny_imagenet, split %s: %s", source.split, found)

    def _lines(self, name: str) -> Iterator[tuple[str, list[str]]]:
        """(file and line, for messages; its cells, between tabs) of the lines of a file that are not empty."""
        file = self.tree.root / name
        if not file.is_file():
            raise ValueError(f"{file}: no such file; {FROM_DOWNLOAD} (see docs/evaluation.md)")
        with file_errors(file):
            lines = read_text(file).splitlines()
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{file} line {number}", line.strip().split("\t")

    def _read_synsets(self) -> list[str]:
        synsets: set[str] = set()
        for where, (synset, *others) in self._lines("wnids.txt"):
            if others or not re.fullmatch(r"n\d{8}", synset) or synset in synsets:
                found = "\t".join([synset, *others])
                raise ValueError(f"{where}: must be a synset, as n01443537, each once, got {found!r}; {FROM_DOWNLOAD}")
            synsets.add(synset)
        if not synsets:
            raise ValueError(f"{self.tree.root / 'wnids.txt'}: holds no synset; {FROM_DOWNLOAD}")
        return sorted(synsets)

    def _read_words(self) -> list[str]:
        """WordNet's words for the classes; where two are equal, the synset tells them apart."""
        wanted, words = set(self.synsets), {}
        for where, (synset, *others) in self._lines("words.txt"):
            if synset in wanted:
                if len(others) != 1:
                    raise ValueError(f"{where}: must be a synset, a tab and its words; {FROM_DOWNLOAD}")
                words[synset] = escaped(others[0].strip())
        if missing := sorted(wanted.difference(words)):
            file = self.tree.root / "words.txt"
            raise ValueError(f"{file}: has no words for {len(missing)} classes, as {missing[0]}; {FROM_DOWNLOAD}")
        counts = Counter(words.values())
        return [words[one] if counts[words[one]] == 1 else f"{words[one]} ({one})" for one in self.synsets]

    def _train_images(self) -> tuple[list[str], list[int]]:
        folders = self.tree.folders("train", known=self.synsets, wanted=self.synsets)
        for folder in folders:
            self.tree.folders(f"train/{folder}", ["images"], ["images"], allowed=[f"{folder}_boxes.txt"])
        return self.tree.class_images([f"train/{folder}/images" for folder in folders])

    def _val_images(self) -> tuple[list[str], list[int]]:
        """(names, labels) in the order of the sorted names."""
        label_of, images = self._read_annotations(), set(self.tree.images("val/images"))
        folder, file = self.tree.root / "val" / "images", "val_annotations.txt"
        if missing := sorted(label_of.keys() - images):
            number = "an image that is" if len(missing) == 1 else f"{len(missing)} images that are"
            lists = f"{file} lists {number} not there"
            raise ValueError(f"{folder}: {lists}, as {missing[0]}; unpack the download again")
        if unlisted := sorted(images - label_of.keys()):
            number = "an image that is" if len(unlisted) == 1 else f"{len(unlisted)} images that are"
            lists = f"holds {number} not in {file}"
            raise ValueError(f"{folder}: {lists}, as {unlisted[0]}; remove them or add their lines")
        if absent := sorted(set(range(len(self.synsets))).difference(label_of.values())):
            missing = f"{len(absent)} classes of wnids.txt have no image, as {self.synsets[absent[0]]}"
            raise ValueError(f"{folder.with_name(file)}: {missing}; {FROM_DOWNLOAD}")
        return [f"val/images/{name}" for name in sorted(label_of)], [label_of[name] for name in sorted(label_of)]

    def _read_annotations(self) -> dict[str, int]:
        """{name of the image: label} of val_annotations.txt, whose further columns are the object's box."""
        number_of, labels = {synset: number for number, synset in enumerate(self.synsets)}, {}
        for where, (name, *others) in self._lines("val/val_annotations.txt"):
            if not others or not re.fullmatch(r"n\d{8}", others[0]) or name in labels or Path(name).name != name:
                rule = "must be the name of an image, a tab and its synset, each image once"
                raise ValueError(f"{where}: {rule}, got {chr(9).join([name, *others])!r}; {FROM_DOWNLOAD}")
            if others[0] not in number_of:
                classes = f"none of the {len(number_of)} classes of wnids.txt"
                raise ValueError(f"{where}: {name} is of class {others[0]}, {classes}; {FROM_DOWNLOAD}")
            labels[name] = number_of[others[0]]
        return labels
