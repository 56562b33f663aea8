"""`export_model`: a model or the weights of a run as a file of any format, compared with the model after writing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import nn

from vmoe.export.check import TOLERANCE, Difference, Run, differences
from vmoe.export.formats import check_export
from vmoe.export.onnx import check_onnx, write_onnx
from vmoe.export.part import Part, take_part
from vmoe.export.program import trace, write_package, write_program
from vmoe.export.weights import describe, export, metrics_of, source_weights
from vmoe.models.factory import create_model, save_pretrained
from vmoe.models.hub import save_hub_folder
from vmoe.models.serialization import WeightsError, cannot_write, read_pretrained_metadata
from vmoe.utils.files import atomic_file


class Exported(NamedTuple):
    """What was written."""

    read: str  # where the weights are from, and which they are
    differences: list[Difference]  # from the model; empty for a format that holds only weights


def export_model(
    source: nn.Module | str | Path,
    output: str | Path,
    format: str = "safetensors",
    *,
    raw: bool = False,
    part: str | None = None,
    compile: bool = False,
    license: str | None = None,
    progress: Callable[[str], object] = lambda step: None,
) -> Exported:
    """Writes a model as a file, atomically: it is loaded again and compared with the model before it takes its name.

    Args:
        source: a model, or what `vmoe.create_model(pretrained=...)` reads: the folder of a run or checkpoint, a
            safetensors file, a hub's folder. Of a run the moving average is taken, which `eval.py` measures.
        output: the file, with the format's suffix, or the folder of a "hub"; it is replaced if it exists.
        format: "safetensors" (weights and settings), "hub" (`vmoe.save_hub_folder`), "pt2" (`torch.export`) or "onnx".
        raw: the trained weights of a run, instead of their moving average.
        part: "image", "text" or "both" of an image-text model, for "pt2" and "onnx"; None: all.
        compile: "pt2" as a package of AOTInductor, compiled for this machine.
        license: for the model card of a "hub", such as "apache-2.0". Its metrics are those of the run's evaluation.
        progress: gets the name of each step that may take long.

    ValueError: no such source or format, a model that the format cannot hold, or a file that cannot be written or
    differs from the model by more than 1e-5 of the largest output. ModuleNotFoundError: a package is missing.
    """
    output = Path(output)
    check_export(output, format, part=part, compile=compile, license=license)
    if format == "safetensors" and not isinstance(source, nn.Module):
        return Exported(describe(export(source, output, raw)), [])  # without building the model
    model, read, facts = _load(source, raw)
    rows = []
    try:
        if format == "safetensors":
            save_pretrained(model, output, facts["extra"])
        elif format == "hub":
            rows = _write_hub(model, output, license=license, **facts)
        else:
            write = write_onnx if format == "onnx" else write_package if compile else write_program
            rows = _write_graph(take_part(model, part), output, facts["extra"], write, progress)
    except OSError as error:
        raise cannot_write(output, error) from error
    return Exported(read, rows)


def _load(source: nn.Module | str | Path, raw: bool) -> tuple[nn.Module, str, dict[str, dict]]:
    """(the model, where its weights are from, "extra" of their file and "metrics" of the run's evaluation)."""
    if isinstance(source, nn.Module):
        if raw:
            raise WeightsError("--raw takes the weights of a run, and a model has one kind of weights; leave it out")
        return source, f"{type(source).__name__}: the weights that it has now", {"extra": {}, "metrics": {}}
    weights = source_weights(source, raw)
    facts = {"extra": read_pretrained_metadata(weights)["extra"], "metrics": metrics_of(weights)}
    return create_model(pretrained=weights), describe(weights), facts


def _write_hub(model: nn.Module, output: Path, **facts) -> list[Difference]:
    rows, part = [], take_part(model, None)

    def check(draft: Path) -> None:
        rows.extend(_compared(output, part, take_part(create_model(pretrained=draft), None)))

    save_hub_folder(model, output, **facts, check=check)
    return rows


def _write_graph(part: Part, output: Path, extra: dict, write: Callable[..., Run], progress) -> list[Difference]:
    """Writes a program beside `output`, compares it with the model, and gives it its name if they agree."""
    if write is write_onnx:
        check_onnx(part)
    metadata = {"inputs": part.inputs, "outputs": part.outputs, "preprocess": part.preprocess, "extra": extra}
    if part.contrastive:
        metadata["logit_scale"] = part.model.logit_scale.exp().item()
    with atomic_file(output) as draft:
        progress("tracing the model")
        program = trace(part)
        progress(f"writing {output}")
        run = write(part, program, metadata, draft)
        progress("comparing the file with the model")
        return _compared(output, part, run)


def _compared(output: Path, part: Part, run: Run) -> list[Difference]:
    """The differences of what was written from the model; ValueError: they are more than rounding."""
    rows = differences(part, run)
    worst = max(rows, key=lambda row: row.relative)
    if worst.relative > TOLERANCE:
        raise ValueError(
            f"{output} is not written: for a batch of {worst.batch} its {worst.output} would differ from the model's "
            f"by {worst.relative:.1e} of the largest, more than {TOLERANCE:.0e}; please report this model"
        )
    return rows
