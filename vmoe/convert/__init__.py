"""Models and weights of other programs, brought here and back: the reference's checkpoints (google-research/vmoe)."""

from typing import TYPE_CHECKING

from vmoe.utils.lazy import lazy_names

if TYPE_CHECKING:
    from vmoe.convert.arrays import CheckpointError
    from vmoe.convert.reference import from_reference, to_reference
    from vmoe.convert.reference_settings import reference_config
    from vmoe.convert.released import RELEASED
    from vmoe.convert.section import ConfigError
    from vmoe.convert.to_safetensors import convert_checkpoint, pretrained_cfg

__all__ = [
    "RELEASED",
    "CheckpointError",
    "ConfigError",
    "convert_checkpoint",
    "from_reference",
    "pretrained_cfg",
    "reference_config",
    "to_reference",
]

__getattr__ = lazy_names(
    __name__,
    {
        "CheckpointError": "vmoe.convert.arrays",
        "from_reference": "vmoe.convert.reference",
        "to_reference": "vmoe.convert.reference",
        "reference_config": "vmoe.convert.reference_settings",
        "RELEASED": "vmoe.convert.released",
        "ConfigError": "vmoe.convert.section",
        "convert_checkpoint": "vmoe.convert.to_safetensors",
        "pretrained_cfg": "vmoe.convert.to_safetensors",
    },
)
