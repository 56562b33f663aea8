"""SigLino (arXiv 2512.20157): vision transformers, with experts or dense, distilled from DINOv3 and SigLIP 2.

It takes images of one size, or patches of images of any sizes with a padding mask. Importing this file registers the
`siglino_*` models with timm.

Shapes, by suffix: B batch, P patches, T = class token + registers + P, D width, C classes.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import AttentionPoolLatent, DropPath, GluMlp, to_2tuple
from timm.layers.activations import GELUTanh
from timm.models import checkpoint, generate_default_cfgs
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from vmoe.models.siglino_attention import SinkAttention, golden_frequencies, patch_positions, rotation
from vmoe.models.text import attention_bias, masked_mean, text_routing
from vmoe.models.timm_builder import register_models
from vmoe.models.vision import BlocksMixin, choose_attention, scale_depth, sparse_blocks
from vmoe.moe import SparseMoE
from vmoe.moe.config import PRESETS
from vmoe.moe.experts import GATED_ACTIVATIONS

# The rate of the balancing bias is DeepSeek-V3's: SigLino's own is not published.
ROUTING_DEFAULTS = {**PRESETS["deepseek"], "num_experts": 28, "num_selected_experts": 6}
ROUTING_DEFAULTS |= {"normalize_weights": False, "num_shared_experts": 0}
# SigLIP 2's attention pooling (So400m).
POOL_HEADS, POOL_WIDTH = 16, 4304


class PatchEmbed(nn.Module):
    """A linear layer without bias from a patch's pixels, (row, column, channel), to D.

    `img_size` is the usual size of images, from which `grid_size` follows; others are taken as well.
    """

    def __init__(self, img_size: int | tuple[int, int], patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size, self.in_chans = to_2tuple(patch_size), in_chans
        self.set_input_size(img_size)
        self.proj = nn.Linear(math.prod(self.patch_size) * in_chans, embed_dim, bias=False)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Changes the usual size of images."""
        self.img_size = to_2tuple(img_size)
        self.grid_size = self.grid(*self.img_size)
        self.num_patches = math.prod(self.grid_size)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of an image's patches; ValueError: it does not consist of whole patches."""
        rows, columns = self.patch_size
        if height < rows or width < columns or height % rows or width % columns:
            raise ValueError(
                f"images must consist of whole patches of {rows} x {columns} pixels, got {height} x {width}: resize"
            )
        return height // rows, width // columns

    def cut(self, images_B3HW: Tensor) -> Tensor:
        """Images -> (B, P, pixels) patches, row by row."""
        if images_B3HW.shape[1] != self.in_chans:
            raise ValueError(f"images must be (B, {self.in_chans}, H, W), got {tuple(images_B3HW.shape)}")
        self.grid(*images_B3HW.shape[-2:])
        h, w = self.patch_size
        return rearrange(images_B3HW, "b c (rows h) (columns w) -> b (rows columns) (h w c)", h=h, w=w)

    def forward(self, patches_BPx: Tensor) -> Tensor:
        return self.proj(patches_BPx)


class SigLinoBlock(nn.Module):
    """A pre-norm block: x + attn(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, norms: Sequence[nn.Module], attn: nn.Module, mlp: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = norms
        self.attn, self.mlp = attn, mlp
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x_BTD: Tensor, rotation_BHTr: Tensor, bias_B11T: Tensor | None, mask_BT: Tensor | None) -> Tensor:
        x_BTD = x_BTD + self.drop_path(self.attn(self.norm1(x_BTD), rotation_BHTr, bias_B11T))
        h_BTD = self.norm2(x_BTD)
        h_BTD = self.mlp(h_BTD, mask_BT) if isinstance(self.mlp, SparseMoE) else self.mlp(h_BTD)
        return x_BTD + self.drop_path(h_BTD)


class SigLino(BlocksMixin, nn.Module):
    """SigLino, with two interfaces.

    As one of timm's models, `model(images)` gives the logits (B, C), or the pooled features (B, D) if `num_classes` is
    0. As SigLino itself, `model(pixel_values=..., padding_mask=..., spatial_shapes=...)` gives features for each
    teacher: {"patch_features": {"siglino": (B, P, D), "dinov3": (B, P, ...), "siglip2": (B, P, ...)},
    "summary_features": {"siglino": (B, D), ...}}. Both take images (B, 3, H, W) of whole patches, in -1..1, or patches
    (B, P, pixels), which `SigLinoTransform` makes. What is computed for padding means nothing.

    Args:
        img_size: the usual size of images, from which `grid_size` follows; any other is taken as well.
        global_pool: "token" (the class token) or "avg" (the mean of the real patches), for the classifier.
        head_dim: by default `embed_dim / num_heads`; a multiple of 4.
        num_kv_heads: heads of keys and values, a divisor of `num_heads`; None: as many.
        mlp_width, mlp: of dense blocks; `mlp` is a name as of the setting `expert_mlp`.
        norm_weights: the blocks' RMS norms have weights, and the constant `norm_eps`; else that of PyTorch.
        min_frequency, max_frequency: of the rotation.
        teacher_dims: widths of the teachers' features. With a classifier, their heads are frozen.
        moe_layers: see `vmoe.models.vision.sparse_blocks`.
        **routing: `vmoe.moe.config.RoutingSettings`, `router_preset`; `num_experts=0` makes the dense baseline, whose
            blocks of `moe_layers` have MLPs of `expert_width`, the others of `mlp_width`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 256,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 0,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 18,
        num_heads: int = 8,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        mlp_width: int | None = None,
        mlp: str = "swiglu",
        reg_tokens: int = 4,
        qk_norm: bool = True,
        norm_weights: bool = True,
        norm_eps: float = 1e-5,
        min_frequency: float = 1.0,
        max_frequency: float = 20.0,
        teacher_dims: Mapping[str, int] | None = None,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        moe_layers: str | Sequence[int] = "every1",
        **routing,
    ) -> None:
        super().__init__()
        settings = text_routing(routing, ROUTING_DEFAULTS)
        head_dim, num_kv_heads = _checked_heads(embed_dim, num_heads, head_dim, num_kv_heads)
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = 1 + reg_tokens
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self._add_prefix_and_positions(reg_tokens, (num_heads, head_dim // 4, min_frequency, max_frequency))
        sparse = sparse_blocks(moe_layers, depth)
        norm = partial(nn.RMSNorm, embed_dim, norm_eps if norm_weights else None, norm_weights)
        attention = partial(SinkAttention, embed_dim, num_heads, head_dim, num_kv_heads, qk_norm)
        make_mlp = partial(_mlp, embed_dim, mlp_width, mlp, self.patch_embed.num_patches + self.num_prefix_tokens)
        rates = [drop_path_rate * index / max(1, depth - 1) for index in range(depth)]
        self.blocks = nn.ModuleList(
            SigLinoBlock((norm(), norm()), attention(), make_mlp(settings if index in sparse else None), rate)
            for index, rate in enumerate(rates)
        )
        self.norm = nn.RMSNorm(embed_dim, norm_eps)
        self._add_teachers({"dinov3": 1024, "siglip2": 1152, **(teacher_dims or {})})
        self.head_drop = nn.Dropout(drop_rate)
        choose_attention(self, settings)
        self.reset_classifier(num_classes, global_pool)
        self.init_weights(needs_reset=False)

    def _add_prefix_and_positions(self, reg_tokens: int, golden: tuple[int, int, float, float]) -> None:
        """Class token, registers, and the frequencies of the rotation by the arguments of `golden_frequencies`."""
        self.cls_token = nn.Parameter(torch.empty(1, 1, self.embed_dim))
        self.reg_token = nn.Parameter(torch.empty(1, reg_tokens, self.embed_dim)) if reg_tokens else None
        self.golden = golden
        self.register_buffer("frequencies", golden_frequencies(*golden))

    def _add_teachers(self, widths: Mapping[str, int]) -> None:
        """The heads for the teachers, of their widths."""
        self.teachers = nn.ModuleDict({name: _adapter(self.embed_dim, width) for name, width in widths.items()})
        self.siglip2_pool = _siglip2_pool(widths["siglip2"])

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Where timm finds features, and of what size."""
        size = {"num_chs": self.embed_dim, "reduction": self.patch_embed.patch_size[0]}
        return [{"module": f"blocks.{index}", **size} for index in range(len(self.blocks))]

    def init_weights(self, needs_reset: bool = True) -> None:
        """Normal weights of deviation 0.02, smaller towards the last blocks in what adds to the tokens; experts and
        gates have their own. `needs_reset` after `to_empty`, when all modules reset themselves."""
        for module in self.modules():
            if needs_reset and hasattr(module, "reset_parameters"):
                module.reset_parameters()
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.frequencies.copy_(golden_frequencies(*self.golden))
        scale_depth(self.blocks)
        for block in self.blocks:
            nn.init.zeros_(block.attn.sinks)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)
        self.siglip2_pool.init_weights()

    def _apply(self, fn, recurse: bool = True):
        frequencies = self.frequencies
        super()._apply(fn, recurse)
        if self.frequencies.dtype != torch.float32:  # angles are too coarse in half precision
            self.frequencies = frequencies.to(self.frequencies.device)
        return self

    # --- tokens ---

    def tokens(
        self, x: Tensor, padding_mask: Tensor | None = None, spatial_shapes: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """(B, T, D) of images or patches, arguments as of `forward`, and what the blocks know of them: the rotation of
        queries and keys, and of a batch with padding what hides it from attention and which tokens are real."""
        if x.ndim == 4:
            if padding_mask is not None:
                raise ValueError("images have no padding: leave padding_mask out, or give patches (B, P, pixels)")
            grid = self.patch_embed.grid(*x.shape[-2:])
            patches_BPx, shape_B2 = self.patch_embed.cut(x), torch.tensor([grid], device=x.device)
        else:
            patches_BPx, shape_B2 = x, self._check_patches(x, padding_mask, spatial_shapes)
        position_BP2 = patch_positions(shape_B2, patches_BPx.shape[1])
        bias_B11T = mask_BT = None
        if padding_mask is not None:
            mask_BP = padding_mask.bool()
            # Padding may hold anything, NaN too, which would reach all tokens through attention.
            patches_BPx = torch.where(mask_BP[..., None], patches_BPx, 0)
            position_BP2 = position_BP2 * mask_BP[..., None]
            mask_BT = F.pad(mask_BP, (self.num_prefix_tokens, 0), value=True)
            bias_B11T = attention_bias(mask_BT, patches_BPx.dtype)
        x_BPD = self.patch_embed(patches_BPx)
        prefix = [each.expand(x.shape[0], -1, -1) for each in (self.cls_token, self.reg_token) if each is not None]
        position_BT2 = F.pad(position_BP2, (0, 0, self.num_prefix_tokens, 0))
        return torch.cat([*prefix, x_BPD], dim=1), rotation(position_BT2, self.frequencies), bias_B11T, mask_BT

    def _check_patches(self, x_BPx: Tensor, padding_mask: Tensor | None, spatial_shapes: Tensor | None) -> Tensor:
        """The grids of patches; ValueError if they or the mask do not fit the patches."""
        size = self.patch_embed.proj.in_features
        if x_BPx.ndim != 3 or x_BPx.shape[2] != size:
            raise ValueError(
                f"the model takes images (B, {self.in_chans}, H, W) or patches (B, P, {size}), got {tuple(x_BPx.shape)}"
            )
        B, P, _ = x_BPx.shape
        if spatial_shapes is None or tuple(spatial_shapes.shape) != (B, 2):
            given = None if spatial_shapes is None else tuple(spatial_shapes.shape)
            raise ValueError(f"patches need spatial_shapes ({B}, 2), the rows and columns of each image, got {given}")
        if padding_mask is not None and tuple(padding_mask.shape) != (B, P):
            raise ValueError(f"padding_mask must be ({B}, {P}) for these patches, got {tuple(padding_mask.shape)}")
        if not torch.compiler.is_compiling():
            real_BP = x_BPx.new_ones(B, P) if padding_mask is None else padding_mask
            real_BP, area_B1 = real_BP.bool(), spatial_shapes.prod(dim=1, keepdim=True)
            if not real_BP.any(dim=1).all():
                raise ValueError("padding_mask has an image without a real patch: leave such images out of the batch")
            outside_BP = real_BP & (torch.arange(P, device=x_BPx.device) >= area_B1)
            if (spatial_shapes < 1).any() or outside_BP.any():
                raise ValueError(
                    "spatial_shapes must count at least the real patches of each image: padding_mask marks the others"
                )
        return spatial_shapes

    # --- features ---

    def forward_features(
        self, x: Tensor, padding_mask: Tensor | None = None, spatial_shapes: Tensor | None = None
    ) -> Tensor:
        """(B, T, D) after the final norm; arguments as of `forward`."""
        return self.forward_blocks(*self.tokens(x, padding_mask, spatial_shapes))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        padding_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
    ) -> list | tuple[Tensor, list]:
        """As of timm's ViT: the patches after the blocks of `indices`, and the result of `forward_features`.

        Patches instead of images need output_fmt="NLC", since they form no common grid.
        """
        if output_fmt not in (("NCHW", "NLC") if x.ndim == 4 else ("NLC",)):
            raise ValueError(f"output_fmt must be 'NLC', or 'NCHW' for images, got {output_fmt!r}")
        chosen, last = feature_take_indices(len(self.blocks), indices)
        x_BTD, *about = self.tokens(x, padding_mask, spatial_shapes)
        found = []
        for index, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            recompute = self.grad_checkpointing and torch.is_grad_enabled()
            x_BTD = checkpoint(block, x_BTD, *about) if recompute else block(x_BTD, *about)
            if index in chosen:
                found.append(self.norm(x_BTD) if norm else x_BTD)
        R = self.num_prefix_tokens
        patches = [each_BTD[:, R:] for each_BTD in found]
        if output_fmt == "NCHW":
            rows, columns = self.patch_embed.grid(*x.shape[-2:])
            patches = [rearrange(each, "b (h w) d -> b d h w", h=rows, w=columns).contiguous() for each in patches]
        if return_prefix_tokens:
            patches = [(each, each_BTD[:, :R]) for each, each_BTD in zip(patches, found, strict=True)]
        return patches if intermediates_only else (self.norm(x_BTD), patches)

    def forward_head(self, x_BTD: Tensor, pre_logits: bool = False, padding_mask: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, C) logits, or (B, D) with `pre_logits`."""
        pooled_BD = x_BTD[:, 0]
        if self.global_pool == "avg":
            x_BPD = x_BTD[:, self.num_prefix_tokens :]
            pooled_BD = x_BPD.mean(dim=1) if padding_mask is None else masked_mean(x_BPD, padding_mask.bool())
        pooled_BD = self.head_drop(pooled_BD)
        return pooled_BD if pre_logits else self.head(pooled_BD)

    def teacher_features(self, x_BTD: Tensor, padding_mask: Tensor | None = None) -> dict[str, dict[str, Tensor]]:
        """(B, T, D) of `forward_features` -> the features of patches and images, for SigLino and each teacher."""
        all_BTc = {"siglino": x_BTD, **{name: adapter(x_BTD) for name, adapter in self.teachers.items()}}
        summaries = {name: each[:, 0] for name, each in all_BTc.items()}
        bias = None
        if padding_mask is not None:
            mask_BT = F.pad(padding_mask.bool(), (self.num_prefix_tokens, 0), value=True)
            bias = attention_bias(mask_BT, x_BTD.dtype)
        summaries["siglip2"] = self.siglip2_pool(all_BTc["siglip2"], attn_mask=bias)
        patches = {name: each[:, self.num_prefix_tokens :] for name, each in all_BTc.items()}
        return {"patch_features": patches, "summary_features": summaries}

    def forward(
        self,
        x: Tensor | None = None,
        padding_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
    ) -> Tensor | dict[str, dict[str, Tensor]]:
        """Logits or pooled features of `x`, or features for all teachers of `pixel_values`; see the class.

        Args:
            x, pixel_values: images (B, 3, H, W), or patches (B, P, pixels); one of the two.
            padding_mask: (B, P), bool or numbers, true for real patches; None: all are.
            spatial_shapes: (B, 2) rows and columns of each image's patches, which come first in their row.

        ValueError: an image that does not consist of whole patches, or has no real patch, or shapes that do not fit.
        """
        if (x is None) == (pixel_values is None):
            raise TypeError("give either images, model(images), or model(pixel_values=...) for all teachers' features")
        if x is None:
            x_BTD = self.forward_features(pixel_values, padding_mask, spatial_shapes)
            return self.teacher_features(x_BTD, padding_mask)
        return self.forward_head(self.forward_features(x, padding_mask, spatial_shapes), padding_mask=padding_mask)

    # --- timm's interface ---

    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier; without classes the pooled features are the output, and the teachers' heads are trained."""
        if global_pool not in (None, "token", "avg"):
            raise ValueError(f"global_pool must be 'token' or 'avg', got {global_pool!r}")
        self.num_classes = num_classes
        self.global_pool = global_pool or self.global_pool
        like = {"device": self.cls_token.device, "dtype": self.cls_token.dtype}
        self.head = nn.Linear(self.embed_dim, num_classes, **like) if num_classes else nn.Identity()
        self.head.train(self.training)
        for heads in (self.teachers, self.siglip2_pool):  # without a gradient they would stop DistributedDataParallel
            if heads is not None:
                heads.requires_grad_(not num_classes)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Changes the usual size of images."""
        self.patch_embed.set_input_size(img_size)
        update_model_input_size(self, self.patch_embed.img_size)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the blocks after the last of `indices`, and all heads with `prune_head`; returns their indices."""
        chosen, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.teachers, self.siglip2_pool = nn.ModuleDict(), None
            self.reset_classifier(0)
        return chosen


def _checked_heads(embed_dim: int, num_heads: int, head_dim: int | None, num_kv_heads: int | None) -> tuple[int, int]:
    """(width of a head, heads of keys and values); ValueError: they cannot be."""
    head_dim, num_kv_heads = head_dim or embed_dim // num_heads, num_kv_heads or num_heads
    if head_dim % 4:
        raise ValueError(f"head_dim must be a multiple of 4, since half of it is rotated in pairs, got {head_dim}")
    if num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads must divide num_heads ({num_heads}), got {num_kv_heads}")
    return head_dim, num_kv_heads


def _mlp(embed_dim: int, mlp_width: int | None, mlp: str, num_tokens: int, routing: dict | None) -> nn.Module:
    """The experts of a block, or its dense MLP if `routing` is None or has no experts."""
    if routing is not None and routing["num_experts"]:
        return SparseMoE(embed_dim, mlp_width, bias=False, num_tokens=num_tokens, **routing)
    if routing is not None:
        mlp_width, mlp = routing.get("expert_width") or mlp_width, routing["expert_mlp"]
    if mlp not in GATED_ACTIVATIONS:
        raise ValueError(f"mlp must be one of {', '.join(GATED_ACTIVATIONS)}, got {mlp!r}")
    width = mlp_width or 4 * embed_dim
    return GluMlp(embed_dim, 2 * width, act_layer=GATED_ACTIVATIONS[mlp], bias=False, gate_last=False)


def _adapter(embed_dim: int, width: int) -> nn.Sequential:
    """From SigLino's tokens to a teacher's."""
    parts = {"fc1": nn.Linear(embed_dim, width), "norm": nn.LayerNorm(width), "act": nn.GELU()}
    return nn.Sequential(OrderedDict(parts, fc2=nn.Linear(width, width, bias=False)))


def _siglip2_pool(width: int) -> AttentionPoolLatent:
    if width % POOL_HEADS:
        raise ValueError(f"teacher_dims['siglip2'] must be a multiple of {POOL_HEADS}, got {width}")
    # Half a unit more, which timm rounds off: a quotient may be rounded to less than POOL_WIDTH.
    style = {"mlp_ratio": (POOL_WIDTH + 0.5) / width, "norm_layer": nn.LayerNorm, "act_layer": GELUTanh}
    return AttentionPoolLatent(width, num_heads=POOL_HEADS, **style)


# --- images to patches ---


class SigLinoTransform:
    """SigLino's image processor: an image becomes patches, a list of images a batch of them.

    An image is resized (bicubic) to whole patches with its shape kept as far as they allow, and with at least
    `min_pixels` and at most `max_pixels`. Patches of zeros fill the row up to P = max_pixels / patch_size². The result
    is {"pixel_values": (P, pixels) in -1..1, "padding_mask": (P,) bool, "spatial_shapes": (2,) rows and columns}, what
    `SigLino.forward` takes, for a batch with an axis B in front.
    """

    def __init__(self, patch_size: int = 16, min_pixels: int = 128 * 128, max_pixels: int = 256 * 256) -> None:
        if not patch_size**2 <= min_pixels <= max_pixels:
            raise ValueError(
                f"min_pixels must lie between a patch ({patch_size**2}) and max_pixels ({max_pixels}), got {min_pixels}"
            )
        self.patch_size, self.min_pixels, self.max_pixels = patch_size, min_pixels, max_pixels

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after resizing; ValueError: smaller than a patch, or more than 200 times as long as wide."""
        step = self.patch_size
        if min(height, width) < step:
            raise ValueError(f"an image of {width} x {height} pixels is smaller than a patch ({step}): leave it out")
        rounded = [round(side / step) * step for side in (height, width)]
        if math.prod(rounded) > self.max_pixels:
            scale = math.sqrt(height * width / self.max_pixels)
            rounded = [math.floor(side / scale / step) * step for side in (height, width)]
        elif math.prod(rounded) < self.min_pixels:
            scale = math.sqrt(self.min_pixels / (height * width))
            rounded = [math.ceil(side * scale / step) * step for side in (height, width)]
        if max(height, width) > 200 * min(height, width) or not 0 < math.prod(rounded) <= self.max_pixels:
            raise ValueError(f"an image of {width} x {height} pixels is too long for patches of {step}: crop it")
        return rounded[0], rounded[1]

    def __call__(self, image: Image.Image | Sequence[Image.Image]) -> dict[str, Tensor]:
        if not isinstance(image, Image.Image):
            if not image:
                raise ValueError("there must be at least one image, got an empty list")
            samples = [self(each) for each in image]
            return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
        height, width = self.size(image.height, image.width)
        resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        pixels_HW3 = (torch.from_numpy(np.array(resized)).float() / 255 - 0.5) / 0.5
        patches_Px = rearrange(
            pixels_HW3, "(rows h) (columns w) c -> (rows columns) (h w c)", h=self.patch_size, w=self.patch_size
        )
        padding = self.max_pixels // self.patch_size**2 - len(patches_Px)
        return {
            "pixel_values": F.pad(patches_Px, (0, 0, 0, padding)),
            "padding_mask": F.pad(torch.ones(len(patches_Px), dtype=torch.bool), (0, padding)),
            "spatial_shapes": torch.tensor([height // self.patch_size, width // self.patch_size]),
        }


# --- names ---

_SPARSE = {"embed_dim": 768, "depth": 18, "num_heads": 8, "head_dim": 128, "num_experts": 28, "expert_width": 384}
_DENSE = {"num_experts": 0}
_SMALL = {**_DENSE, "depth": 12, "head_dim": 64, "norm_weights": False}
# The arguments that each name stands for: those of the project's own configs.
SIGLINO_CONFIGS: dict[str, dict] = {
    "siglino_moe_0_3b": {**_SPARSE, "num_selected_experts": 6},
    "siglino_moe_0_15b": {**_SPARSE, "num_selected_experts": 2},
    "siglino_0_6b": {**_DENSE, "embed_dim": 1280, "depth": 18, "num_heads": 16, "head_dim": 80, "mlp_width": 5120},
    "siglino_70m": {**_SMALL, "embed_dim": 512, "num_heads": 8, "mlp_width": 2048},
    "siglino_30m": {**_SMALL, "embed_dim": 384, "num_heads": 6, "mlp_width": 1536},
}
_CFG = {"num_classes": 0, "input_size": (3, 256, 256), "crop_pct": 1.0, "interpolation": "bicubic"}
_CFG |= {"mean": IMAGENET_INCEPTION_MEAN, "std": IMAGENET_INCEPTION_STD, "classifier": "head"}
# `register_model` looks for this name.
default_cfgs = generate_default_cfgs(dict.fromkeys(SIGLINO_CONFIGS, _CFG))


register_models(__name__, SigLino, SIGLINO_CONFIGS, lambda _: {"out_indices": 3, "feature_cls": "getter"})
