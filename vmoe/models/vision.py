"""V-MoE (arXiv 2106.05974) and Soft MoE (arXiv 2308.00951): timm's ViT with experts in some blocks.

Pooling variants, `features_only`, `reset_classifier`, `set_input_size`, `dynamic_img_size`, layer decay and drop path
work as in timm. `vmoe.models.registry` gives the sizes their names.

Shapes, by suffix: B batch, P patches, D width, M members of an ensemble, C classes.
"""

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import AttentionRope, Mlp, create_rope_embed
from timm.models import checkpoint
from timm.models.vision_transformer import Block, VisionTransformer, get_init_weights_vit
from torch import Tensor, nn

from vmoe.moe import SparseMoE
from vmoe.moe.config import SETTING_NAMES, RoutingSettings, with_preset
from vmoe.moe.record import attach_loss

ROUTING_DEFAULTS = {"num_experts": 8, "num_selected_experts": 2}


def sparse_blocks(moe_layers: str | Sequence[int], depth: int) -> tuple[int, ...]:
    """Indices of the blocks that hold experts, in a model of `depth` blocks.

    `moe_layers` is "everyN": the last of each N blocks ("every2": 1, 3, 5, ...); "lastN": the last N of "every2", as in
    the V-MoE paper; "second_half", as in the Soft MoE paper; or the indices themselves.
    """
    if moe_layers == "second_half":
        return tuple(range(depth // 2, depth))
    if isinstance(moe_layers, str):
        word = re.fullmatch(r"(every|last)([1-9][0-9]*)", moe_layers)
        if word is None:
            raise ValueError(f"moe_layers must be 'everyN', 'lastN', 'second_half' or a list, got {moe_layers!r}")
        number, odd = int(word[2]), range(1, depth, 2)
        if number > (depth if word[1] == "every" else len(odd)):
            raise ValueError(f"moe_layers={moe_layers!r} asks for more than a model with {depth} blocks has")
        return tuple(range(number - 1, depth, number) if word[1] == "every" else odd[-number:])
    if isinstance(moe_layers, int):
        raise ValueError(f"moe_layers must be a word such as 'last2' or a list, got {moe_layers}; write [{moe_layers}]")
    blocks = tuple(sorted(set(moe_layers)))
    if any(index not in range(depth) for index in blocks):
        raise ValueError(f"moe_layers must lie in 0..{depth - 1}, the model's blocks, got {list(moe_layers)}")
    return blocks


def _check_temperature(temperature: float) -> None:
    if not (isinstance(temperature, (int, float)) and temperature > 0):
        raise ValueError(f"pos_temperature must be > 0, got {temperature!r}")


def sincos2d_positions(height: int, width: int, dim: int, temperature: float, device=None, dtype=None) -> Tensor:
    """Fixed position embeddings of a grid of patches, (1, height·width, dim), row by row (MoCo v3, arXiv 2104.02057).

    A quarter of the channels each holds sin(x·w), cos(x·w), sin(y·w) and cos(y·w), w from 1 to 1/temperature.
    """
    if dim % 4 or dim < 8:
        raise ValueError(f"pos_embed='sincos2d' needs a width that is a multiple of 4 and at least 8, got {dim}")
    _check_temperature(temperature)
    kind = {"device": device, "dtype": dtype}
    frequency = temperature ** -torch.linspace(0, 1, dim // 4, **kind)
    y, x = torch.meshgrid(torch.arange(height, **kind), torch.arange(width, **kind), indexing="ij")
    angles_x, angles_y = x.reshape(-1, 1) * frequency, y.reshape(-1, 1) * frequency
    return torch.cat([angles_x.sin(), angles_x.cos(), angles_y.sin(), angles_y.cos()], dim=1)[None]


def norm_queries_and_keys(model: nn.Module) -> None:
    """Adds the reference's QK norm (ViT-22B, arXiv 2302.05442): a LayerNorm without bias on queries and keys."""
    for attention in [module for module in model.modules() if hasattr(module, "q_norm")]:
        kwargs = {"eps": 1e-6, "bias": False, **_like(attention.proj.weight)}
        attention.q_norm = nn.LayerNorm(attention.head_dim, **kwargs)
        attention.k_norm = nn.LayerNorm(attention.head_dim, **kwargs)


def _like(tensor: Tensor) -> dict:
    return {"device": tensor.device, "dtype": tensor.dtype}


def without_decay(model: nn.Module) -> set[str]:
    """Names of the experts' biases, norms and activations, and of what is normalised, whose length means nothing: slots
    of soft routing, and the matrices of a cosine gate."""
    names = set()
    for name, layer in model.named_modules():
        if isinstance(layer, SparseMoE):
            own = {f"experts.{key}" for key, parameter in layer.experts.named_parameters() if parameter.ndim <= 2}
            own |= {"router.slots"} if layer.soft else set()
            own |= {"router.weight", "router.projection"} if layer.settings.gate == "cosine" else set()
            names |= {f"{name}.{key}".lstrip(".") for key in own}
    return names


def choose_attention(model: nn.Module, settings: dict) -> None:
    """With backend="reference" attention is plain operations too, which have derivatives of any order."""
    for module in model.modules() if settings.get("backend") == "reference" else ():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False


def scale_depth(blocks: nn.Module) -> None:
    """timm's `fix_init` of blocks: what later ones add is smaller."""
    for index, block in enumerate(blocks):
        scale = (2.0 * (index + 1)) ** 0.5
        block.attn.proj.weight.data.div_(scale)
        for name, parameter in block.mlp.named_parameters():  # of the MLP, or of experts and the shared expert
            if name.endswith("fc2.weight"):
                parameter.data.div_(scale)


def take_routing(kwargs: dict, defaults: dict) -> dict:
    """Move the routing settings out of a model's arguments, completed by its preset and defaults; a ValueError for one
    out of range, also of a dense model, which has no layer to check it."""
    given = {name: kwargs.pop(name) for name in SETTING_NAMES & kwargs.keys()}
    settings = with_preset(defaults, given)
    if not settings["num_experts"]:
        own = {name: value for name, value in settings.items() if name != "router_preset"}
        RoutingSettings(**own | {"num_experts": 2**20})
    return settings


def check_rotation(head_dim: int, temperature: float) -> None:
    """ValueError: heads of so many channels cannot be rotated by row and column with this temperature."""
    if head_dim % 4:
        raise ValueError(f"pos_embed='rope' needs heads of a multiple of 4 channels, got {head_dim}")
    _check_temperature(temperature)


class RotaryAttention(AttentionRope):
    """timm's attention with rotary positions (RoPE, arXiv 2403.13298). timm's blocks hand on a mask alone, which here
    is (sines and cosines of P patches for heads of width d, (P, 2d); mask or None)."""

    def forward(self, x: Tensor, attn_mask: tuple[Tensor, Tensor | None], is_causal: bool = False) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return super().forward(x, *attn_mask, is_causal)


def _check_arguments(pos_embed: str, first_patch: bool, kwargs: dict) -> None:
    """ValueError: unknown positions, or an argument of timm's that does not go with them, with experts, or with pooling
    the first patch."""
    if pos_embed not in ("learn", "sincos2d", "rope", "none", ""):
        raise ValueError(f"pos_embed must be 'learn', 'sincos2d', 'rope' or 'none', got {pos_embed!r}")
    if pos_embed == "rope" and (kwargs.get("patch_drop_rate") or "attn_layer" in kwargs):
        raise ValueError("pos_embed='rope' rotates all patches in timm's attention: no patch_drop_rate, attn_layer")
    if first_patch and kwargs.get("reg_tokens"):
        raise ValueError("global_pool='token' without a class token pools the first patch; leave reg_tokens out")
    if "block_fn" in kwargs:
        raise ValueError("block_fn cannot be set: experts replace the MLPs of timm's Block; leave it out")


def _checked_size(ensemble_size: int, sparse: Sequence[int]) -> int:
    """The size of an ensemble, if a model with these sparse blocks can be one; else a ValueError."""
    if type(ensemble_size) is not int:
        raise ValueError(f"ensemble_size must be a whole number, got {ensemble_size!r}")
    if ensemble_size != 1 and not sparse:
        raise ValueError(f"ensemble_size={ensemble_size} needs blocks with experts; leave it out of a dense model")
    return ensemble_size


class CopyingBlock(Block):
    """timm's block on `copies` copies of each image, next to each other: where an ensemble begins."""

    def __init__(self, copies: int, **kwargs) -> None:
        super().__init__(**kwargs)
        self.copies = copies

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """(B, ...) -> (B · copies, ...)."""
        return super().forward(torch.stack([x] * self.copies, dim=1).flatten(0, 1), *args, **kwargs)


def log_mean_probability(logits_BMC: Tensor) -> Tensor:
    """(B, C) log of the mean of the probabilities that M members give."""
    return logits_BMC.log_softmax(-1).logsumexp(1) - math.log(logits_BMC.shape[1])


class BlocksMixin:
    """timm's interface for a model with `blocks` and a final `norm`."""

    grad_checkpointing = False

    def forward_blocks(self, x: Tensor, *args: Any) -> Tensor:
        """Blocks, which also get `args`, and the final norm."""
        for block in self.blocks:
            recompute = self.grad_checkpointing and torch.is_grad_enabled()
            x = checkpoint(block, x, *args) if recompute else block(x, *args)
        return self.norm(x)

    def set_grad_checkpointing(self, enable: bool = True, **kwargs) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        tokens = {"cls_token", "reg_token", "pos_embed", "image_pos_embed", "text_pos_embed"}
        return tokens | {"logit_scale", "logit_bias"} | without_decay(self)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups by depth, for layer decay."""
        stem = r"^patch_embed|^cls_token|^reg_token|^token_embedding|^(?:image_|text_)?pos_embed"
        return {"stem": stem, "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}


class VisionMoE(VisionTransformer):
    """A `timm` ViT with experts in some blocks.

    Args:
        moe_layers: see `sparse_blocks`.
        global_pool: as timm's; "token" without a class token takes the first patch.
        pos_embed: "learn"; "sincos2d" (fixed, for patches only, not in the state dict); "rope" (queries and keys of
            patches are rotated by row and column, timm's axial RoPE); or "none". The last three take any image size.
        pos_temperature: of "sincos2d" and "rope".
        qk_norm: a LayerNorm without bias on queries and keys, in the blocks and in `global_pool="map"`.
        representation_size: width of a linear layer with tanh before the classifier, `pre_logits`, or None.
        ensemble_size: M, members of an efficient ensemble (E3, arXiv 2110.03360), see below.
        **kwargs: of `timm.models.VisionTransformer` and of `vmoe.moe.config.RoutingSettings`, and `router_preset`;
            `num_experts=0` makes the dense baseline.

    An ensemble of M members gives in `eval()` the log of their mean probability, (B, classes). In training it gives the
    logits of all copies, (B · M, classes), those of an image next to each other: its loss is the mean over them, with
    `labels.repeat_interleave(M, dim=0)`. Loops that cannot be changed set auxiliary_loss="attach": then it is (B,
    classes), the members' mean log probability, of which cross-entropy has the gradient of that mean loss.
    """

    def __init__(
        self,
        *args,
        moe_layers: str | Sequence[int] = "every2",
        depth: int = 12,
        global_pool: str = "token",
        class_token: bool = True,
        pos_embed: str = "learn",
        pos_temperature: float = 10_000.0,
        qk_norm: bool = False,
        representation_size: int | None = None,
        ensemble_size: int = 1,
        **kwargs,
    ) -> None:
        first_patch = global_pool == "token" and not class_token
        _check_arguments(pos_embed, first_patch, kwargs)
        routing = take_routing(kwargs, ROUTING_DEFAULTS)
        chosen = sparse_blocks(moe_layers, depth) if routing["num_experts"] else ()
        routing["ensemble_size"] = _checked_size(ensemble_size, chosen)

        def make_block(*, depth: int, mlp_layer=Mlp, **block_kwargs) -> nn.Module:
            if depth in chosen:  # timm builds the blocks after the patch embedding
                num_tokens = self.patch_embed.num_patches + self.num_prefix_tokens
                mlp_layer = partial(SparseMoE, num_tokens=num_tokens, **routing)
            is_first = ensemble_size != 1 and depth == chosen[0]
            make = partial(CopyingBlock, ensemble_size) if is_first else Block
            return make(depth=depth, mlp_layer=mlp_layer, **block_kwargs)

        if pos_embed == "rope":
            kwargs["attn_layer"] = RotaryAttention
        super().__init__(
            *args,
            depth=depth,
            global_pool="" if first_patch else global_pool,  # timm asks for a class token there
            class_token=class_token,
            pos_embed="none" if pos_embed in ("sincos2d", "rope") else pos_embed,
            block_fn=make_block,
            **kwargs,
        )
        self.global_pool = global_pool
        self.ensemble_size = ensemble_size
        self.sincos2d_temperature = pos_temperature if pos_embed == "sincos2d" else None
        if pos_embed == "sincos2d":
            sincos2d_positions(1, 1, self.embed_dim, pos_temperature)  # checks its arguments
        self.rope = self._rotary_positions(pos_temperature) if pos_embed == "rope" else None
        if qk_norm:
            norm_queries_and_keys(self)
        choose_attention(self, routing)
        self._add_representation(representation_size)

    def _rotary_positions(self, temperature: float) -> nn.Module:
        for block in self.blocks:
            block.attn.num_prefix_tokens = self.num_prefix_tokens  # which have no position
        attention = self.blocks[0].attn
        check_rotation(attention.head_dim, temperature)
        sizes = {"dim": self.embed_dim, "num_heads": attention.num_heads, "device": attention.proj.weight.device}
        return create_rope_embed("cat", temperature=temperature, in_pixels=False, **sizes)

    def _add_representation(self, size: int | None) -> None:
        self.pre_logits = nn.Identity()
        if size is None:
            return
        if not (isinstance(size, int) and size > 0):
            raise ValueError(f"representation_size must be a whole number >= 1, or None, got {size}")
        self.pre_logits = nn.Linear(self.embed_dim, size, **_like(self.patch_embed.proj.weight))
        self.head_hidden_size = size
        self._resize_head()
        initialize = get_init_weights_vit(self.weight_init_mode, needs_reset=False)
        initialize(self.pre_logits, "pre_logits")
        initialize(self.head, "head")

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.patch_embed.img_size

    def _pos_embed(self, x: Tensor) -> Tensor:
        if self.pos_embed is not None:
            return super()._pos_embed(x)
        if self.sincos2d_temperature is not None:
            height, width = x.shape[1:3] if self.dynamic_img_size else self.patch_embed.grid_size
            kind = {"device": x.device, "dtype": torch.promote_types(x.dtype, torch.float32)}
            positions_1PD = sincos2d_positions(height, width, self.embed_dim, self.sincos2d_temperature, **kind)
            x = x + positions_1PD.view(1, *x.shape[1:]).to(x.dtype)
        return self.pos_drop(super()._pos_embed(x))

    def _rotated(self, x: Tensor, mask: Tensor | None) -> Any:
        """What the blocks get as mask for images x (B, 3, H, W), see `RotaryAttention`."""
        if self.rope is None:
            return mask
        return self.rope.get_embed(self.patch_embed.dynamic_feat_size(x.shape[-2:])), mask

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        about = self._rotated(x, attn_mask)
        if self.rope is None or not self.grad_checkpointing:
            return super().forward_features(x, about, is_causal)
        x = self.norm_pre(self._pos_embed(self.patch_embed(x)))
        for block in self.blocks:  # timm recomputes none that gets a mask
            x = checkpoint(block, x, attn_mask=about, is_causal=is_causal)
        return self.norm(x)

    def member_logits(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> the logits of all copies, (B · M, classes), those of an image next to each other."""
        return self.head(self.forward_head(self.forward_features(x), pre_logits=True))

    def _together(self, logits: Tensor) -> Tensor:
        """What the model gives for the logits of all copies, see the class."""
        if self.ensemble_size == 1:
            return logits
        attached = any(getattr(block.mlp, "auxiliary_loss", None) == "attach" for block in self.blocks)
        if self.training and not attached:
            return logits
        logits_BMC = logits.unflatten(0, (-1, self.ensemble_size))
        if isinstance(self.head, nn.Identity):
            return logits_BMC.mean(1)
        if not self.training:
            return log_mean_probability(logits_BMC)
        # Cross-entropy of this subtracts its logsumexp; the attached gradient takes that back.
        mean_BC = logits_BMC.log_softmax(-1).mean(1)
        return attach_loss(mean_BC, -mean_BC.logsumexp(-1).mean())

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.fc_norm(self.pool(x))
        if isinstance(self.pre_logits, nn.Linear):
            x = self.pre_logits(x).tanh()
        x = self.head_drop(x)
        return x if pre_logits else self._together(self.head(x))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        first_patch = global_pool == "token" and not self.has_class_token  # see `__init__`
        super().reset_classifier(num_classes, "" if first_patch else global_pool)
        self.global_pool = global_pool if first_patch else self.global_pool
        self._resize_head()

    def forward_intermediates(self, x: Tensor, *args, attn_mask: Tensor | None = None, **kwargs):
        if self.ensemble_size > 1:
            raise ValueError("an ensemble has no features of single blocks, which see several copies of an image")
        return super().forward_intermediates(x, *args, attn_mask=self._rotated(x, attn_mask), **kwargs)

    def prune_intermediate_layers(self, indices=1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        if prune_head:
            self.pre_logits = nn.Identity()
            self.head_hidden_size = self.embed_dim
        return super().prune_intermediate_layers(indices, prune_norm, prune_head)

    def _resize_head(self) -> None:
        """A classifier of the representation's width, where timm made one of the model's."""
        if isinstance(self.head, nn.Linear) and self.head.in_features != self.head_hidden_size:
            head = nn.Linear(self.head_hidden_size, self.num_classes, **_like(self.head.weight))
            self.head = head.train(self.training)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | without_decay(self)

    def fix_init_weight(self) -> None:
        """timm's `fix_init`, for experts too."""
        scale_depth(self.blocks)
