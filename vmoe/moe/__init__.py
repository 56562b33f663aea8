"""The sparse layer and its parts; knows only torch."""

from vmoe.moe.backends import use_backend
from vmoe.moe.config import PRESETS, RoutingSettings, with_preset
from vmoe.moe.dispatch import combine, dispatch, expert_capacity, plan_dispatch
from vmoe.moe.experts import Experts
from vmoe.moe.grouped import GroupedLinear
from vmoe.moe.layer import SparseMoE
from vmoe.moe.quantize import quantize_experts
from vmoe.moe.record import LayerRouting, RoutingRecord, record_routing, set_auxiliary_loss_scale
from vmoe.moe.top_k import top_k_experts, update_expert_bias

__all__ = [
    "PRESETS",
    "Experts",
    "GroupedLinear",
    "LayerRouting",
    "RoutingRecord",
    "RoutingSettings",
    "SparseMoE",
    "combine",
    "dispatch",
    "expert_capacity",
    "plan_dispatch",
    "quantize_experts",
    "record_routing",
    "set_auxiliary_loss_scale",
    "top_k_experts",
    "update_expert_bias",
    "use_backend",
    "with_preset",
]
