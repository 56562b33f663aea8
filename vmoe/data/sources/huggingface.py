"""Data sets of Hugging Face's `datasets` on this machine: Parquet or Arrow files, read without the network."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vmoe.data.config import SourceConfig
from vmoe.data.dataset import ImageDataset, Sample, ShardedDataset, clean_caption
from vmoe.data.fingerprint import Fingerprint
from vmoe.data.images import BadSample, DataError
from vmoe.data.sources.captions import CAPTION_KEYS
from vmoe.utils.printable import printable

IMAGE_KEYS = ("image", "jpg", "png", "webp", "img")
LABEL_KEYS = ("label", "labels", "class", "target", "cls")  # usual names of a column of labels
SPLIT_NAMES = frozenset({"train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval"})
TEXT_TYPES = ("string", "large_string")
MAX_GROUP_BYTES = 2 * 2**30
OPENING_THREADS = 8


class _Rows(ImageDataset):
    """Samples in rows of a table: a column of images, and one of captions or labels or both."""

    def choose_columns(self, features: Any, source: SourceConfig) -> None:
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
        self.columns = list(filter(None, (self.image_column, self.caption_column, self.label_column)))

    def row(self, index: int) -> tuple[dict[str, Any], str]:
        """The values of a row by column, and its name for messages."""
        raise NotImplementedError

    def caption(self, index: int) -> str:
        row, name = self.row(index)
        return clean_caption(row[self.caption_column], name)

    def __getitem__(self, index: int) -> Sample:
        row, name = self.row(index)
        image, label = row[self.image_column], row.get(self.label_column)
        content = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(content, bytes):
            raise BadSample(name, f"column {self.image_column!r} holds no bytes of an image")
        caption = clean_caption(row[self.caption_column], name) if self.has_captions else None
        if self.classes is not None and (label is None or not 0 <= label < len(self.classes)):
            raise BadSample(name, f"label {label} is none of the {len(self.classes)} classes")
        return Sample(self.load(name, content), label, caption, name)


class HuggingFace(_Rows):
    """A split of a data set, through `datasets`: Arrow files are mapped into memory, Parquet ones copied into such."""

    def __init__(self, source: SourceConfig) -> None:
        path, split = source.path, source.split
        datasets = _datasets(path)
        self.name = f"{path}[{split}]"
        with _reading(path, "cannot be read"):
            table = _open(datasets, path, split)
        if not len(table):
            raise ValueError(f"{path}: split {split!r} is empty; check its files")
        self.choose_columns(table.features, source)
        if isinstance(table.features[self.image_column], datasets.Image):
            table = table.cast_column(self.image_column, datasets.Image(decode=False))
        self.table = table.select_columns(self.columns).with_format(None)

    @property
    def labels(self) -> list[int] | None:
        return None if self.label_column is None else self.table[self.label_column][:]

    def __len__(self) -> int:
        return len(self.table)

    def row(self, index: int) -> tuple[dict[str, Any], str]:
        return self.table[index], f"{self.name}[{index}]"


class ParquetRows(_Rows, ShardedDataset):
    """The rows of Parquet files, read one row group (a shard) at a time; those that a window covers are kept."""

    def __init__(self, source: SourceConfig) -> None:
        path, split = source.path, source.split
        datasets = _datasets(path)
        from pyarrow.parquet import read_metadata

        def metadata(file: Path) -> tuple[Any, Any]:
            with _reading(file, "cannot be read as Parquet"):
                facts = read_metadata(file)
                return facts, datasets.Features.from_arrow_schema(facts.schema.to_arrow_schema())

        self.shuffle_buffer, self.streams = source.shuffle_buffer or 1000, source.streams or 1
        self.files = find_files(path, split, ".parquet")
        if not self.files:
            raise ValueError(f"{path}: holds no .parquet file, and streaming reads no others; leave streaming out")
        with ThreadPoolExecutor(OPENING_THREADS) as pool:
            facts, features = zip(*pool.map(metadata, self.files))
        numbered = [(file, one, number) for file, one in zip(self.files, facts) for number in range(one.num_row_groups)]
        groups = {(file, number): one.row_group(number) for file, one, number in numbered}
        groups = {key: group for key, group in groups.items() if group.num_rows}
        if not groups:
            raise ValueError(f"{path}: split {split!r} is empty; check its files")
        largest = max(group.total_byte_size for group in groups.values())
        if largest > MAX_GROUP_BYTES:
            raise ValueError(f"{path}: has a row group of {largest} bytes, too large to stream; leave streaming out")
        self.groups = list(groups)
        self.set_sizes([group.num_rows for group in groups.values()])
        self.choose_columns(features[0], source)
        for file, others in zip(self.files, features):
            for name in self.columns:
                if others.get(name) != features[0][name]:
                    problem = f"column {name!r} is missing, of another type or with other classes than in"
                    raise DataError(f"{file}: {problem} {self.files[0]}; all files must have the same")
        self._kept: OrderedDict[int, Any] = OrderedDict()

    def row(self, index: int) -> tuple[dict[str, Any], str]:
        group, row = self.locate(index)
        table = self._table(group)
        file, number = self.groups[group]
        return {name: table[name][row].as_py() for name in self.columns}, f"{file}: row {row} of group {number}"

    def _table(self, group: int) -> Any:
        """The rows of a group; the groups that the last two windows of each stream met are kept.

        Two windows in a row cover at most 2 * shuffle_buffer rows and, at both ends, what is left of two groups.
        """
        if group not in self._kept:
            self._kept[group] = self._read(group)
            rows = sorted(len(table) for table in self._kept.values())
            # One more than needed is read before one is dropped.
            while len(rows) > 1 and sum(rows[: -2 * self.streams]) > 2 * self.shuffle_buffer * self.streams:
                rows.remove(len(self._kept.popitem(last=False)[1]))
        self._kept.move_to_end(group)
        return self._kept[group]

    def _read(self, group: int) -> Any:
        from pyarrow.parquet import ParquetFile

        path, number = self.groups[group]
        with _reading(path, f"row group {number} cannot be read"), ParquetFile(path) as file:
            return file.read_row_group(number, columns=self.columns)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": OrderedDict()}

    def _add_facts(self, facts: Fingerprint) -> None:
        facts.add("parquet", [self.columns, self.classes, self.sizes.tolist()])
        for file in self.files:
            facts.add_file(file.name, file)


def find_files(path: str, split: str, suffix: str) -> list[Path]:
    """The files of a split, sorted: with its name as a word in their name or folder (train-00000-of-00002.parquet).

    Where no file has a word for a split, all are "train".
    """
    root = Path(path)
    if root.is_file():
        return [root] if root.suffix == suffix else []
    files = sorted(root.rglob(f"*{suffix}"))
    parts = {file: set(re.split(r"[^a-z0-9]+", file.relative_to(root).as_posix().lower())) for file in files}
    found = [file for file in files if split.lower() in parts[file]]
    if not found and split == "train" and not any(parts[file] & SPLIT_NAMES for file in files):
        return files
    if files and not found:
        raise DataError(
            f"{path}: has no files of split {split!r}, only such as {files[0].relative_to(root)}; set split"
        )
    return found


def _open(datasets: Any, path: str, split: str) -> Any:
    """The split as a `datasets.Dataset`. Its readers are called themselves: load_dataset would ask the hub."""
    root = Path(path)
    if (root / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(path)
        if split not in splits:
            raise DataError(f"{path}: has no split {split!r}, only {', '.join(splits)}; set split")
        return splits[split]
    if (root / "state.json").is_file():
        return datasets.load_from_disk(path)
    if files := find_files(path, split, ".parquet"):
        return datasets.Dataset.from_parquet([str(file) for file in files], split=datasets.NamedSplit(split))
    if files := find_files(path, split, ".arrow"):
        return datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])
    raise DataError(f"{path}: holds no .parquet or .arrow file, and was not written by save_to_disk; check path")


@contextmanager
def _reading(path: str | Path, problem: str) -> Iterator[None]:
    """Turns whatever the readers of datasets and Arrow raise on broken files into a DataError."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = printable(error.__cause__ or error)[:300]  # datasets' own error often says only that one occurred
        raise DataError(f"{path}: {problem} ({reason}); download it again") from None


def _datasets(path: str) -> Any:
    """The package, if it is there and the path too."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        remedy = "pip install -e '.[hf]' in a checkout"
        raise ModuleNotFoundError(f"data of type 'hf' need the package {error.name}: {remedy}") from None
    if not Path(path).exists():
        raise DataError(f"{path}: no such folder; download the data set first, nothing is read from the network")
    return datasets


def _type(feature: Any) -> str:
    return str(getattr(feature, "dtype", feature))
