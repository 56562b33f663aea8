"""From a checkpoint on disk to one safetensors file, tensor by tensor."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch

from vmoe.convert.arrays import CheckpointError, StoredArray, list_names, select_params
from vmoe.convert.clip_moe import UNUSED as CLIP_MOE_UNUSED
from vmoe.convert.clip_moe import is_clip_moe, plan_clip_moe
from vmoe.convert.orbax import find_orbax, open_orbax
from vmoe.convert.reference_models import plan
from vmoe.convert.released import RELEASED
from vmoe.convert.section import ConfigError, Section
from vmoe.convert.siglino import UNUSED as SIGLINO_UNUSED
from vmoe.convert.siglino import is_siglino, plan_siglino
from vmoe.convert.swin_moe import find_swin_moe, plan_swin_moe
from vmoe.convert.torch_file import is_torch_file, open_torch
from vmoe.models.factory import file_metadata
from vmoe.models.safetensors_writer import write_one_by_one
from vmoe.models.serialization import read_pretrained_metadata
from vmoe.utils.files import read_json
from vmoe.utils.paths import check_output

# Files of PyTorch: name -> (whether arrays are of its model, what plans the model, arrays that it does not need).
PROJECTS = {
    "SigLino": (is_siglino, plan_siglino, SIGLINO_UNUSED),
    "CLIP-MoE": (is_clip_moe, plan_clip_moe, CLIP_MOE_UNUSED),
}


class Converted(NamedTuple):
    """What `convert_checkpoint` did; `skipped` arrays, such as optimizer state, are no weights of the model `name`."""

    source: str
    format: str
    arrays: int
    nbytes: int
    skipped: int
    name: str
    parameters: int


def open_checkpoint(source: str | Path, step: int | None = None) -> tuple[str, str, dict[str, StoredArray]]:
    """(path, format, arrays by name) of a checkpoint, without reading its numbers."""
    from vmoe.convert.sharded import find_sharded, open_sharded  # needs msgpack

    prefix = find_sharded(source, step)
    if prefix is not None:
        return prefix, "sharded", open_sharded(prefix)
    path = Path(source)
    if path.is_dir() and (folder := find_orbax(path, step)):
        return str(folder), "orbax", open_orbax(folder)
    found = "it is a file of another format" if path.is_file() else "there is nothing of that name"
    if path.is_dir():
        found = f"the folder holds {list_names(sorted(each.name for each in path.iterdir()))}"
    at = "" if step is None else f" of step {step}"
    raise CheckpointError(
        f"no checkpoint{at} at {source}: {found}; give the PREFIX of PREFIX.index, an Orbax folder or a .pt"
    )


def resolve_config(config: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The reference's model config, and fields for timm's `pretrained_cfg`, if they are known."""
    if isinstance(config, (str, Path)):
        if str(config) in RELEASED:
            return RELEASED[str(config)]
        file = Path(config)
        if not file.is_file():
            raise ValueError(f"--config must be a JSON file or one of {sorted(RELEASED)}, got {str(config)!r}")
        try:
            config = read_json(file)
        except (ValueError, OSError) as error:
            raise ValueError(f"{file} is not a readable JSON file: {error}") from error
    values = Section(config).values
    return (Section(values["model"], "model").values if "model" in values else values), {}


def convert_checkpoint(
    source: str | Path,
    config: str | Path | Mapping[str, Any] | None,
    file: str | Path,
    step: int | None = None,
    image_size: int | None = None,
    context_length: int | None = None,
    model: str | None = None,
) -> Converted:
    """Writes a checkpoint of another project as one of our files; the arrays pass through memory one by one.

    Args:
        source, step: the prefix of a sharded checkpoint of the reference, or the folder of an Orbax checkpoint; of a
            training run's checkpoints that of `step`, by default the last, is taken. Or a file of PyTorch, such as
            SigLino's and CLIP-MoE's `.pt`, or the ranks of a Swin-MoE (see `find_swin_moe`), recognised by their
            content.
        config: the name of a released checkpoint (`vmoe.convert.RELEASED`), a JSON file, or the dictionary itself; or
            an experiment's config with it as "model". Of other projects' models that were not released: the arguments
            of its constructor.
        file: a `.safetensors` file; replaced if it exists, untouched if anything fails.
        image_size, context_length: see `from_reference`, also for the errors.
        model: the name of a model, where the content of a file of PyTorch fits several.
    """
    file = Path(file)
    check_output(file, ".safetensors")
    files = find_swin_moe(source)
    if files or is_torch_file(source):
        if (step, image_size, context_length) != (None, None, None):
            raise ConfigError("step, image_size and context_length are of the reference's checkpoints: leave them out")
        args = None if config is None else resolve_config(config)[0]
        return _write(file, *(plan_swin_moe(files, args, model) if files else _plan_torch(source, args, model)))
    if config is None or model is not None:
        open_checkpoint(source, step)  # raises for what is none
        raise ConfigError(
            f"{source} is a checkpoint of the reference, which takes --config and no --model: a released name "
            f"({', '.join(RELEASED)}) or a JSON file"
        )
    model_config, preprocess = resolve_config(config)
    path, kind, arrays = open_checkpoint(source, step)
    stored, skipped = select_params(arrays, path)
    overlay = {"pretrained_cfg_overlay": preprocess} if preprocess else {}
    planned = plan(model_config, stored, path, image_size, context_length, **overlay)
    return _write(file, path, kind, stored, skipped, planned)


def _plan_torch(source: str | Path, args: Mapping[str, Any] | None, model: str | None) -> tuple:
    """What `_write` takes, for a file of PyTorch, recognised by its content."""
    arrays = open_torch(source)
    for kind, (fits, plan_model, unused) in PROJECTS.items():
        if fits(arrays):
            stored = {name: array for name, array in arrays.items() if name not in unused}
            return str(source), kind, stored, len(arrays) - len(stored), plan_model(arrays, source, args, model)
    raise CheckpointError(f"{source} is of no model that can be converted; it holds {list_names(sorted(arrays))}")


def _write(
    file: Path, path: str, kind: str, stored: Mapping[str, StoredArray], skipped: int, planned: tuple
) -> Converted:
    """Writes the model of a plan, tensor by tensor."""
    name, _, model, rows = planned
    sizes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    metadata = file_metadata(model, {"converted_from": Path(path).name})

    def read(tensor: str) -> torch.Tensor:
        result = torch.zeros(sizes[tensor], dtype=torch.float32)
        for entry, fill in rows:
            if entry.tensor == tensor:
                fill(entry.view(result.numpy()))
        return result

    write_one_by_one(file, sizes, dict.fromkeys(sizes, torch.float32), metadata, read)
    nbytes, parameters = sum(array.nbytes for array in stored.values()), sum(map(math.prod, sizes.values()))
    return Converted(path, kind, len(stored), nbytes, skipped, name, parameters)


def pretrained_cfg(file: str | Path) -> dict[str, Any]:
    """timm's description of a file, whose settings are all that `timm.create_model` needs:

    cfg = vmoe.convert.pretrained_cfg(FILE)
    timm.create_model(cfg["architecture"], pretrained=True, pretrained_cfg=cfg)
    """
    metadata = read_pretrained_metadata(file)
    name = metadata["name"]
    if not timm.is_model(name):
        raise ValueError(f"{file} holds a {name}, which timm does not know; use vmoe.create_model")
    config = timm.get_pretrained_cfg(name).to_dict()
    config |= {key: tuple(v) if isinstance(v, list) else v for key, v in metadata["preprocess"].items()}
    classes = metadata["kwargs"].get("num_classes", config["num_classes"])
    return {**config, "architecture": name, "num_classes": classes, "file": str(file)}
