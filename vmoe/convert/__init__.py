"""Models and weights of other programs, brought here and back: the reference's checkpoints (google-research/vmoe)."""

from vmoe.convert.arrays import CheckpointError
from vmoe.convert.config import ConfigError
from vmoe.convert.export import reference_config
from vmoe.convert.reference import from_reference, to_reference

__all__ = ["CheckpointError", "ConfigError", "from_reference", "reference_config", "to_reference"]
