"""The models and their files; importing it registers the `vmoe_*`, `softmoe_*` and `siglino_*` models with timm."""

from vmoe.models import registry, siglino
