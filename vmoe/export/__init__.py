"""Models as files for other programs: safetensors, `torch.export` programs, AOTInductor packages and ONNX."""

from typing import TYPE_CHECKING

from vmoe.utils.lazy import lazy_names

if TYPE_CHECKING:
    from vmoe.export.exporter import Exported, export_model
    from vmoe.export.formats import FORMATS

__getattr__, __all__ = lazy_names(
    __name__, {"vmoe.export.exporter": "Exported export_model", "vmoe.export.formats": "FORMATS"}
)
