"""The models and their files; importing it registers `vmoe_*`, `softmoe_*`, `swin_moe_*` and `siglino_*` with timm."""

from vmoe.models import naflex, registry, siglino, swin_moe
