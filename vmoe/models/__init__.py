"""The models and their files; importing it registers the `vmoe_*` and `softmoe_*` models with timm."""

from vmoe.models import registry
