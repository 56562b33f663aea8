"""Data sets of Hugging Face's `datasets` on this machine: Parquet or Arrow files, read without the network."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vmoe.data.config import SourceConfig
from vmoe.data.dataset import ImageDataset, Sample, clean_caption
from vmoe.data.images import BadSample, DataError
from vmoe.data.sources.captions import CAPTION_KEYS
from vmoe.utils.optional import import_optional
from vmoe.utils.printable import printable

IMAGE_KEYS = ("image", "jpg", "png", "webp", "img")
LABEL_KEYS = ("label", "labels", "class", "target", "cls")  # usual names of a column of labels
SPLIT_NAMES = frozenset({"train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval"})
TEXT_TYPES = ("string", "large_string")


class HuggingFace(ImageDataset):
    """A split of a data set, through `datasets`: Arrow files are mapped into memory, Parquet ones copied into such."""

    def __init__(self, source: SourceConfig) -> None:
        path, split = source.path, source.split
        datasets = import_optional("datasets", "hf", "data of type 'hf' need")
        if not Path(path).exists():
            raise DataError(f"{path}: no such folder; download the data set first, nothing is read from the network")
        try:
            table = _open(path, split)
        except DataError:
            raise
        except Exception as error:  # whatever the readers of datasets and Arrow raise on broken files
            reason = printable(error.__cause__ or error)[:300]  # datasets' own often says only that one occurred
            raise DataError(f"{path}: cannot be read ({reason}); download it again") from None
        if not len(table):
            raise ValueError(f"{path}: split {split!r} is empty; check its files")
        self.name = f"{path}[{split}]"
        self._choose_columns(table.features, source)
        if isinstance(table.features[self.image_column], datasets.Image):
            table = table.cast_column(self.image_column, datasets.Image(decode=False))
        columns = list(filter(None, (self.image_column, self.caption_column, self.label_column)))
        self.table = table.select_columns(columns).with_format(None)

    def _choose_columns(self, features: Any, source: SourceConfig) -> None:
        """Sets which of the `datasets.Features` are read, by the settings or their usual names, and the classes."""
        from datasets import ClassLabel

        where, names = source.path, ", ".join(features)

        def pick(setting: str, usual: Sequence[str]) -> str | None:
            key = getattr(source, setting)
            if key is not None and key not in features:
                raise ValueError(f"{where}: has no column {key!r}, only {names}; set {setting}")
            return key if key is not None else next((one for one in usual if one in features), None)

        labels = [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
        self.image_column = pick("image_key", IMAGE_KEYS)
        self.caption_column = pick("caption_key", (*CAPTION_KEYS, "txt"))
        self.label_column = pick("label_key", labels if len(labels) == 1 else ())
        if self.image_column is None:
            raise ValueError(f"{where}: has no column of images, only {names}; set image_key")
        if self.caption_column is None and self.label_column is None:
            if labels:
                raise ValueError(f"{where}: has several columns of labels, {', '.join(labels)}; set label_key to one")
            self.label_column = next((name for name in LABEL_KEYS if name in features), None)  # for the advice below
        if self.label_column not in (None, *labels):
            name, kind = self.label_column, _type(features[self.label_column])
            call = f"cast_column({name!r}, ClassLabel(names=[...]))"
            if kind in TEXT_TYPES:
                call = f"class_encode_column({name!r})"
            raise ValueError(
                f"{where}: label_key {name!r} is no column of type ClassLabel but of {kind}: its classes have no "
                f"names; give them some with dataset.{call} of datasets, and save it again"
            )
        self.has_captions = self.caption_column is not None
        if not self.has_captions and self.label_column is None:
            raise ValueError(f"{where}: has neither captions nor labels among {names}; set caption_key or label_key")
        if self.has_captions and (kind := _type(features[self.caption_column])) not in TEXT_TYPES:
            raise ValueError(f"{where}: caption_key {self.caption_column!r} is a column of {kind}, not of text")
        self.classes = None if self.label_column is None else list(features[self.label_column].names)

    @property
    def labels(self) -> list[int] | None:
        return None if self.label_column is None else self.table[self.label_column][:]

    def __len__(self) -> int:
        return len(self.table)

    def caption(self, index: int) -> str:
        return clean_caption(self.table[index][self.caption_column], f"{self.name}[{index}]")

    def __getitem__(self, index: int) -> Sample:
        row, name = self.table[index], f"{self.name}[{index}]"
        image, label = row[self.image_column], row.get(self.label_column)
        content = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(content, bytes):
            raise BadSample(name, f"column {self.image_column!r} holds no bytes of an image")
        caption = clean_caption(row[self.caption_column], name) if self.has_captions else None
        if self.classes is not None and (label is None or not 0 <= label < len(self.classes)):
            raise BadSample(name, f"label {label} is none of the {len(self.classes)} classes")
        return Sample(self.load(name, content), label, caption, name)


def find_files(path: str, split: str, suffix: str) -> list[str]:
    """The files of a split, sorted: with its name as a word in their name or folder (train-00000-of-00002.parquet).

    Where no file has a word for a split, all are "train".
    """
    root = Path(path)
    if root.is_file():
        return [path] if root.suffix == suffix else []
    files = sorted(root.rglob(f"*{suffix}"))
    parts = {file: set(re.split(r"[^a-z0-9]+", file.relative_to(root).as_posix().lower())) for file in files}
    found = [file for file in files if split.lower() in parts[file]]
    if not found and split == "train" and not any(parts[file] & SPLIT_NAMES for file in files):
        found = files
    if files and not found:
        example = files[0].relative_to(root)
        raise DataError(f"{path}: has no files of split {split!r}, only such as {example}; set split")
    return list(map(str, found))


def _open(path: str, split: str) -> Any:
    """The split as a `datasets.Dataset`. Its readers are called themselves: load_dataset would ask the hub."""
    import datasets

    root = Path(path)
    if (root / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(path)
        if split not in splits:
            raise DataError(f"{path}: has no split {split!r}, only {', '.join(splits)}; set split")
        return splits[split]
    if (root / "state.json").is_file():
        return datasets.load_from_disk(path)
    if files := find_files(path, split, ".parquet"):
        return datasets.Dataset.from_parquet(files, split=datasets.NamedSplit(split))
    if files := find_files(path, split, ".arrow"):
        return datasets.concatenate_datasets(list(map(datasets.Dataset.from_file, files)))
    raise DataError(f"{path}: holds no .parquet or .arrow file, and was not written by save_to_disk; check path")


def _type(feature: Any) -> str:
    return str(getattr(feature, "dtype", feature))
