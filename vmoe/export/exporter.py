"""`export_model`: a model or the weights of a run as a file of any format, compared with the model after writing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import nn

from vmoe.export.check import TOLERANCE, Difference, differences, exceeds
from vmoe.export.onnx import check_onnx, write_onnx
from vmoe.export.part import take_part
from vmoe.export.program import trace, write_package, write_program
from vmoe.export.weights import cannot_write, check_output, describe, export, metrics_of, source_weights
from vmoe.models.factory import create_model, save_pretrained
from vmoe.models.hub import save_hub_folder
from vmoe.models.serialization import WeightsError, read_pretrained_metadata
from vmoe.utils.files import atomic_file


class Options(NamedTuple):
    """What a format may be asked for."""

    part: str | None = None
    compile: bool = False
    license: str | None = None
    extra: dict | None = None  # facts of the weights' file, such as class names
    metrics: dict | None = None  # of the run's evaluation of these weights


class Exported(NamedTuple):
    """What was written."""

    read: str  # where the weights are from, and which they are
    differences: list[Difference]  # from the model; empty for a format that holds only weights


def _write_safetensors(model: nn.Module, output: Path, options: Options) -> list[Difference]:
    save_pretrained(model, output, options.extra)
    return []


def _write_hub(model: nn.Module, output: Path, options: Options) -> list[Difference]:
    rows = []

    def check(draft: Path) -> None:
        rows.extend(differences(take_part(model, None), take_part(create_model(pretrained=draft), None)))
        _refuse_difference(f"{output} is not written", rows)

    save_hub_folder(model, output, options.metrics, options.license, options.extra, check)
    return rows


def _write_pt2(model: nn.Module, output: Path, options: Options) -> list[Difference]:
    return _write_graph(model, output, options, write_package if options.compile else write_program)


def _write_onnx(model: nn.Module, output: Path, options: Options) -> list[Difference]:
    return _write_graph(model, output, options, write_onnx)


def _write_graph(model: nn.Module, output: Path, options: Options, write: Callable) -> list[Difference]:
    """Writes a program beside `output`, compares it with the model, and gives it its name if they agree."""
    part = take_part(model, options.part)
    if write is write_onnx:
        check_onnx(part)
    metadata = {"inputs": part.inputs, "outputs": part.outputs, "preprocess": part.preprocess}
    metadata["extra"] = options.extra or {}
    if part.contrastive:
        metadata["logit_scale"] = part.model.logit_scale.exp().item()
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(output) as draft:
        rows = differences(part, write(part, trace(part), metadata, draft))
        _refuse_difference(f"{output} is not written", rows)
    return rows


def _refuse_difference(fate: str, rows: list[Difference]) -> None:
    if (worst := exceeds(rows)) is not None:
        raise ValueError(
            f"{fate}: for a batch of {worst.batch} its {worst.output} would differ from the model's by "
            f"{worst.relative:.1e} of the largest, more than {TOLERANCE:.0e}; please report this model"
        )


class Format(NamedTuple):
    suffix: str  # of the file; "": a folder
    write: Callable[[nn.Module, Path, Options], list[Difference]]


FORMATS = {
    "safetensors": Format(".safetensors", _write_safetensors),
    "hub": Format("", _write_hub),
    "pt2": Format(".pt2", _write_pt2),
    "onnx": Format(".onnx", _write_onnx),
}


def export_model(
    source: nn.Module | str | Path,
    output: str | Path,
    format: str = "safetensors",
    *,
    raw: bool = False,
    part: str | None = None,
    compile: bool = False,
    license: str | None = None,
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

    ValueError: no such source or format, a model that the format cannot hold, or a file that cannot be written or
    differs from the model by more than 1e-5 of the largest output. ModuleNotFoundError: a package is missing.
    """
    output = Path(output)
    if format not in FORMATS:
        raise ValueError(f"--format {format}: choose one of {', '.join(FORMATS)}")
    if compile and format != "pt2":
        raise ValueError(f"--compile makes a package of the format pt2, not {format}; leave it out or choose pt2")
    if part is not None and format not in ("pt2", "onnx"):
        raise ValueError(f"--part is for the formats pt2 and onnx, {format} holds the whole model; leave it out")
    if license is not None and format != "hub":
        raise ValueError(f"--license is for the model card of the format hub, {format} has none; leave it out")
    if format == "safetensors" and not isinstance(source, nn.Module):
        weights = export(source, output, raw)  # without building the model
        return Exported(f"{weights}: {describe(weights)}", [])
    check_output(output, FORMATS[format].suffix)
    model, read, facts = _load(source, raw)
    try:
        return Exported(read, FORMATS[format].write(model, output, Options(part, compile, license, **facts)))
    except OSError as error:
        raise cannot_write(output, error) from error


def _load(source: nn.Module | str | Path, raw: bool) -> tuple[nn.Module, str, dict]:
    """(the model, where its weights are from, what is known of them)."""
    if isinstance(source, nn.Module):
        if raw:
            raise WeightsError("--raw takes the weights of a run, and a model has one kind of weights; leave it out")
        return source, f"{type(source).__name__}: the weights that it has now", {}
    weights = source_weights(source, raw)
    facts = {"extra": read_pretrained_metadata(weights)["extra"], "metrics": metrics_of(weights)}
    return create_model(pretrained=weights), f"{weights}: {describe(weights)}", facts
