"""Swin-MoE (arXiv 2206.03382): timm's Swin with experts in some blocks; importing this file registers the models.

The sizes are those of the configs of github.com/microsoft/Swin-Transformer, whose names they have.
"""

from collections.abc import Sequence
from functools import partial

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Mlp, PatchEmbed
from timm.models import generate_default_cfgs
from timm.models.swin_transformer import (
    SwinTransformer,
    SwinTransformerBlock,
    WindowAttention,
    checkpoint_filter_fn,
    get_relative_position_index,
)
from torch import Tensor, nn

from vmoe.models.timm_builder import register_models
from vmoe.models.vision import choose_attention, sparse_blocks, take_routing, without_decay
from vmoe.moe import SparseMoE

# Tutel's rules: one expert per token, the surest first, within the same capacity in training and evaluation.
ROUTING_DEFAULTS = {"num_experts": 8, "num_selected_experts": 1, "batch_priority": True, "expert_drop": 0.1}
ROUTING_DEFAULTS |= {"capacity_factor": 1.25, "eval_capacity_factor": 1.25}
ROUTING_DEFAULTS |= {"capacity_rounding": "tutel", "capacity_multiple_of": 1}
ROUTING_DEFAULTS |= {"importance_loss": 0.0, "load_loss": 0.0, "load_importance_loss": 0.01}


def log_offsets(window_size: tuple[int, int], pretrained_window_size: int = 0, device=None) -> Tensor:
    """(1, 2·height - 1, 2·width - 1, 2) signed logarithms of the offsets between two positions of a window."""
    sides = []
    for side in window_size:
        offset = torch.arange(1 - side, side, dtype=torch.float32, device=device)
        sides.append(offset / max(1, (pretrained_window_size or side) - 1) * 8)
    offsets = torch.stack(torch.meshgrid(sides, indexing="ij"), dim=-1)[None]
    return offsets.sign() * (offsets.abs() + 1).log2() / 3


class PositionMlpAttention(WindowAttention):
    """timm's window attention, whose position bias an MLP computes from log-spaced offsets (Swin v2, arXiv 2111.09883,
    eq. 3 and 4), so that weights fit windows of any size.

    Args:
        like: an attention with its sizes.
        pretrained_window_size: the window for which the offsets reach 8 at its edges; 0: the own one.
    """

    def __init__(self, like: WindowAttention, pretrained_window_size: int = 0) -> None:
        own = {"device": like.qkv.weight.device, "dtype": like.qkv.weight.dtype}
        rates = {"attn_drop": like.attn_drop.p, "proj_drop": like.proj_drop.p}
        sizes = {"head_dim": like.proj.in_features // like.num_heads, "window_size": like.window_size}
        super().__init__(like.dim, like.num_heads, qkv_bias=like.qkv.bias is not None, **sizes, **rates, **own)
        del self.relative_position_bias_table
        self.pretrained_window_size = pretrained_window_size
        hidden, out = nn.Linear(2, 512, **own), nn.Linear(512, self.num_heads, bias=False, **own)
        self.cpb_mlp = nn.Sequential(hidden, nn.ReLU(), out)
        self.register_buffer("relative_coords_table", None, persistent=False)
        self._init_buffers()

    def reset_parameters(self) -> None:
        """Makes the buffers."""
        self._init_buffers()

    def _init_buffers(self) -> None:
        weight = self.qkv.weight
        self.relative_position_index = get_relative_position_index(*self.window_size, device=weight.device)
        if hasattr(self, "relative_coords_table"):  # not yet where timm's constructor calls this
            offsets = log_offsets(self.window_size, self.pretrained_window_size, weight.device)
            self.relative_coords_table = offsets.to(weight.dtype)

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Another window; the position bias follows."""
        self.window_size = tuple(window_size)
        self.window_area = self.window_size[0] * self.window_size[1]
        self._init_buffers()

    def _get_rel_pos_bias(self) -> Tensor:
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        bias = table[self.relative_position_index.view(-1)].view(self.window_area, self.window_area, -1)
        return bias.permute(2, 0, 1).contiguous()[None]


class DroppingPatchEmbed(PatchEmbed):
    """timm's patch embedding with dropout behind it."""

    def __init__(self, *args, drop: float, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(super().forward(x))


class SwinMoE(SwinTransformer):
    """timm's Swin with experts in some blocks, and position biases by an MLP.

    In `eval()` the capacity is limited as in training, over the tokens of all images of the call, as in the released
    models; `eval_capacity_factor=math.inf` drops nothing.

    Args:
        moe_layers: see `sparse_blocks`, of the blocks of all stages in their order.
        mlp_fc2_bias: False: dense MLPs have no second bias, and that of the experts, zero at first, is not trained.
        pretrained_window_sizes: see `PositionMlpAttention`, for each stage.
        pos_drop_rate: of dropout after the patch embedding. The project's `drop_rate` is this and `proj_drop_rate`;
            timm's `drop_rate` is before the classifier.
        **kwargs: of timm's `SwinTransformer` and of `vmoe.moe.config.RoutingSettings`, and `router_preset`;
            `num_experts=0` makes the dense baseline.
    """

    def __init__(
        self,
        *args,
        moe_layers: str | Sequence[int] = "last10",
        mlp_fc2_bias: bool = True,
        pretrained_window_sizes: Sequence[int] = (),
        pos_drop_rate: float = 0.0,
        weight_init: str = "",
        **kwargs,
    ) -> None:
        routing = take_routing(kwargs, ROUTING_DEFAULTS)
        embed_layer = partial(DroppingPatchEmbed, drop=pos_drop_rate)
        super().__init__(*args, weight_init="skip", embed_layer=embed_layer, **kwargs)
        self.weight_init_mode = "reset" if weight_init == "skip" else weight_init
        windows = list(pretrained_window_sizes) or [0] * len(self.layers)
        if len(windows) != len(self.layers):
            raise ValueError(
                f"pretrained_window_sizes must be one for each of {len(self.layers)} stages, got {windows}"
            )
        blocks = [(block, window) for stage, window in zip(self.layers, windows) for block in stage.blocks]
        chosen = sparse_blocks(moe_layers, len(blocks)) if routing["num_experts"] else ()
        for index, (block, window) in enumerate(blocks):
            block.attn = PositionMlpAttention(block.attn, window)
            _fit_window(block)
            if index in chosen:
                block.mlp = _sparse(block.mlp, block.input_resolution, routing)
                block.mlp.experts.fc2.bias.requires_grad_(mlp_fc2_bias)
            elif not mlp_fc2_bias:
                block.mlp.fc2.bias = None
        choose_attention(self, routing)
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """timm's; biases of experts that are not trained are zero."""
        super().init_weights(mode, needs_reset)
        for layer in self.modules():
            if isinstance(layer, SparseMoE) and not layer.experts.fc2.bias.requires_grad:
                nn.init.zeros_(layer.experts.fc2.bias)

    def set_input_size(self, *args, **kwargs) -> None:
        """timm's; windows of images that are not square are the project's."""
        super().set_input_size(*args, **kwargs)
        for stage in self.layers:
            for block in stage.blocks:
                _fit_window(block)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return without_decay(self) | {name for name, _ in self.named_parameters() if ".cpb_mlp." in name}


def _fit_window(block: SwinTransformerBlock) -> None:
    """The project's rule: a window no smaller than the shorter side is a square of that side, and is not shifted. timm
    fits each side alone. Windows that were asked for with two sides are left to timm."""
    side, largest = min(block.input_resolution), max(block.window_size)
    square = block.window_size == tuple(min(length, largest) for length in block.input_resolution)
    if side <= largest and square and not block.always_partition:
        block.window_size, block.shift_size, block.window_area = (side, side), (0, 0), side * side
        block.register_buffer("attn_mask", None, persistent=False)
        block.attn.set_window_size((side, side))


def _sparse(mlp: Mlp, resolution: tuple[int, int], routing: dict) -> SparseMoE:
    """Experts of the sizes of an MLP, which sees so many positions."""
    weight = mlp.fc1.weight
    sizes = {"hidden_features": weight.shape[0], "num_tokens": resolution[0] * resolution[1], "drop": mlp.drop1.p}
    return SparseMoE(weight.shape[1], device=weight.device, dtype=weight.dtype, **sizes, **routing)


_TINY = {"img_size": 32, "embed_dim": 32, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4}
_TINY |= {"moe_layers": "last1", "num_experts": 4, "drop_path_rate": 0.0}
_RELEASED = {"depths": (2, 2, 18, 2), "window_size": 12, "mlp_fc2_bias": False}
_SMALL = {**_RELEASED, "embed_dim": 96, "num_heads": (3, 6, 12, 24), "drop_path_rate": 0.2}
_BASE = {**_RELEASED, "embed_dim": 128, "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.3}
_DENSE = {"num_experts": 0, "drop_path_rate": 0.2}

# The arguments of `SwinMoE` that each name stands for.
SWIN_MOE_MODELS: dict[str, dict] = {"swin_moe_tiny_patch4_window4_32": _TINY}  # for tests and first steps
for _size, _args in {"small": _SMALL, "base": _BASE}.items():
    _variants = {f"{E}expert_32gpu": {"num_experts": E} for E in (8, 16, 32)}
    _variants |= {"64expert_64gpu": {"num_experts": 64}} if _size == "small" else {}
    _variants |= {"cosine_router_32expert_32gpu": {"num_experts": 32, "gate": "cosine"}, "densebaseline": _DENSE}
    for _variant, _own in _variants.items():
        SWIN_MOE_MODELS[f"swin_moe_{_size}_patch4_window12_192_{_variant}_22k"] = {**_args, **_own}

_PLAIN = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "interpolation": "bicubic", "license": "mit"}
_PLAIN |= {"fixed_input_size": True, "first_conv": "patch_embed.proj", "classifier": "head.fc"}
# The short side is resized to 219 pixels, and the centre of 192 cropped.
_CFG = {**_PLAIN, "input_size": (3, 192, 192), "num_classes": 21841, "crop_pct": 0.875}
_TINY_CFG = {**_PLAIN, "input_size": (3, 32, 32), "crop_pct": 1.0}
default_cfgs = generate_default_cfgs({name: _TINY_CFG if "tiny" in name else _CFG for name in SWIN_MOE_MODELS})


def _features(model_args: dict) -> dict:
    """All stages, each with its maps."""
    return {"flatten_sequential": True, "out_indices": tuple(range(len(model_args["depths"])))}


register_models(__name__, SwinMoE, SWIN_MOE_MODELS, _features, pretrained_filter_fn=checkpoint_filter_fn)
