"""COCO and Flickr30k with captions, in Karpathy's splits (arXiv 1412.2306)."""

from pathlib import Path
from typing import Any

from vmoe.data.config import SourceConfig
from vmoe.data.dataset import ImageFiles
from vmoe.data.images import file_errors, leads_out
from vmoe.utils.files import read_json

# "restval" is the part of COCO's validation images that joins the training images.
SPLITS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}
MAX_BYTES = 2**30  # dataset_coco.json has 144 MB


class KarpathyCaptions(ImageFiles):
    """Images with several captions each; every caption is a sample, and `image_ids` says which image it describes."""

    def __init__(self, source: SourceConfig) -> None:
        path, split = Path(source.path), source.split
        root = Path(source.image_root) if source.image_root else path.parent
        with file_errors(path, "; give Karpathy's JSON file as path"):
            images = read_json(path, MAX_BYTES, dict).get("images")
            if not isinstance(images, list):
                raise ValueError("has no list 'images', as Karpathy's files (dataset_coco.json) have")
        found: dict[str, list[str]] = {}
        for number, entry in enumerate(images):
            with file_errors(f"{path}: images[{number}]"):
                name, entry_split, captions = _read_entry(entry)
                if entry_split in SPLITS[split]:
                    if name in found:
                        raise ValueError(f"{name} is there already; an image must be listed once")
                    found[name] = captions
        if not found:
            raise ValueError(f"{path}: holds no captions of split {split!r}")
        if not any((root / name).is_file() for name in found):
            first = next(iter(found))
            raise ValueError(f"{root}: holds none of the {len(found)} images, as {first}; set image_root")
        self.image_ids = [name for name, captions in found.items() for _ in captions]
        super().__init__(root, self.image_ids, captions=[one for captions in found.values() for one in captions])


def _read_entry(entry: dict[str, Any]) -> tuple[str, str, list[str]]:
    """(name of the image, its split, its captions) of an entry of `images`."""
    try:
        name, split = "/".join(filter(None, (entry.get("filepath"), entry["filename"]))), entry["split"]
        captions = [sentence["raw"].strip() for sentence in entry["sentences"]]
    except (KeyError, TypeError, AttributeError) as error:
        problem = f"must have filename, split and sentences with a raw text each ({type(error).__name__}: {error})"
        raise ValueError(problem) from None
    if split not in (known := [part for parts in SPLITS.values() for part in parts]):
        raise ValueError(f"split must be one of {', '.join(known)}, got {split!r}")
    if not entry["filename"] or leads_out(name):
        raise ValueError(f"the image {name!r} is not inside image_root")
    if not captions:
        raise ValueError(f"{name} has no sentences")
    return name, split, captions
