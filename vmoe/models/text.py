"""The text tower of a two-tower model: a transformer without causal mask, with experts in some blocks.

Shapes, by suffix: B batch, L text length, D width, C classes (or embedding width).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import AttentionPoolLatent, Mlp, trunc_normal_
from timm.models import named_apply
from timm.models.vision_transformer import Block, get_init_weights_vit
from torch import Tensor, nn

from vmoe.models.vision import BlocksMixin, choose_attention, norm_queries_and_keys, sparse_blocks, take_routing
from vmoe.moe import SparseMoE
from vmoe.moe.layer import ROUTERS

ROUTING_DEFAULTS = {"num_experts": 8, "num_selected_experts": 1}
CONTEXT_LENGTH = 64  # by default, here and in LIMoE
MAX_CHARACTERS = 2**16  # of a text before it is cleaned, which takes a second for a million
MAX_TOKEN_CHARACTERS = 32  # of the longest token in CLIP's vocabulary
POOLS = ("last", "first", "gap", "gmp", "map")
SIZES = {
    "tiny": {"width": 128, "depth": 6, "num_heads": 4},
    "small": {"width": 512, "depth": 8, "num_heads": 8},
    "base": {"width": 768, "depth": 12, "num_heads": 12},
    "large": {"width": 1024, "depth": 24, "num_heads": 16},
    "huge": {"width": 1280, "depth": 32, "num_heads": 16},
}
STYLE = {"norm_layer": partial(nn.LayerNorm, eps=1e-6), "act_layer": partial(nn.GELU, approximate="tanh")}


def text_mask(text_BL: Tensor, eot_token_id: int) -> Tensor:
    """(B, L) token ids -> (B, L), True up to and including the first end-of-text token."""
    is_end_BL = (text_BL == eot_token_id).int()
    return is_end_BL.cumsum(dim=1) - is_end_BL == 0


def clean_beginning(clean: Callable[[str], str], context_length: int, text: str) -> str:
    """The cleaned text, or a beginning of it that surely fills the tokenizer's context."""
    if len(text) > MAX_CHARACTERS:
        text = " ".join(text.split())[:MAX_CHARACTERS]
    return clean(text)[: (context_length + 2) * (MAX_TOKEN_CHARACTERS + 1)]  # + 1: a space behind a word


def embed_text(text_BL: Tensor, context_length: int, embedding: nn.Embedding, positions_1LD: Tensor | None) -> Tensor:
    """Token ids -> (B, L, D); a ValueError if a text has more tokens than the model takes."""
    if (L := text_BL.shape[1]) > context_length:
        raise ValueError(f"text has {L} tokens, the model takes {context_length}; use vmoe.get_tokenizer(model)")
    x_BLD = embedding(text_BL)
    return x_BLD if positions_1LD is None else x_BLD + positions_1LD[:, :L]


def attention_bias(mask_BL: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, L) True for real tokens -> (B, 1, 1, L) that timm's attention adds to the scores."""
    return torch.zeros_like(mask_BL, dtype=dtype).masked_fill(~mask_BL, -math.inf)[:, None, None, :]


def masked_mean(x_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """Mean over the real tokens: (B, L, D), (B, L) -> (B, D)."""
    weight_BL1 = (mask_BL / mask_BL.sum(dim=1, keepdim=True)).to(x_BLD.dtype)[..., None]
    return (x_BLD * weight_BL1).sum(dim=1)


def text_routing(kwargs: dict, defaults: dict) -> dict:
    """As `take_routing`, for short sequences; raises TypeError for an argument that is no setting."""
    settings = take_routing(kwargs, defaults)
    if kwargs:
        raise TypeError(f"the model got an unexpected keyword argument {next(iter(kwargs))!r}")
    if not ROUTERS[settings.get("router", "top_k")].per_token:  # a dozen tokens need no multiple of four
        settings.setdefault("capacity_multiple_of", 1)
    return settings


class TextBlock(Block):
    """timm's pre-norm block, with a mask for attention and experts."""

    def forward(self, x_BLD: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """(B, L, D) and a (B, L) mask, True for real tokens (None: all) -> (B, L, D)."""
        bias = None if mask_BL is None else attention_bias(mask_BL, x_BLD.dtype)
        x_BLD = x_BLD + self.drop_path1(self.ls1(self.attn(self.norm1(x_BLD), attn_mask=bias)))
        h_BLD = self.norm2(x_BLD)
        h_BLD = self.mlp(h_BLD, mask_BL) if isinstance(self.mlp, SparseMoE) else self.mlp(h_BLD)
        return x_BLD + self.drop_path2(self.ls2(h_BLD))


def make_blocks(
    block: type[Block], width: int, depth: int, num_heads: int, mlp_ratio: float, drop_path_rate: float,
    moe_layers: str | Sequence[int], **sparse: Any,
) -> nn.ModuleList:  # fmt: skip
    """Transformer blocks; those of `moe_layers` have a `SparseMoE(**sparse)`. Stochastic depth grows linearly."""
    if width % num_heads:
        raise ValueError(f"width must be a multiple of num_heads, got {width} and {num_heads}")
    chosen = sparse_blocks(moe_layers, depth) if sparse["num_experts"] else ()
    return nn.ModuleList(
        block(
            dim=width,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=True,
            drop_path=drop_path_rate * index / max(1, depth - 1),
            mlp_layer=partial(SparseMoE, **sparse) if index in chosen else Mlp,
            **STYLE,
        )
        for index in range(depth)
    )


class TextTransformer(BlocksMixin, nn.Module):
    """Token ids -> classes or an embedding.

    Args:
        context_length: L, the most tokens of a text.
        width: D; `mlp_ratio` is the hidden width of an MLP or expert over it.
        num_classes: C, outputs of the last layer `head`; 0: the result is the pooled features.
        pool: "last" (the end-of-text token), "first", "gap" (mean), "gmp" (maximum) or "map" (attention pooling).
        eot_token_id: what follows the first such token is padding, hidden from attention, experts and pooling; None:
            every position is read, as in the reference.
        moe_layers: see `vmoe.models.vision.sparse_blocks`.
        **routing: `vmoe.moe.config.RoutingSettings`, `router_preset`; `num_experts=0`: no experts.
    """

    def __init__(
        self,
        vocab_size: int = 49408,
        context_length: int = 64,
        width: int = 512,
        depth: int = 12,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        num_classes: int = 512,
        pool: str = "last",
        eot_token_id: int | None = 49407,
        pos_embed: str = "learn",
        qk_norm: bool = False,
        drop_path_rate: float = 0.0,
        moe_layers: str | Sequence[int] = "every2",
        **routing,
    ) -> None:
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"pool must be one of {POOLS}, got {pool!r}")
        if pos_embed not in ("learn", "none"):
            raise ValueError(f"pos_embed must be 'learn' or 'none' for text, got {pos_embed!r}")
        settings = text_routing(routing, ROUTING_DEFAULTS)
        self.vocab_size, self.context_length, self.eot_token_id = vocab_size, context_length, eot_token_id
        self.num_classes, self.pool = num_classes, pool
        self.num_features = self.head_hidden_size = width
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.pos_embed = nn.Parameter(torch.empty(1, context_length, width)) if pos_embed == "learn" else None
        self.blocks = make_blocks(
            TextBlock, width, depth, num_heads, mlp_ratio, drop_path_rate,
            moe_layers, modalities=("text",), num_tokens=context_length, **settings,
        )  # fmt: skip
        self.norm = STYLE["norm_layer"](width)
        self.attn_pool = None
        if pool == "map":
            self.attn_pool = AttentionPoolLatent(width, num_heads=num_heads, mlp_ratio=mlp_ratio, **STYLE)
        if qk_norm:
            norm_queries_and_keys(self)
        choose_attention(self, settings)
        self.head = nn.Linear(width, num_classes) if num_classes else nn.Identity()
        self.init_weights(needs_reset=False)

    def init_weights(self, needs_reset: bool = True) -> None:
        """The reference's ViT initialisation; `needs_reset` after `to_empty`, when all modules reset themselves."""
        named_apply(get_init_weights_vit("jax", needs_reset=needs_reset), self)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=0.02)
        if self.num_classes:  # zeros, timm's choice for classifiers, have no direction for a contrastive loss
            nn.init.normal_(self.head.weight, std=self.head.in_features**-0.5)

    def forward_features(self, text_BL: Tensor) -> tuple[Tensor, Tensor | None]:
        """Token ids -> (B, L, D) after the final norm, and the (B, L) mask or None."""
        x_BLD = embed_text(text_BL, self.context_length, self.token_embedding, self.pos_embed)
        mask_BL = None if self.eot_token_id is None else text_mask(text_BL, self.eot_token_id)
        return self.forward_blocks(x_BLD, mask_BL), mask_BL

    def forward_head(self, x_BLD: Tensor, mask_BL: Tensor | None = None, pre_logits: bool = False) -> Tensor:
        """Pool the real tokens and project: (B, L, D), (B, L) -> (B, C), or (B, D) with `pre_logits`."""
        if mask_BL is None:
            mask_BL = x_BLD.new_ones(x_BLD.shape[:2], dtype=torch.bool)
        if self.pool == "first":
            pooled_BD = x_BLD[:, 0]
        elif self.pool == "last":
            pooled_BD = x_BLD[torch.arange(x_BLD.shape[0], device=x_BLD.device), mask_BL.sum(dim=1) - 1]
        elif self.pool == "gap":
            pooled_BD = masked_mean(x_BLD, mask_BL)
        elif self.pool == "gmp":
            pooled_BD = x_BLD.masked_fill(~mask_BL[..., None], -math.inf).amax(dim=1)
        else:
            pooled_BD = self.attn_pool(x_BLD, attn_mask=attention_bias(mask_BL, x_BLD.dtype))
        return pooled_BD if pre_logits else self.head(pooled_BD)

    def forward(self, text_BL: Tensor) -> Tensor:
        """(B, L) token ids -> (B, C)."""
        return self.forward_head(*self.forward_features(text_BL))
