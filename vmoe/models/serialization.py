"""Weights in files: found, read, and loaded into models.

They are one safetensors file, or the folder of such files to which each process of a sharded run wrote its part. The
metadata says how to build the model (`vmoe.models.spec`).
"""

import logging
import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import add
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultLoadPlanner, HuggingFaceStorageReader
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata

from vmoe.models.hub_layout import OPEN_CLIP, folder_settings, hub_folder
from vmoe.models.manifest import MANIFEST, find_problems, list_checkpoints, newest_complete
from vmoe.models.validation import check_metadata
from vmoe.utils.files import HUB_SOURCES, parse_json, read_json
from vmoe.utils.printable import printable

logger = logging.getLogger("vmoe.models")

METADATA_KEY = "vmoe"
WEIGHTS_NAME, AVERAGE_NAME = "model.safetensors", "ema.safetensors"
SETTINGS_NAME = "settings.json"  # the metadata of a folder of shards
MAX_CELLS = 2**24  # into which shards may cut a tensor


class WeightsError(ValueError):
    """Weights that cannot be read or do not fit the model."""


def cannot_write(target: Path, error: OSError) -> WeightsError:
    """What to tell the user about an error of the disk."""
    reason = error.strerror or error
    return WeightsError(f"{target} cannot be written ({reason}); free some space or choose another folder")


def find_weights(path: str | Path) -> Path:
    """The file or folder of weights for a `.safetensors` path, a checkpoint, a run (its newest checkpoint), a folder of
    timm or open_clip, or "local-dir:FOLDER" or "hf-hub:ORG/NAME", which is downloaded.

    Of a checkpoint it is the moving average, if the run kept one. Files are compared with their checksums; damaged
    checkpoints of a run are skipped with a warning. A WeightsError if nothing is left.
    """
    if str(path).startswith(HUB_SOURCES):
        try:
            path = hub_folder(str(path))
        except ValueError as error:
            raise WeightsError(str(error)) from error
    path = Path(path)
    if (path / OPEN_CLIP[1]).is_file():
        return path / OPEN_CLIP[1]
    if path.is_file() or (path / SETTINGS_NAME).is_file():
        if (path.parent / MANIFEST).exists():
            _refuse_damage(path.parent, only=path.name)
        return path
    if checkpoint_weights(path) is not None or (path / MANIFEST).exists():
        _refuse_damage(path)
        checkpoint = path
    else:
        run = path.parent if path.name == "checkpoints" else path
        if not (checkpoints := list_checkpoints(run)):
            reason = f"it holds no {WEIGHTS_NAME} and no checkpoints" if path.exists() else "it does not exist"
            raise WeightsError(f"no weights at {path}: {reason}; give a .safetensors file, a checkpoint or a run")
        if (checkpoint := newest_complete(checkpoints, logger)) is None:
            problem = find_problems(checkpoints[-1])[0]
            raise WeightsError(f"all checkpoints of {run} are damaged, the newest one here: {problem}")
    found = checkpoint_weights(checkpoint, average=True) or checkpoint_weights(checkpoint)
    if found is None:
        raise WeightsError(f"{path} holds no {WEIGHTS_NAME}")
    return found


def checkpoint_weights(checkpoint: Path, average: bool = False) -> Path | None:
    """The weights in a checkpoint, or their moving average: a file or, of a sharded run, a folder, or None."""
    single = checkpoint / (AVERAGE_NAME if average else WEIGHTS_NAME)
    return next((path for path in (single, single.with_suffix("")) if path.exists()), None)


def _refuse_damage(checkpoint: Path, only: str = "") -> None:
    if problems := find_problems(checkpoint, only=only):
        raise WeightsError(f"{checkpoint} is damaged: {problems[0]}; take another checkpoint")


def read_pretrained_metadata(source: str | Path) -> dict:
    """{"name", "kwargs", "preprocess", "extra"} of weights that `save_pretrained` or a checkpoint wrote, or of a folder
    of timm or open_clip, checked."""
    text = safetensors_metadata(source).get(METADATA_KEY)
    try:
        metadata = folder_settings(Path(source)) if text is None else parse_json(text)
        if metadata is None:
            raise WeightsError(
                f"{source} holds no settings of a vmoe model: it was not written by this package, and no config of "
                "timm or open_clip is beside it"
            )
        check_metadata(metadata)
    except WeightsError:
        raise
    except ValueError as error:
        raise WeightsError(f"the settings in {source} are refused: {error}") from error
    return metadata


def stored_name(source: str | Path) -> str | None:
    """The name of the model in weights that `find_weights` finds, for a message; None if it cannot be read."""
    try:
        metadata = read_pretrained_metadata(find_weights(source))
    except WeightsError:
        return None
    return "an upcycled " * ("upcycle" in metadata) + printable(metadata["name"])


def safetensors_metadata(source: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file or of a folder of shards."""
    source = Path(source)
    if not source.is_dir():
        with _open(source) as opened:
            return opened.metadata() or {}
    file = source / SETTINGS_NAME
    try:
        metadata = read_json(file)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{file} cannot be read: {error}") from error
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise WeightsError(f"{file} is damaged: it must map names to text")
    return metadata


def _open(file: Path) -> safe_open:
    if not file.is_file():
        raise WeightsError(f"no weights at {file}: it does not exist")
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file} is not a readable safetensors file: {error}") from error


class StoredTensors:
    """The tensors in a safetensors file or a folder of shards; only `shapes` and `dtypes` by name are read at first.
    A WeightsError if a file cannot be read, or if the shards do not make complete tensors."""

    def __init__(self, source: str | Path) -> None:
        self.source = Path(source)
        if not self.source.is_dir():
            _open(self.source)  # with its own messages
        self._reader = HuggingFaceStorageReader(str(self.source))
        self._reader.fs = _SafetensorsFiles()
        with self._readable():
            self._metadata: Metadata = self._reader.read_metadata()
            entries = self._metadata.state_dict_metadata
            self.shapes = {name: entry.size for name, entry in entries.items()}
            self.dtypes = {name: entry.properties.dtype for name, entry in entries.items()}
            for name, entry in entries.items():
                parts = {(chunk.offsets, chunk.sizes) for chunk in entry.chunks}
                if not covers_once(entry.size, [(start, [*map(add, start, size)]) for start, size in parts]):
                    raise ValueError(f"its shards do not make the whole of {name}, {tuple(entry.size)}")

    def read_into(self, targets: dict[str, Tensor]) -> None:
        """Fills tensors of the stored shapes; of a DTensor this process's part, whatever wrote it."""
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with self._readable(), torch.no_grad():
            planner.set_up_planner(targets, self._metadata)
            self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
            self._reader.read_data(planner.create_local_plan(), planner)

    def read(self, name: str) -> Tensor:
        """A whole tensor, on the CPU."""
        tensor = torch.empty(self.shapes[name], dtype=self.dtypes[name])
        self.read_into({name: tensor})
        return tensor

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except MemoryError:
            raise
        except Exception as error:  # whatever the libraries raise for a damaged file
            raise WeightsError(f"{self.source} cannot be read: {printable(error) or type(error).__name__}") from error


def covers_once(shape: Sequence[int], boxes: Sequence[tuple[Sequence[int], Sequence[int]]]) -> bool:
    """Whether boxes, (first corner, corner behind the last), hold each element of an array exactly once."""
    for start, end in boxes:
        if len(start) != len(shape) or not all(0 <= a <= b <= size for a, b, size in zip(start, end, shape)):
            return False
    # The edges of all boxes cut the array into cells, each of which one box must hold.
    cuts = [sorted({0, size, *(corner[dim] for box in boxes for corner in box)}) for dim, size in enumerate(shape)]
    if math.prod(map(len, cuts)) > MAX_CELLS:
        return False
    times = np.zeros([len(edges) - 1 for edges in cuts], dtype=np.int32)
    for corners in boxes:
        first, last = ([bisect_left(*each) for each in zip(cuts, corner)] for corner in corners)
        times[tuple(map(slice, first, last))] += 1
    return bool((times == 1).all())


class _SafetensorsFiles(FileSystem):
    """Lets DCP's reader of folders read a single file."""

    def ls(self, path) -> list[str]:
        return sorted(super().ls(path)) if Path(path).is_dir() else [str(path)]


def load_weights(
    model: nn.Module, source: str | Path | StoredTensors, new_head: bool = False, new_size: bool = False
) -> None:
    """Load a safetensors file or a folder of shards into a model.

    The tensors may be DTensors on any mesh; those on the meta device stay there. With `new_head` the model keeps its
    classifier if the stored one has another number of classes, with `new_size` position embeddings of another image
    size are interpolated. If anything else does not fit, a WeightsError names it and nothing is loaded.
    """
    stored = source if isinstance(source, StoredTensors) else StoredTensors(source)
    metadata = parse_json(safetensors_metadata(stored.source).get(METADATA_KEY, "{}"))
    own, shapes = model.state_dict(), dict(stored.shapes)
    new = _new_head(model, own, stored) if new_head else []
    for name in new:
        shapes.pop(name, None)
        own.pop(name, None)
    resized = _resized_positions(model, own, stored, metadata) if new_size else {}
    shapes |= {name: tensor.shape for name, tensor in resized.items()}
    misfits = {
        "missing from the file": sorted(own.keys() - shapes.keys()),
        "not in the model": sorted(shapes.keys() - own.keys()),
        "other shape": [
            f"{name} is {tuple(shapes[name])} in the file, {tuple(tensor.shape)} in the model"
            for name, tensor in own.items()
            if name in shapes and shapes[name] != tensor.shape
        ],
    }
    if any(misfits.values()):
        raise WeightsError(_misfit(model, stored.source, metadata, misfits))
    if any(tensor.is_meta for tensor in own.values()):
        return  # another process holds the weights; here they only had to fit
    # For what a training run says of its weights.
    model.vmoe_loaded = {"source": str(stored.source), "tensors": len(own), "new": new, "resized": sorted(resized)}
    stored.read_into({name: own[name] for name in own if name not in resized})
    for name, tensor in resized.items():
        own[name].copy_(tensor)


def _misfit(model: nn.Module, source: Path, stored: dict, misfits: dict[str, list[str]]) -> str:
    """Why weights do not fit: they are another model's, or of other settings, or these tensors differ."""
    own = getattr(model, "vmoe_spec", None) or {}
    upcycled = "an upcycled "
    theirs, ours = (upcycled * ("upcycle" in spec) + printable(spec.get("name", "")) for spec in (stored, own))
    if theirs and ours and theirs != ours:
        return (
            f"{source} holds the weights of {theirs}, which do not fit {ours}: leave the model's name out to get "
            f"{theirs}, or give weights of {ours}"
        )
    kwargs, may_differ = stored.get("kwargs", {}), ("num_classes", "img_size")
    changed = [
        f"{key}={value!r}, not {repr(kwargs[key]) if key in kwargs else 'the default'}"
        for key, value in own.get("kwargs", {}).items()
        if (key not in kwargs or kwargs[key] != value) and key not in may_differ
    ]
    message = f"{source} does not fit the model"
    if changed and theirs:
        message += f", which has {'; '.join(changed)} as in the file: leave such settings out"
    for kind, tensors in misfits.items():
        if tensors:
            more = f" and {len(tensors) - 3} more" if len(tensors) > 3 else ""
            message += f"; {kind}: {', '.join(tensors[:3])}{more}"
    return message


def classifiers(model: nn.Module) -> Sequence[str]:
    """The names of a timm model's classifiers."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else names


def _new_head(model: nn.Module, own: dict[str, Tensor], stored: StoredTensors) -> list[str]:
    """The tensors of classifiers whose number of classes is not the stored one."""
    names = []
    for classifier in classifiers(model):
        weight = f"{classifier}.weight"
        new, old = own[weight].shape if weight in own else (), stored.shapes.get(weight, ())
        if new[:1] != old[:1]:
            logger.info("%s has another number of classes: %s starts from scratch", stored.source, classifier)
            names += [weight, f"{classifier}.bias"]
    return names


def _resized_positions(
    model: nn.Module, own: dict[str, Tensor], stored: StoredTensors, metadata: dict
) -> dict[str, Tensor]:
    """The stored position embeddings, interpolated to the model's grid of patches; those that need it."""
    patches = getattr(getattr(model, "visual", model), "patch_embed", None)
    if (grid := getattr(patches, "grid_size", None)) is None:
        return {}
    resized, old_size = {}, None  # None: a square
    if "preprocess" in metadata:
        sides = metadata["preprocess"]["input_size"][1:]
        old_size = [side // step for side, step in zip(sides, patches.patch_size, strict=True)]
    for name in {"pos_embed", "visual.pos_embed", "image_pos_embed"} & own.keys() & stored.shapes.keys():
        prefix = own[name].shape[1] - math.prod(grid) if own[name].ndim == 3 else -1
        if prefix < 0 or own[name].shape[2:] != stored.shapes[name][2:] or old_size == list(grid):
            continue  # positions of another kind are left to the comparison of shapes
        if old_size is None or math.prod(old_size) == stored.shapes[name][1] - prefix:
            resized[name] = resample_abs_pos_embed(stored.read(name), list(grid), old_size, num_prefix_tokens=prefix)
    return resized
