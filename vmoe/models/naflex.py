"""V-MoE at native resolution: timm's NaFlexVit (NaViT, arXiv 2307.06304) with experts in some blocks.

A batch of images of any sizes is {"patches": (B, N, pixels), "patch_coord": (B, N, 2), "patch_valid": (B, N)}, as
timm's NaFlex loader and transforms make it; plain images (B, 3, H, W) are taken too. Importing this file registers the
`vmoe_naflex_*` models with timm.

Shapes, by suffix: B batch, N patches, padding included, T prefix tokens + N, D width.
"""

import math
from collections.abc import Collection, Sequence
from functools import partial

import torch
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import generate_default_cfgs
from timm.models.eva import EvaBlock
from timm.models.naflexvit import NaFlexVit, checkpoint_filter_fn
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vmoe.models.timm_builder import register_models
from vmoe.models.vision import (
    ROUTING_DEFAULTS,
    check_rotation,
    choose_attention,
    scale_depth,
    sparse_blocks,
    take_routing,
    without_decay,
)
from vmoe.moe import SparseMoE


def real_tokens(attn_mask: Tensor | None) -> Tensor | None:
    """(B, T) true for tokens that may see themselves, which padding may not; of timm's mask (B, 1, T or 1, T)."""
    if attn_mask is None or attn_mask.ndim != 4:
        return None
    rows_BTT = attn_mask[:, 0]
    seen_BT = rows_BTT[:, 0] if rows_BTT.shape[1] == 1 else rows_BTT.diagonal(dim1=1, dim2=2)
    return seen_BT if seen_BT.dtype == torch.bool else seen_BT > torch.finfo(seen_BT.dtype).min / 2


class PaddedBlock(Block):
    """timm's block, whose experts see which tokens are padding."""

    def forward(self, x_BTD: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        h_BTD = self.attn(self.norm1(x_BTD), attn_mask=attn_mask, is_causal=is_causal)
        x_BTD = x_BTD + self.drop_path1(self.ls1(h_BTD))
        h_BTD = self.mlp(self.norm2(x_BTD), real_tokens(attn_mask))
        return x_BTD + self.drop_path2(self.ls2(h_BTD))


class PaddedEvaBlock(EvaBlock):
    """timm's block with rotary positions, whose experts see which tokens are padding."""

    def forward(
        self, x_BTD: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        h_BTD = self.attn(self.norm1(x_BTD), rope=rope, attn_mask=attn_mask, is_causal=is_causal)
        x_BTD = x_BTD + self.drop_path1(h_BTD if self.gamma_1 is None else self.gamma_1 * h_BTD)
        h_BTD = self.mlp(self.norm2(x_BTD), real_tokens(attn_mask))
        return x_BTD + self.drop_path2(h_BTD if self.gamma_2 is None else self.gamma_2 * h_BTD)


def embed_padded(
    vit: NaFlexVit, x: Tensor, patch_coord: Tensor | None, patch_valid: Tensor | None, attn_mask: Tensor | None
) -> dict[str, Tensor]:
    """timm's `_forward_embeds` with checked input, and padding set to zero: what it holds, NaN too, changes nothing.
    ValueError: an image without a patch, or of a size that patches do not fill."""
    if patch_coord is None:
        _check_size(vit.embeds, x)
    elif patch_valid is not None:
        patch_valid = patch_valid.bool()
        if not torch.compiler.is_compiling() and not patch_valid.any(dim=1).all():
            raise ValueError("patch_valid has an image without a real patch: leave such images out of the batch")
        x = torch.where(patch_valid.view(*patch_valid.shape, *[1] * (x.ndim - 2)), x, 0)
        patch_coord = patch_coord * patch_valid[..., None]  # the largest are the size of the grid
    if attn_mask is not None and attn_mask.ndim == 4:
        attn_mask = attn_mask.expand(len(x), -1, -1, -1)  # the experts need each image's
    return NaFlexVit._forward_embeds(vit, x, patch_coord, patch_valid, attn_mask)


def _check_size(embeds: nn.Module, x: Tensor) -> None:
    if x.ndim != 4:
        shape = f"a tensor {tuple(x.shape)} is no batch of images (B, C, H, W)"
        raise ValueError(f"{shape}: patches come with patch_coord and patch_valid")
    (height, width), (rows, columns) = x.shape[-2:], embeds.patch_size
    small = height < rows or width < columns
    if small or (not embeds.dynamic_img_pad and (height % rows or width % columns)):
        problem = "is smaller than a patch" if small else "does not consist of whole patches"
        raise ValueError(f"an image of {width} x {height} pixels {problem} ({columns} x {rows}): resize it")


# timm's classes, and what they become in a model with experts.
_PADDED = {Block: PaddedBlock, EvaBlock: PaddedEvaBlock}
_PLAIN = {padded: plain for plain, padded in _PADDED.items()}


def pass_padding_on(model: nn.Module, mlps: Collection[nn.Module] = ()) -> None:
    """Lets the experts in all NaFlexVit of `model`, and `mlps`, see which tokens are padding; what has neither becomes
    timm's again. ValueError: experts in blocks of another class than timm's two."""

    def holds_experts(part: nn.Module) -> bool:
        return any(isinstance(each, SparseMoE) or each in mlps for each in part.modules())

    for vit in [module for module in model.modules() if isinstance(module, NaFlexVit)]:
        vars(vit).pop("_forward_embeds", None)
        if holds_experts(vit) and not isinstance(vit, NaFlexVisionMoE):
            vit._forward_embeds = partial(embed_padded, vit)  # the model keeps its class
        for block in vit.blocks:
            table = _PADDED if holds_experts(block) else _PLAIN
            block.__class__ = table.get(type(block), type(block))
            if table is _PADDED and not isinstance(block, tuple(_PLAIN)):
                raise ValueError(f"experts in a {type(block).__name__} would not see padding: leave block_fn out")


class NaFlexVisionMoE(NaFlexVit):
    """timm's NaFlexVit with experts in some blocks; padding takes no capacity and counts in no loss.

    Routing groups of `group_size` are cut with the padding inside: for expert choice, soft routing and top-k with a
    limit an image's result then depends on the padding beside it.

    Args:
        pos_embed: "learned" (interpolated to each image's grid), "factorized" (into rows and columns), "rope" (queries
            and keys are rotated by row and column, timm's axial RoPE), or "none".
        pos_temperature: of "rope".
        moe_layers: see `sparse_blocks`.
        **kwargs: of timm's `NaFlexVit` and `NaFlexVitCfg` and of `vmoe.moe.config.RoutingSettings`, and
            `router_preset`; `num_experts=0` makes the dense baseline.
    """

    def __init__(
        self,
        *,
        moe_layers: str | Sequence[int] = "every2",
        pos_embed: str = "learned",
        pos_temperature: float = 10_000.0,
        **kwargs,
    ) -> None:
        if pos_embed not in ("learned", "learn", "factorized", "rope", "none", ""):
            raise ValueError(f"pos_embed must be 'learned', 'factorized', 'rope' or 'none', got {pos_embed!r}")
        for name in ("block_fn", "mlp_layer", "swiglu_mlp", "scale_mlp_norm"):
            if kwargs.get(name):
                raise ValueError(f"{name} cannot be set: experts replace timm's MLPs (expert_mlp has gated ones)")
        routing = take_routing(kwargs, ROUTING_DEFAULTS)
        if pos_embed == "rope":
            if given := sorted({"rope_type", "rope_temperature"} & kwargs.keys()):
                raise ValueError(f"pos_embed='rope' is axial, its setting is pos_temperature: leave {given[0]} out")
            kwargs |= {"rope_type": "axial", "rope_temperature": pos_temperature}
        super().__init__(pos_embed={"rope": "none", "learn": "learned"}.get(pos_embed, pos_embed), **kwargs)
        chosen = sparse_blocks(moe_layers, len(self.blocks)) if routing["num_experts"] else ()
        num_tokens = math.prod(self.embeds.pos_embed_grid_size or (16, 16)) + self.num_prefix_tokens
        for block in (self.blocks[index] for index in chosen):
            fc1, style = block.mlp.fc1, {"act_layer": type(block.mlp.act), "drop": block.mlp.drop1.p}
            style |= {"bias": fc1.bias is not None, "device": fc1.weight.device, "dtype": fc1.weight.dtype}
            block.mlp = SparseMoE(fc1.in_features, fc1.out_features, num_tokens=num_tokens, **style, **routing)
        pass_padding_on(self)
        if pos_embed == "rope":
            check_rotation(self.blocks[0].attn.head_dim, pos_temperature)
        choose_attention(self, routing)
        if chosen:
            self.init_weights(needs_reset=False)

    def _forward_embeds(self, *args, **kwargs) -> dict[str, Tensor]:
        return embed_padded(self, *args, **kwargs)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        names = {"embeds.pos_embed_y", "embeds.pos_embed_x"}
        return super().no_weight_decay() | names | without_decay(self)

    def fix_init_weight(self) -> None:
        """timm's `fix_init`, for experts too."""
        scale_depth(self.blocks)


def from_square(state_dict: dict[str, Tensor], model: NaFlexVit) -> dict[str, Tensor]:
    """The state dict of a ViT or V-MoE of square images as that of `model`, by timm's filter."""
    tokens = {name: state_dict[name].clone() for name in ("cls_token", "reg_token") if name in state_dict}
    return checkpoint_filter_fn({**state_dict, **tokens}, model)  # adds positions to the tokens, in place


_STYLE = {"act_layer": "gelu_tanh", "weight_init": "jax", "global_pool": "avg"}
# The arguments of `NaFlexVisionMoE` that each name stands for.
NAFLEX_MODELS: dict[str, dict] = {
    "vmoe_naflex_tiny_patch8": {  # for tests and first steps
        **{"patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4},
        **{"pos_embed_grid_size": (6, 6), "num_selected_experts": 1},
    },
    "vmoe_naflex_base_patch16": {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
}
_CFG = {"mean": IMAGENET_INCEPTION_MEAN, "std": IMAGENET_INCEPTION_STD, "interpolation": "bicubic", "crop_pct": 1.0}
_CFG |= {"input_size": (3, 256, 256), "first_conv": "embeds.proj", "classifier": "head", "license": "apache-2.0"}
_TINY_CFG = {**_CFG, "input_size": (3, 48, 48)}
# `register_model` looks for this name.
default_cfgs = generate_default_cfgs({name: _TINY_CFG if "tiny" in name else _CFG for name in NAFLEX_MODELS})


_features = {"out_indices": 3, "feature_cls": "getter"}
_styled = {name: {**_STYLE, **own} for name, own in NAFLEX_MODELS.items()}
register_models(__name__, NaFlexVisionMoE, _styled, lambda _: _features, pretrained_filter_fn=from_square)
