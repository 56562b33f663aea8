"""Models and weights of other programs, brought here and back: the reference's checkpoints (google-research/vmoe)."""

from vmoe.convert.arrays import CheckpointError
from vmoe.convert.reference import from_reference, to_reference
from vmoe.convert.reference_config import reference_config
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
