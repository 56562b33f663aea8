"""The layers that are compared: ours, dense ones of the same active compute, and the published PyTorch MoE layers.

Peers keep the shape and the type they are given; one that is not installed raises ModuleNotFoundError. Those for CUDA
(ScatterMoE, MegaBlocks, Tutel) have not been run by this project yet: no machine that has them was at hand.

Shapes, by suffix: B batch, T length, D width, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers import GluMlp, Mlp
from torch import Tensor, nn

import vmoe
from vmoe.moe import SparseMoE
from vmoe.moe.top_k import top_k_experts


@dataclass
class Contender:
    """A layer to measure."""

    name: str  # of the package
    module: nn.Module  # (B, T, D) -> (B, T, D), or what `output` makes it of
    kept: Callable[[Tensor], float] = lambda x: 1.0  # x -> share of the assignments that the experts keep
    output: Callable[[Any], Tensor] = lambda y: y  # what the module returns -> (B, T, D)
    compiled: Callable[[Tensor], Any] | None = None  # called in place of `module`

    def __call__(self, x_BTD: Tensor) -> Tensor:
        call = self.module if self.compiled is None else self.compiled
        return self.output(call(x_BTD))


def sparse(width: int, hidden: int, capacity: float | None, name: str = "vmoe", **settings) -> Contender:
    """Our layer that chooses K experts for each token; the capacity holds in `eval()` too."""
    layer = SparseMoE(width, hidden, capacity_factor=capacity, eval_capacity_factor=capacity, **settings)
    return Contender(name, layer, partial(kept_share, layer))


def sparse_soft(width: int, hidden: int, num_experts: int, num_slots: int) -> Contender:
    """Our layer with soft routing."""
    return Contender("vmoe", SparseMoE(width, hidden, router="soft", num_experts=num_experts, num_slots=num_slots))


@torch.no_grad()
def kept_share(layer: SparseMoE, x_BTD: Tensor) -> float:
    """Share of the assignments that the experts keep in this call."""
    with vmoe.record_routing(layer) as record:
        layer(x_BTD)
    return 1 - record.calls[-1][1].metrics["share_dropped"].item()


def dense(width: int, hidden: int) -> Contender:
    """timm's MLP."""
    return Contender("dense", Mlp(width, hidden))


def dense_swiglu(width: int, hidden: int) -> Contender:
    """timm's gated MLP without biases, as Mixtral's experts are."""
    return Contender(
        "dense", GluMlp(width, 2 * hidden, act_layer=nn.SiLU, gate_last=False, bias=False, norm_layer=None)
    )


def mixtral(width: int, hidden: int, num_experts: int, num_selected: int) -> Contender:
    """transformers' Mixtral block with its grouped matrix multiplication; drops nothing."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_local_experts=num_experts,
        num_experts_per_tok=num_selected,
    )
    config._experts_implementation = "grouped_mm"
    block = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():  # the block alone leaves them uninitialised
        nn.init.normal_(parameter, std=config.initializer_range)
    return Contender("transformers Mixtral, grouped_mm", block)


def st_moe(width: int, hidden: int, num_experts: int, num_selected: int) -> Contender:
    """st_moe_pytorch with timm's MLPs as experts; each sequence of the batch is a routing group.

    Raises ValueError for one selected expert, which the package does not know.
    """
    from st_moe_pytorch import MoE

    if num_selected < 2:
        raise ValueError(f"st_moe_pytorch takes two experts per token or more, got {num_selected}")
    experts = nn.ModuleList([Mlp(width, hidden) for _ in range(num_experts)])
    # Threshold 0: a second choice is never left out by chance.
    layer = MoE(
        width,
        num_experts,
        gating_top_n=num_selected,
        experts=experts,
        threshold_train=0.0,
        threshold_eval=0.0,
    )

    @torch.no_grad()
    def kept(x_BTD: Tensor) -> float:
        dispatch = layer.gate(x_BTD)[0]
        return ((dispatch > 0.5).sum() / (x_BTD.shape[:-1].numel() * num_selected)).item()

    return Contender("st_moe_pytorch", layer, kept, lambda y: y.outputs)


def match_st_moe(contender: Contender, x_BTD: Tensor, kept: float) -> None:
    """Sets the capacity of `st_moe` so that the share it keeps is as near to `kept` as integers allow."""
    gate = contender.module.gate
    length = x_BTD.shape[1]

    def share(capacity: int) -> float:
        factor = (capacity + 0.5) * gate.num_gates / length  # the package rounds down
        gate.capacity_factor_train = gate.capacity_factor_eval = factor
        return contender.kept(x_BTD)

    low, high = 4, length  # the package's own bounds
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if share(middle) >= kept else (middle + 1, high)
    nearest = min({max(low - 1, 4), low}, key=lambda capacity: abs(share(capacity) - kept))
    share(nearest)


def soft_moe(width: int, hidden: int, num_experts: int, num_slots: int) -> Contender:
    """soft_moe_pytorch; its experts are MLPs with GELU, as ours."""
    from soft_moe_pytorch import SoftMoE

    layer = SoftMoE(
        width,
        num_experts=num_experts,
        num_slots=num_slots,
        expert_mult=hidden / width,
        offload_unused_experts_to_cpu=False,
    )
    return Contender("soft_moe_pytorch", layer)


class _ScatterMoE(nn.Module):
    """ScatterMoE's experts behind a softmax gate."""

    def __init__(self, width: int, hidden: int, num_experts: int, num_selected: int) -> None:
        from scattermoe.mlp import MLP

        super().__init__()
        self.gate = nn.Linear(width, num_experts, bias=False)
        self.mlp = MLP(width, hidden, num_experts, num_selected, activation=nn.GELU())
        self.num_selected = num_selected

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, -2)
        gates_NE = self.gate(x_ND).float().softmax(-1)
        index_NK = top_k_experts(gates_NE, self.num_selected)
        return self.mlp(x_ND, gates_NE.gather(-1, index_NK).to(x_ND.dtype), index_NK).view_as(x_BTD)


def scattermoe(width: int, hidden: int, num_experts: int, num_selected: int) -> Contender:
    """ScatterMoE (arXiv 2403.08245); drops nothing, has no biases."""
    return Contender("scattermoe", _ScatterMoE(width, hidden, num_experts, num_selected))


def megablocks(width: int, hidden: int, num_experts: int, num_selected: int) -> Contender:
    """MegaBlocks' dropless MoE (arXiv 2211.15841)."""
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import dMoE

    arguments = Arguments(
        hidden_size=width,
        ffn_hidden_size=hidden,
        moe_num_experts=num_experts,
        moe_top_k=num_selected,
        activation_fn=nn.functional.gelu,
        bias=False,
        return_bias=False,
        fp16=False,
        bf16=True,
    )
    return Contender("megablocks", dMoE(arguments), output=lambda y: y[0] if isinstance(y, tuple) else y)


def tutel(width: int, hidden: int, num_experts: int, num_selected: int) -> Contender:
    """Tutel's layer (arXiv 2206.03382); with capacity factor 0 it keeps all."""
    from tutel.moe import moe_layer

    experts = {
        "type": "ffn",
        "num_experts_per_device": num_experts,
        "hidden_size_per_expert": hidden,
        "activation_fn": nn.functional.gelu,
    }
    gate = {"type": "top", "k": num_selected, "capacity_factor": 0.0}
    return Contender("tutel", moe_layer(gate_type=gate, model_dim=width, experts=experts))


# Those that need a GPU.
CUDA_PEERS = {"scattermoe": scattermoe, "megablocks": megablocks, "tutel": tutel}
