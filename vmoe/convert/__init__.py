"""Models and weights of other programs, brought here and back: the reference's checkpoints (google-research/vmoe),
and those of other projects."""

from typing import TYPE_CHECKING

from vmoe.utils.lazy import lazy_names

if TYPE_CHECKING:
    from vmoe.convert.arrays import CheckpointError
    from vmoe.convert.clip_moe import from_clip_moe
    from vmoe.convert.reference_models import from_reference, to_reference
    from vmoe.convert.reference_settings import reference_config
    from vmoe.convert.released import RELEASED
    from vmoe.convert.section import ConfigError
    from vmoe.convert.siglino import from_siglino
    from vmoe.convert.swin_moe import from_swin_moe, save_ranks
    from vmoe.convert.to_safetensors import convert_checkpoint, pretrained_cfg

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "vmoe.convert.arrays": "CheckpointError",
        "vmoe.convert.clip_moe": "from_clip_moe",
        "vmoe.convert.reference_models": "from_reference to_reference",
        "vmoe.convert.reference_settings": "reference_config",
        "vmoe.convert.released": "RELEASED",
        "vmoe.convert.section": "ConfigError",
        "vmoe.convert.siglino": "from_siglino",
        "vmoe.convert.swin_moe": "from_swin_moe save_ranks",
        "vmoe.convert.to_safetensors": "convert_checkpoint pretrained_cfg",
    },
)
