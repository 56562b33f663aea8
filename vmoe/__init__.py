"""vmoe: sparse mixture-of-experts vision and image-text models in PyTorch.

Importing it registers the `vmoe_*` and `softmoe_*` models with timm. What needs open_clip is imported when it is first
asked for.
"""

import sys
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

MIN_TORCH = (2, 10)  # as in pyproject.toml; older versions lack torch.nn.functional.grouped_mm
_torch_version = sys.modules["torch"].__version__ if "torch" in sys.modules else version("torch")
if tuple(map(int, _torch_version.split(".")[:2])) < MIN_TORCH:
    raise ImportError(
        f"vmoe needs PyTorch {'.'.join(map(str, MIN_TORCH))} or newer and found {_torch_version}: "
        "run pip install --upgrade torch torchvision"
    )

# A command reads its arguments first. It registers the models, as this does, once it imports vmoe.models.
if "vmoe_command" not in sys.modules:
    import_module("vmoe.models")

if TYPE_CHECKING:
    from vmoe.evaluation.zero_shot import zero_shot_classify
    from vmoe.export import export_model
    from vmoe.models.densify import densify, measure_usage, prune_experts
    from vmoe.models.factory import create_model, create_model_and_transforms, get_tokenizer, save_pretrained
    from vmoe.models.hub import push_to_hub, save_hub_folder
    from vmoe.models.spec import list_models
    from vmoe.models.upcycle import upcycle
    from vmoe.models.upcycle_optimizer import upcycle_optimizer
    from vmoe.moe import (
        LayerRouting,
        RoutingRecord,
        SparseMoE,
        quantize_experts,
        record_routing,
        set_auxiliary_loss_scale,
        update_expert_bias,
    )
    from vmoe.training.lora import lora_config
    from vmoe.training.optim import param_groups

__version__ = "0.1.0"

_LAZY = {
    **dict.fromkeys(("LayerRouting", "RoutingRecord", "SparseMoE", "quantize_experts", "record_routing"), "vmoe.moe"),
    **dict.fromkeys(("set_auxiliary_loss_scale", "update_expert_bias"), "vmoe.moe"),
    "create_model": "vmoe.models.factory",
    "create_model_and_transforms": "vmoe.models.factory",
    "densify": "vmoe.models.densify",
    "export_model": "vmoe.export",
    "get_tokenizer": "vmoe.models.factory",
    "list_models": "vmoe.models.spec",
    "lora_config": "vmoe.training.lora",
    "measure_usage": "vmoe.models.densify",
    "param_groups": "vmoe.training.optim",
    "prune_experts": "vmoe.models.densify",
    "push_to_hub": "vmoe.models.hub",
    "save_hub_folder": "vmoe.models.hub",
    "save_pretrained": "vmoe.models.factory",
    "upcycle": "vmoe.models.upcycle",
    "upcycle_optimizer": "vmoe.models.upcycle_optimizer",
    "zero_shot_classify": "vmoe.evaluation.zero_shot",
}

__all__ = [
    "LayerRouting",
    "RoutingRecord",
    "SparseMoE",
    "create_model",
    "create_model_and_transforms",
    "densify",
    "export_model",
    "get_tokenizer",
    "list_models",
    "lora_config",
    "measure_usage",
    "param_groups",
    "prune_experts",
    "push_to_hub",
    "quantize_experts",
    "record_routing",
    "save_hub_folder",
    "save_pretrained",
    "set_auxiliary_loss_scale",
    "upcycle",
    "upcycle_optimizer",
    "update_expert_bias",
    "zero_shot_classify",
]


def __getattr__(name: str):
    if name in ("convert", "open_clip"):
        return import_module(f"vmoe.{name}")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'vmoe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY, "convert", "open_clip"])
