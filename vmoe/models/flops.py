"""Size and cost of a model: parameters, those that a token uses, and the operations of a forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry, shape_wrapper

from vmoe.models.calls import evaluation_mode
from vmoe.models.factory import is_contrastive, preprocess_config
from vmoe.moe import SparseMoE
from vmoe.moe.quantize import WeightOnlyLinear


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(all parameters, those that a token goes through in evaluation): of E experts K for top_k (in an
    ensemble K of each member), E for soft, and for expert_choice the mean, which is the capacity factor (E with a fixed
    capacity, where it depends on the tokens)."""
    total = active = _numbers(model)
    for layer in model.modules():
        if isinstance(layer, SparseMoE):
            used = E = layer.num_experts
            if layer.per_token:
                used = layer.ensemble_size * layer.num_selected_experts
            elif not layer.soft and layer.capacity is None:
                used = min(E, layer.eval_capacity_factor or layer.capacity_factor)
            active -= round(_numbers(layer.experts) * (1 - used / E))
    return total, active


def _numbers(module: nn.Module) -> int:
    """Parameters, also those that `vmoe.quantize_experts` made buffers of, without their scales."""
    stored = sum(part.stored.numel() for part in module.modules() if isinstance(part, WeightOnlyLinear))
    return stored + sum(parameter.numel() for parameter in module.parameters())


# What PyTorch's counter does not know in every version that is supported. In a grouped matrix multiplication each row
# meets the matrix of its own expert only.
_ATEN = torch.ops.aten
flop_registry.setdefault(_ATEN._grouped_mm, shape_wrapper(lambda a, b, *_, **__: 2 * a[-2] * a[-1] * b[-1]))
for _name in ("_scaled_dot_product_flash_attention{}", "_scaled_dot_product_flash_attention{}_backward"):
    flop_registry.setdefault(getattr(_ATEN, _name.format("_for_cpu")), flop_registry[getattr(_ATEN, _name.format(""))])
flop_registry.setdefault(  # what nn.MultiheadAttention, open_clip's, is in evaluation
    _ATEN._native_multi_head_attention,
    shape_wrapper(lambda q_BTD, *_, **__: 4 * math.prod(q_BTD) * (2 * q_BTD[2] + q_BTD[1])),
)


def forward_flops(call: Callable[[], object]) -> int:
    """Floating-point operations of a call's matrix multiplications, two for a multiply-add."""
    with FlopCounterMode(display=False) as counter:
        # Only the total is read. The hooks for sums per module fail without a graph where a module's input is a view of
        # a parameter, as in pooling by attention.
        counter.mod_tracker.__exit__(None, None, None)
        call()
    return counter.get_total_flops()


def model_profile(model: nn.Module) -> dict[str, int | float]:
    """Size and cost in evaluation mode, also on the meta device.

    "parameters_total" and "parameters_active", see `count_parameters`; "gflops_per_image" and, for a contrastive
    model, "gflops_per_text" of a caption that fills the context: the forward pass in 10^9 `forward_flops`.
    """
    model = unwrap_model(model)
    total, active = count_parameters(model)
    parameter = next(model.parameters())
    image: Tensor = parameter.new_zeros(1, *preprocess_config(model)["input_size"])
    calls = {"image": lambda: model(image)}
    if is_contrastive(model):
        text = torch.ones(1, model.context_length, dtype=torch.long, device=parameter.device)
        calls = {"image": lambda: model.encode_image(image), "text": lambda: model.encode_text(text)}
    with evaluation_mode(model):
        costs = {f"gflops_per_{what}": forward_flops(call) / 1e9 for what, call in calls.items()}
    return {"parameters_total": total, "parameters_active": active, **costs}
