"""COCO and Flickr30k with captions, in Karpathy's splits (arXiv 1412.2306)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vmoe.data.dataset import ImageDataset, Sample, caption_or_empty, clean_caption
from vmoe.data.images import leads_out
from vmoe.data.sources.folder_layout import TreeReader
from vmoe.utils.safe_json import read_json

# "restval" is the part of COCO's validation pictures that joins the training pictures.
SPLITS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}
MAX_BYTES = 2**30  # dataset_coco.json has 144 MB
LAYOUT = """
image_root/
├── train2014/                    (COCO)
│   └── COCO_train2014_000000000009.jpg
└── val2014/
    └── COCO_val2014_000000000042.jpg
or
image_root/
├── 1000092795.jpg                (Flickr30k)
└── ...
"""


class KarpathyCaptions(ImageDataset):
    """Pictures with several captions each; every caption is a sample, and `image_ids` says which picture it tells of.

    Args:
        path: dataset_coco.json, dataset_flickr30k.json or dataset_flickr8k.json.
        split: "train" ("restval" included), "val" or "test".
        image_root: folder that holds COCO's train2014 and val2014, or Flickr's pictures; None: the JSON file's own.

    Raises:
        ValueError: the file is none of Karpathy's, the split is empty, or none of its pictures is in image_root.
    """

    has_captions = True

    def __init__(self, path: str | Path, split: str, image_root: str | Path | None = None) -> None:
        self.root = Path(image_root) if image_root else Path(path).parent
        self.image_ids, self._captions = [], []
        found: dict[str, None] = {}
        for place, entry in enumerate(_read_images(Path(path))):
            name, entry_split, captions = _read_entry(entry, f"{path}: images[{place}]")
            if entry_split not in SPLITS[split]:
                continue
            if name in found:
                raise ValueError(f"{path}: images[{place}]: {name} is there already; a picture must be listed once")
            found[name] = None
            self.image_ids += [name] * len(captions)
            self._captions += captions
        if not self._captions:
            raise ValueError(f"{path}: holds no captions of split {split!r}")
        if not any((self.root / name).is_file() for name in found):
            first = next(iter(found))
            raise TreeReader(self.root, LAYOUT).error(
                f"holds none of the {len(found)} pictures of {Path(path).name}, as {first}; "
                "set image_root to their folder"
            )

    @property
    def captions(self) -> list[str]:
        return [caption_or_empty(caption) for caption in self._captions]

    def __len__(self) -> int:
        return len(self._captions)

    def file_of(self, index: int) -> tuple[str, Path]:
        return self.image_ids[index], self.root / self.image_ids[index]

    def __getitem__(self, index: int) -> Sample:
        _, path = self.file_of(index)
        caption = clean_caption(self._captions[index], str(path))
        return Sample(self.load(path), None, caption, str(path))


def _read_images(file: Path) -> list[dict[str, Any]]:
    try:
        content = read_json(file, MAX_BYTES)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror}); give Karpathy's JSON file as path") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not images:
        raise ValueError(f"{file}: has no list 'images', as Karpathy's files (dataset_coco.json) have")
    return images


def _read_entry(entry: dict[str, Any], where: str) -> tuple[str, str, list[str]]:
    """(name of the picture, its split, its captions) of an entry of `images`."""
    try:
        folder, name, split = entry.get("filepath", ""), entry["filename"], entry["split"]
        captions = [sentence["raw"].strip() for sentence in entry["sentences"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{where}: must have filename, split and sentences with a raw text each ({type(error).__name__}: {error})"
        ) from None
    for key, value in (("filename", name), ("filepath", folder), ("split", split)):
        if not isinstance(value, str):
            raise ValueError(f"{where}: {key} must be a text, got {value!r}")
    if not name:
        raise ValueError(f"{where}: filename is empty")
    path = f"{folder}/{name}" if folder else name
    if leads_out(path):
        raise ValueError(f"{where}: the picture {path} does not lie in image_root")
    known = [part for parts in SPLITS.values() for part in parts]
    if split not in known:
        raise ValueError(f"{where}: split must be one of {', '.join(known)}, got {split!r}")
    if not captions:
        raise ValueError(f"{where}: {name} has no sentences")
    return path, split, captions
