"""Models as files for other programs: safetensors, `torch.export` programs, AOTInductor packages and ONNX."""

from vmoe.export.exporter import FORMATS, Exported, export_model

__all__ = ["FORMATS", "Exported", "export_model"]
