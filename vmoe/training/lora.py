"""LoRA (arXiv 2106.09685) by PEFT, the extra `lora`: low-rank adapters beside frozen weights, for each expert its own.

    model = peft.get_peft_model(model, vmoe.lora_config(model, ("attention", "experts")))
    ...                                                   # any loop
    vmoe.save_pretrained(model.merge_and_unload(), "tuned.safetensors")

PEFT alone finds no experts ("all-linear" leaves them out), since they are stacked parameters and no linear layers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from vmoe.models.serialization import classifiers
from vmoe.moe import GroupedLinear, SparseMoE
from vmoe.moe.router import Gate
from vmoe.utils.optional import import_optional

if TYPE_CHECKING:
    from peft import LoraConfig

TARGETS = ("attention", "mlp", "experts", "router")


def lora_config(
    model: nn.Module,
    targets: str | Sequence[str] = ("attention", "experts"),
    r: int = 8,
    alpha: float = 16,
    **kwargs: Any,
) -> LoraConfig:
    """A `peft.LoraConfig` that adapts parts of a model and trains a classifier whole.

    Args:
        targets: of "attention" (its linear layers), "mlp" (dense MLPs), "experts" (also shared ones) and "router" (the
            gates), or one of these. ValueError: the model has no such part.
        r: rank; each expert has its own A, (r, I), and B, (O, r), for the widths I and O of a layer.
        alpha: the adapters are multiplied by alpha / r.
        **kwargs: further arguments of LoraConfig. PEFT takes no `lora_dropout` and no variants for "experts" and
            "router".
    """
    peft = import_optional("peft", "lora", "LoRA needs", error=ValueError)
    targets = [targets] if isinstance(targets, str) else targets
    found = {target: ([], []) for target in TARGETS}
    for name, target, parameter in _parts(model):
        found[target][parameter].append(name)
    for target in targets:
        if not any(found.get(target, ())):
            there = ", ".join(each for each in TARGETS if any(found[each])) or "none"
            raise ValueError(f"the model has no {target!r} to adapt; its targets are {there}")
    if not targets:
        raise ValueError(f"targets must name some of {', '.join(TARGETS)}")
    modules, parameters = ([name for target in targets for name in found[target][kind]] for kind in (False, True))
    heads = [name for name in classifiers(model) if isinstance(model.get_submodule(name), nn.Linear)]
    settings = {"target_modules": modules or None, "target_parameters": parameters or None, "modules_to_save": heads}
    return peft.LoraConfig(r=r, lora_alpha=alpha, **settings | kwargs)


def add_lora(model: nn.Module, targets: Sequence[str], r: int, alpha: float) -> None:
    """Adds adapters in place. They and what `_whole` lists are trained as before, all else is frozen."""
    config = lora_config(model, targets, r, alpha, modules_to_save=None)
    from peft import inject_adapter_in_model
    from peft.tuners.lora.layer import ParamWrapper

    trained = [parameter for parameter in _whole(model) if parameter.requires_grad]
    inject_adapter_in_model(config, model)
    for parameter in trained:
        parameter.requires_grad_(True)
    # PEFT puts them last in each forward pass. A moving average needs one order (timm's goes through both models).
    for wrapper in reversed([module for module in model.modules() if isinstance(module, ParamWrapper)]):
        parameters = wrapper.get_base_layer()._parameters
        parameters[wrapper.parameter_name] = parameters.pop(wrapper.parameter_name)


def merge_lora(model: nn.Module) -> nn.Module:
    """A copy without adapters, which are added to its weights: the same model as before `add_lora`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    plain = copy.deepcopy(model)
    adapted = [name for name, module in plain.named_modules() if isinstance(module, BaseTunerLayer)]
    for name in adapted:
        if any(name.startswith(f"{outer}.") for outer in adapted):
            continue  # of several parameters of a module: merged with the outermost
        layer = plain.get_submodule(name)
        if hasattr(layer, "unload_and_optionally_merge_module"):
            layer = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        else:
            layer.merge()
            layer = layer.get_base_layer()
        plain.set_submodule(name, layer)
    vars(plain).pop("peft_config", None)
    return plain


def _parts(model: nn.Module) -> list[tuple[str, str, bool]]:
    """(name, its target, whether it is a parameter instead of a module) of all that can be adapted."""
    parts, inside = [], {}  # {name of a module: the target of all linear layers in it, or None}
    for name, module in model.named_modules():
        outer, _, own = name.rpartition(".")
        kind = {"attn": "attention", "mlp": "mlp"}.get(own, inside.get(outer, ""))
        kind = inside[name] = "experts" if isinstance(module, SparseMoE) else kind
        if isinstance(module, GroupedLinear):
            parts.append((f"{name}.weight", "experts", True))
        elif isinstance(module, Gate):
            own = module.named_parameters(recurse=False)
            parts += [(f"{name}.{key}", "router", True) for key, parameter in own if parameter.ndim == 2]
        elif kind == "attention" and isinstance(module, nn.MultiheadAttention):
            parts.append((name, kind, False))
            inside[name] = ""  # PEFT adapts its output projection with it
        elif kind and isinstance(module, nn.Linear):
            parts.append((name, kind, False))
    return parts


def _whole(model: nn.Module) -> list[nn.Parameter]:
    """What is trained whole beside adapters: classifiers, and the scale and bias of a contrastive loss."""
    heads = [parameter for name in classifiers(model) for parameter in model.get_submodule(name).parameters()]
    scales = (getattr(model, name, None) for name in ("logit_scale", "logit_bias"))
    return heads + [scale for scale in scales if isinstance(scale, nn.Parameter)]
