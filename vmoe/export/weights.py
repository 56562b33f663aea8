"""A checkpoint of any run, sharded or not, as one safetensors file. The tensors are copied one by one, so the memory
need not hold the model."""

from __future__ import annotations

import json
from pathlib import Path

from vmoe.models.manifest import TRAINER, is_checkpoint
from vmoe.models.safetensors_writer import write_one_by_one
from vmoe.models.serialization import (
    METADATA_KEY,
    SETTINGS_NAME,
    StoredTensors,
    WeightsError,
    cannot_write,
    checkpoint_weights,
    find_weights,
    read_pretrained_metadata,
    safetensors_metadata,
)
from vmoe.utils.files import read_json

MAX_TRAINER_BYTES = 2**28  # of trainer.json, with the state of the optimizer's groups


def source_weights(source: str | Path, raw: bool) -> Path:
    """The weights that `eval.py` reads for a run or checkpoint; with `raw` those without a moving average."""
    weights = find_weights(source)  # compares the checkpoint with its checksums
    if raw and (Path(source).is_file() or not is_checkpoint(weights.parent)):
        raise WeightsError(f"{source} is no run, so --raw has no other weights to take; leave it out")
    return checkpoint_weights(weights.parent) if raw else weights


def describe(weights: Path) -> str:
    """Where weights are, and which they are, for the user."""
    average = checkpoint_weights(weights.parent, average=True)
    if not is_checkpoint(weights.parent):
        which = "the weights of that file"
    elif average is None:
        which = "the weights, which eval.py measures too; the run kept no moving average of them"
    elif weights != average:
        which = "the weights as they were trained, not their moving average, which eval.py measures"
    else:
        which = "the moving average of the weights, which eval.py measures too; --raw exports the weights themselves"
    return f"{weights}: {which}"


def metrics_of(weights: Path) -> dict[str, float]:
    """The metrics of a checkpoint's weights, if the run evaluated them when it wrote the checkpoint."""
    checkpoint = weights.parent
    measured = checkpoint_weights(checkpoint, average=True) or checkpoint_weights(checkpoint)
    if weights != measured or not (checkpoint / TRAINER).is_file():
        return {}
    trainer = read_json(checkpoint / TRAINER, MAX_TRAINER_BYTES)["trainer"]
    progress = trainer.get("progress", {})
    return progress["evaluation"] if progress and progress["evaluated"] == trainer["step"] else {}


def export(source: str | Path, output: str | Path, raw: bool = False) -> Path:
    """Writes a checkpoint's weights as one safetensors file, atomically; returns the file or folder that was read.

    `source` is a run's folder (its newest undamaged checkpoint), or a checkpoint's; `output` is replaced if it exists;
    `raw` takes the trained weights, even if the run kept a moving average of them. WeightsError: no such weights, they
    are damaged, or the file cannot be written there.
    """
    output = Path(output)
    if Path(source).is_file():
        raise WeightsError(f"{source} is one file already; give the folder of a run or of a checkpoint")
    if (Path(source) / SETTINGS_NAME).is_file():
        raise WeightsError(
            f"{source} is one part of a checkpoint; give the checkpoint's folder, and --raw for its model"
        )
    weights = source_weights(source, raw)
    metadata = safetensors_metadata(weights)
    if METADATA_KEY not in metadata:  # of a folder that timm or open_clip wrote, which has its settings in a config
        metadata = {"format": "pt", METADATA_KEY: json.dumps(read_pretrained_metadata(weights))}
    stored = StoredTensors(weights)
    try:
        write_one_by_one(output, stored.shapes, stored.dtypes, metadata, stored.read)
    except OSError as error:
        raise cannot_write(output, error) from error
    return weights
