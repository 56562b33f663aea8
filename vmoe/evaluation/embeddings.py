"""Embeddings of a data set's images in one file, for search; made in parts, so that a stopped command continues.

Shapes, by suffix: N images, B batch, D features.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from bisect import bisect_left
from contextlib import suppress
from itertools import count, groupby
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from vmoe.data import ImageDataset, LoaderConfig, eval_loader
from vmoe.evaluation.features import features_key, image_features
from vmoe.evaluation.inference import evaluating
from vmoe.evaluation.loaded_model import LoadedModel, weights_fingerprint
from vmoe.evaluation.results_file import Progress, library_versions
from vmoe.models.spec import model_spec
from vmoe.utils.config import ConfigError
from vmoe.utils.files import atomic_file
from vmoe.utils.paths import check_index, check_new_index, import_pyarrow

logger = logging.getLogger("vmoe.evaluation")

PART_IMAGES = 1024  # what a stopped command does again at most
FORMAT = "vmoe embeddings 2"
# Key and number of a part; those that start with a dot are left by a kill.
PART = re.compile(r"\.?([0-9a-f]{16})-\d{8}(\.\w+)?\.npz")


class Embeddings(NamedTuple):
    """Embeddings of images, in the data set's order."""

    embeddings_ND: np.ndarray  # float16, of length 1
    paths: list[str]  # the image files, absolute, or other names of the samples
    captions: list[str] | None  # an image's first
    labels: list[str] | None  # names of the classes
    about: dict[str, Any]  # the model (name, weights, sha256, ...), the data's fingerprint, the skipped images


def embed_images(
    loaded: LoadedModel,
    dataset: ImageDataset,
    output: str | Path,
    loader_config: LoaderConfig,
    console: Console | None = None,
) -> Embeddings:
    """Writes the embeddings of all images of a data set as .parquet or .npz, atomically; returns them.

    They are those of `image_features`, divided by their length, one for each image. Until all are done, finished parts
    lie in `OUTPUT.parts`; the same call continues there, with the same result. Images that cannot be read are skipped.

    Raises:
        ConfigError: `output` has another ending or cannot be written; pyarrow is missing.
        ValueError: no image can be read, or embeddings are not finite in float16.
    """
    output = Path(output)
    check_new_index(output)
    parts = output.with_name(f"{output.name}.parts")
    _check_parts(parts, output)
    size = math.ceil(PART_IMAGES / loader_config.batch_size) * loader_config.batch_size  # whole batches
    facts = f"{FORMAT}{features_key(loaded, dataset, loader_config)}{size}"
    key = hashlib.sha256(facts.encode()).hexdigest()[:16]
    if _remove(parts, but=key):
        logger.warning("%s held parts of another model, other data or other settings: they are removed", parts)
    indices = _one_per_image(dataset)
    _make_parts(loaded, dataset, loader_config, indices, size, parts, key, console or Console(quiet=True))
    found = [_load(file) for file in sorted(parts.glob(f"{key}-*.npz"))]
    if not found:
        raise ValueError(f"none of the {len(indices)} images can be read; the first is {_name(dataset, indices[0])}")
    columns = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    index_N = columns["index"].tolist()
    skipped = sorted(set(indices).difference(index_N))
    result = Embeddings(
        columns["embeddings"],
        [_name(dataset, index) for index in index_N],
        [_utf8(caption) for caption in dataset.read_captions(index_N)] if dataset.has_captions else None,
        [_utf8(dataset.classes[label]) for label in columns["label"]] if dataset.classes is not None else None,
        {
            "format": FORMAT,
            "model": model_spec(loaded.model)["name"],
            "weights": str(loaded.weights.absolute()),
            "sha256": weights_fingerprint(loaded.weights),
            "precision": loaded.precision,
            "data": dataset.fingerprint(),
            "skipped": [_name(dataset, index) for index in skipped],
            "versions": library_versions(),
        },
    )
    write_embeddings(result, output)
    _remove(parts)
    return result


def _name(dataset: ImageDataset, index: int) -> str:
    file = dataset.file_of(index)
    return _utf8(dataset.name_of(index) if file is None else str(file[1].absolute()))


def _one_per_image(dataset: ImageDataset) -> list[int]:
    """For each image the index of its first sample; of several captions of an image, the first that can be used."""
    samples: dict[Path | int, list[int]] = {}
    for index in range(len(dataset)):
        file = dataset.file_of(index)
        samples.setdefault(index if file is None else file[1].absolute(), []).append(index)
    for of_image in samples.values():
        while len(of_image) > 1 and dataset.has_captions and dataset.read_captions(of_image[:1]) == [""]:
            del of_image[0]
    return sorted(of_image[0] for of_image in samples.values())


# --- the parts ---


def _check_parts(parts: Path, output: Path) -> None:
    """ConfigError unless this module made all that is where the parts go."""
    if os.path.lexists(parts) and not (parts.is_dir() and all(map(PART.fullmatch, os.listdir(parts)))):
        problem = "is where unfinished embeddings are kept, and holds something else"
        raise ConfigError(f"{parts} {problem}: move it away, or give another output than {output}")


def _remove(parts: Path, but: str | None = None) -> bool:
    """Removes the parts, but those of a key, and their folder if nothing else is in it; whether there were any."""
    names = {file: PART.fullmatch(file.name) for file in parts.glob("*")}
    files = [file for file, name in names.items() if name and name[1] != but]
    for file in files:
        file.unlink()
    with suppress(OSError):
        parts.rmdir()
    return bool(files)


def _make_parts(
    loaded: LoadedModel,
    dataset: ImageDataset,
    loader_config: LoaderConfig,
    indices: list[int],
    size: int,
    parts: Path,
    key: str,
    console: Console,
) -> None:
    """Writes the parts from the first missing one on, each of `size` indices; none without a readable image."""
    done = {int(file.stem.rpartition("-")[2]) for file in parts.glob(f"{key}-*.npz")}
    start = size * next(number for number in count() if number not in done)
    if start >= len(indices):
        return
    if start:
        console.print(f"continues after {start} of {len(indices)} images", style="dim", highlight=False)
    loader = eval_loader(dataset, loaded.transform, None, loader_config, indices=indices[start:])

    def part_of(batch: dict[str, Tensor]) -> int:
        return bisect_left(indices, batch["index"][0].item()) // size

    with evaluating(loaded.model, loaded.device, loaded.precision):
        for part, batches in groupby(Progress(loader, "embeddings", console), part_of):
            rows = [_embed(loaded, batch) for batch in batches]
            with atomic_file(parts / f"{key}-{part:08}.npz") as draft:
                np.savez(draft, **{name: np.concatenate([row[name] for row in rows]) for name in rows[0]})


def _embed(loaded: LoadedModel, batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """The columns of a part for a batch."""
    features_BD = image_features(loaded.model, batch["image"].to(loaded.device)).float()
    features_BD = F.normalize(features_BD, dim=1).half().cpu()
    if not features_BD.isfinite().all():
        raise ValueError("embeddings of a batch are not finite in float16: try precision float32")
    others = {name: batch[name].numpy() for name in ("index", "label") if name in batch}
    return {"embeddings": features_BD.numpy(), **others}


# --- the file ---


def write_embeddings(found: Embeddings, file: Path) -> None:
    """Writes a .parquet or .npz file, atomically: columns path, caption, label, embedding; the rest as metadata.

    In .npz the texts of a column are one JSON list: an array of texts gives each the length of the longest.
    """
    columns = {"path": found.paths, "caption": found.captions, "label": found.labels}
    columns = {name: values for name, values in columns.items() if values is not None}
    about = json.dumps(found.about)
    with atomic_file(file) as draft:
        if file.suffix == ".npz":
            with open(draft, "wb") as stream:
                texts = {name: json.dumps(values) for name, values in columns.items()}
                np.savez(stream, embedding=found.embeddings_ND, about=about, **texts)
            return
        pa = import_pyarrow()
        embeddings = pa.FixedSizeListArray.from_arrays(found.embeddings_ND.ravel(), found.embeddings_ND.shape[1])
        table = pa.table({**columns, "embedding": embeddings}, metadata={"vmoe": about})
        pa.parquet.write_table(table, draft)


def read_embeddings(file: str | Path) -> Embeddings:
    """Reads what `embed_images` wrote; ValueError: it did not write this file, or the file cannot be read."""
    file = Path(file)
    check_index(file)
    try:
        found = _read_npz(file) if file.suffix == ".npz" else _read_parquet(file)
        if found.about["format"] != FORMAT or found.embeddings_ND.shape[:1] != (len(found.paths),):
            raise ValueError
    except ConfigError:
        raise
    # Errors of pyarrow and zipfile are among these.
    except (OSError, EOFError, KeyError, ValueError, TypeError, RuntimeError, BadZipFile):
        raise ValueError(f"{file} holds no embeddings of vmoe-embed, or is damaged: make it again") from None
    return found


def _read_npz(file: Path) -> Embeddings:
    columns = _load(file)
    texts = [json.loads(str(columns[name])) if name in columns else None for name in ("path", "caption", "label")]
    return Embeddings(columns["embedding"], *texts, json.loads(str(columns["about"])))


def _read_parquet(file: Path) -> Embeddings:
    table = import_pyarrow().parquet.read_table(file)
    about = json.loads(table.schema.metadata[b"vmoe"])
    embeddings = table["embedding"].combine_chunks()
    embeddings_ND = embeddings.flatten().to_numpy().reshape(len(embeddings), -1)
    texts = [table[name].to_pylist() if name in table.column_names else None for name in ("path", "caption", "label")]
    return Embeddings(embeddings_ND, *texts, about)


def _load(file: Path) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as content:
        return dict(content)


def _utf8(text: str) -> str:
    """Names of files need not be UTF-8; what is not becomes an escape."""
    return text.encode("utf-8", "backslashreplace").decode()
