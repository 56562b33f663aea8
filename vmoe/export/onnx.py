"""A model as an ONNX file, for ONNX Runtime and other programs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch.export import ExportedProgram

from vmoe.export.check import Run
from vmoe.export.part import Part
from vmoe.export.program import root_cause
from vmoe.utils.optional import import_optional

MAX_BYTES = 2**31 - 2**24  # of an ONNX file, with space for the graph


def check_onnx(part: Part) -> None:
    """ModuleNotFoundError: a package is missing; ValueError: the weights are too large for the format."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        import_optional(package, "export", "ONNX files need")
    size = sum(tensor.nbytes for tensor in part.state_dict().values())
    if size > MAX_BYTES:
        raise ValueError(
            f"the weights have {size / 2**30:.1f} GiB, and an ONNX file holds 2: choose the format pt2 or safetensors"
        )


def write_onnx(part: Part, program: ExportedProgram, metadata: dict, draft: Path) -> Run:
    """Writes an ONNX file; returns what runs it, in ONNX Runtime on the CPU."""
    import onnxruntime
    from onnxscript.function_libs.torch_lib.ops.core import aten_sort

    def stable_sort(self, stable=None, dim: int = -1, descending: bool = False):
        return aten_sort(self, dim, descending)  # ONNX's TopK keeps the order of equal values

    try:
        made = torch.onnx.export(
            program,
            input_names=part.inputs,
            output_names=part.outputs,
            custom_translation_table={torch.ops.aten.sort.stable: stable_sort},
            verbose=False,
        )
        made.model.metadata_props["vmoe"] = json.dumps(metadata)
        made.save(draft, external_data=False)
        session = onnxruntime.InferenceSession(draft, providers=["CPUExecutionProvider"])
    except OSError:
        raise
    except Exception as error:  # the exporter and the runtime raise many kinds
        raise ValueError(
            f"{type(part.model).__name__} cannot be written as ONNX ({root_cause(error)}); choose the format pt2"
        ) from error

    def run(*inputs):
        feed = {name: tensor.numpy() for name, tensor in zip(part.inputs, inputs, strict=True)}
        return [torch.from_numpy(output) for output in session.run(None, feed)]

    return run
