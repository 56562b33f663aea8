"""vmoe: sparse mixture-of-experts vision and image-text models in PyTorch.

Importing it registers the `vmoe_*`, `softmoe_*`, `swin_moe_*` and `siglino_*` models with timm. What needs open_clip is
imported when it is first asked for.
"""

import sys
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

from vmoe.utils.lazy import lazy_names

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

_get, __all__ = lazy_names(
    __name__,
    {
        "vmoe.evaluation.zero_shot": "zero_shot_classify",
        "vmoe.export": "export_model",
        "vmoe.models.densify": "densify measure_usage prune_experts",
        "vmoe.models.factory": "create_model create_model_and_transforms get_tokenizer save_pretrained",
        "vmoe.models.hub": "push_to_hub save_hub_folder",
        "vmoe.models.spec": "list_models",
        "vmoe.models.upcycle": "upcycle",
        "vmoe.models.upcycle_optimizer": "upcycle_optimizer",
        "vmoe.moe": "LayerRouting RoutingRecord SparseMoE quantize_experts record_routing set_auxiliary_loss_scale "
        "update_expert_bias",
        "vmoe.training.lora": "lora_config",
        "vmoe.training.optim": "param_groups",
    },
)
_MODULES = ("convert", "open_clip")


def __getattr__(name: str):
    return import_module(f"vmoe.{name}") if name in _MODULES else _get(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
