"""A model as a program of `torch.export`, whose batch may have any size, and as a package of AOTInductor."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch
from torch.export import Dim, ExportedProgram

from vmoe.export.check import Run
from vmoe.export.part import Part
from vmoe.utils.printable import first_line

METADATA_FILE = "vmoe.json"  # in the file; `torch.export.load(file, extra_files={"vmoe.json": ""})` reads it


def trace(part: Part) -> ExportedProgram:
    """The program of a part; ValueError if it has none that takes all batches."""
    inputs = part.example(2, torch.Generator().manual_seed(0))
    shapes = tuple({0: Dim("batch" if len(inputs) == 1 else f"{name}s", min=1)} for name in part.inputs)
    try:
        with torch.no_grad():
            # The numbers of groups and rows are expressions that the solver of guards cannot decide for all batches.
            deferred = {"prefer_deferred_runtime_asserts_over_guards": True}
            return torch.export.export(part, inputs, dynamic_shapes=(shapes,), **deferred)
    except Exception as error:  # torch.export raises many kinds
        raise ValueError(
            f"{type(part.model).__name__} cannot be exported for batches of any size ({root_cause(error)}); "
            "the format safetensors holds every model"
        ) from error


def write_program(part: Part, program: ExportedProgram, metadata: dict, draft: Path) -> Run:
    """Writes a program of `torch.export`; returns what runs the file."""
    content = io.BytesIO()  # on a full disk PyTorch's own writer ends the process
    torch.export.save(program, content, extra_files={METADATA_FILE: json.dumps(metadata)})
    draft.write_bytes(content.getbuffer())
    module = torch.export.load(draft).module()
    return torch.no_grad()(lambda *inputs: list(module(*inputs)))


def write_package(part: Part, program: ExportedProgram, metadata: dict, draft: Path) -> Run:
    """Writes a package of compiled code; returns what runs it."""
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(draft))
    except OSError:
        raise
    except Exception as error:  # whatever the compilers raise
        reason = f"AOTInductor cannot compile {type(part.model).__name__} ({root_cause(error)})"
        raise ValueError(f"{reason}; is there a C++ compiler (g++)? leave --compile out for a program") from error
    run = torch._inductor.aoti_load_package(str(draft))
    return torch.no_grad()(lambda *inputs: list(run(*inputs)))


def root_cause(error: BaseException) -> str:
    """What failed in a library: the first line of the error that led to the others."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {first_line(error)}"
