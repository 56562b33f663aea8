"""COCO and Flickr30k with captions, in Karpathy's splits (arXiv 1412.2306)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vmoe.data.config import SourceConfig
from vmoe.data.dataset import ImageFiles
from vmoe.data.images import file_errors, leads_out
from vmoe.data.sources.folder_layout import TreeReader
from vmoe.utils.files import read_json

# "restval" is the part of COCO's validation images that joins the training images.
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


class KarpathyCaptions(ImageFiles):
    """Images with several captions each; every caption is a sample, and `image_ids` says which image it describes."""

    def __init__(self, source: SourceConfig) -> None:
        path, split = Path(source.path), source.split
        root = Path(source.image_root) if source.image_root else path.parent
        with file_errors(path, "; give Karpathy's JSON file as path"):
            content = read_json(path, MAX_BYTES)
        images = content.get("images") if isinstance(content, dict) else None
        if not isinstance(images, list) or not images:
            raise ValueError(f"{path}: has no list 'images', as Karpathy's files (dataset_coco.json) have")
        found: dict[str, list[str]] = {}
        for number, entry in enumerate(images):
            name, entry_split, captions = _read_entry(entry, f"{path}: images[{number}]")
            if entry_split not in SPLITS[split]:
                continue
            if name in found:
                raise ValueError(f"{path}: images[{number}]: {name} is there already; an image must be listed once")
            found[name] = captions
        if not found:
            raise ValueError(f"{path}: holds no captions of split {split!r}")
        if not any((root / name).is_file() for name in found):
            raise TreeReader(root, LAYOUT).error(
                f"holds none of the {len(found)} images of {path.name}, as {next(iter(found))}; "
                "set image_root to their folder"
            )
        self.image_ids = [name for name, captions in found.items() for _ in captions]
        super().__init__(root, self.image_ids, captions=[one for captions in found.values() for one in captions])


def _read_entry(entry: dict[str, Any], where: str) -> tuple[str, str, list[str]]:
    """(name of the image, its split, its captions) of an entry of `images`."""
    try:
        folder, name, split = entry.get("filepath", ""), entry["filename"], entry["split"]
        captions = [sentence["raw"].strip() for sentence in entry["sentences"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{where}: must have filename, split and sentences with a raw text each ({type(error).__name__}: {error})"
        ) from None
    known = [part for parts in SPLITS.values() for part in parts]
    if split not in known:
        raise ValueError(f"{where}: split must be one of {', '.join(known)}, got {split!r}")
    for key, value in (("filename", name), ("filepath", folder)):
        if not isinstance(value, str) or (key == "filename" and not value):
            raise ValueError(f"{where}: {key} must be a text, got {value!r}")
    path = f"{folder}/{name}" if folder else name
    if leads_out(path):
        raise ValueError(f"{where}: the image {path} is not inside image_root")
    if not captions:
        raise ValueError(f"{where}: {name} has no sentences")
    return path, split, captions
