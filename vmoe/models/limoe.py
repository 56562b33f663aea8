"""LIMoE: one tower for images and text, with experts shared by patches and text tokens (arXiv 2206.02770).

Each modality is embedded, both run through the same blocks, each is pooled and projected. Attention stays within an
image or a text; at a sparse layer the tokens of both are routed together.

Shapes, by suffix: B batch, P patches, L text length, T = P + L, D width, C embedding width.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import AttentionPoolLatent, DropPath, PatchEmbed, resample_abs_pos_embed, trunc_normal_
from timm.models import named_apply
from timm.models.vision_transformer import Block, get_init_weights_vit
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vmoe.models.contrastive import INIT_LOGIT_SCALE, ImageTextModel
from vmoe.models.text import SIZES, STYLE, attention_bias, embed_text, make_blocks, masked_mean, text_mask, text_routing
from vmoe.models.vision import BlocksMixin, choose_attention
from vmoe.moe import SparseMoE
from vmoe.moe.autograd import on_eager_cpu
from vmoe.moe.config import PRESETS

MODALITIES = ("image", "text")
ROUTING_DEFAULTS = {**PRESETS["limoe"], "num_experts": 32, "local_entropy_loss": {"text": 0.01}}


def attention(qkv_BT3D: Tensor, bias_B11T: Tensor | None, num_heads: int, fused: bool) -> Tensor:
    """softmax(q kᵀ / sqrt(d) + bias) v of each head: (B, T, 3D) queries, keys and values -> (B, T, D)."""
    q_BHTd, k_BHTd, v_BHTd = rearrange(qkv_BT3D, "b t (three h d) -> three b h t d", three=3, h=num_heads)
    bias_B11T = None if bias_B11T is None else bias_B11T.to(qkv_BT3D.dtype)
    with nullcontext() if fused else sdpa_kernel(SDPBackend.MATH):
        y_BHTd = F.scaled_dot_product_attention(q_BHTd, k_BHTd, v_BHTd, attn_mask=bias_B11T)
    return rearrange(y_BHTd, "b h t d -> b t (h d)")


@dataclass(frozen=True)
class TowerTokens:
    """What the blocks know of their tokens: rows of an image's patches and its text, (B, T, D), or packed, (S, D).

    The mask is True for all tokens but padding, `bias_B11L`, None without text, hides padding from attention, and
    `index_S` holds the flat indices into (B, T) of packed tokens, or None.
    """

    num_patches: int
    mask_BT: Tensor
    modality_BT: Tensor
    bias_B11L: Tensor | None
    index_S: Tensor | None

    def pack(self, x_BTD: Tensor) -> Tensor:
        """Rows -> the blocks' input."""
        return x_BTD if self.index_S is None else x_BTD.flatten(0, 1).index_select(0, self.index_S)

    def unpack(self, x: Tensor) -> Tensor:
        """The blocks' output -> rows, zero for padding."""
        if self.index_S is None:
            return x
        x_SD = x.new_zeros(self.mask_BT.numel(), x.shape[-1]).index_copy(0, self.index_S, x)
        return x_SD.view(*self.mask_BT.shape, x.shape[-1])


class LIMoEBlock(Block):
    """timm's pre-norm block: attention per modality, with the weights of `attn`, and one MLP for both."""

    def forward(self, x: Tensor, tokens: TowerTokens) -> Tensor:
        """(B, T, D) or (S, D), as `tokens` says -> the same."""
        P, how = tokens.num_patches, (self.attn.num_heads, self.attn.fused_attn)
        qkv_BT3D = tokens.unpack(self.attn.qkv(self.norm1(x)))
        attended = [attention(qkv_BT3D[:, :P], None, *how)] if P else []
        if tokens.bias_B11L is not None:
            attended.append(attention(qkv_BT3D[:, P:], tokens.bias_B11L, *how))
        x = x + self.drop_path1(self.ls1(self.attn.proj(tokens.pack(torch.cat(attended, dim=1)))))
        h = self.norm2(x)
        if isinstance(self.mlp, SparseMoE):  # over rows, so that packing changes no routing
            h = tokens.pack(self.mlp(tokens.unpack(h), tokens.mask_BT, tokens.modality_BT))
        else:
            h = self.mlp(h)
        return x + self.drop_path2(self.ls2(h))


def _routing(kwargs: dict) -> dict:
    """The routing settings, with the defaults that depend on others."""
    if kwargs.get("router_preset") == "limoe":  # the preset knows no modalities, so the loss of text is the model's own
        kwargs.setdefault("local_entropy_loss", ROUTING_DEFAULTS["local_entropy_loss"])
    settings = text_routing(kwargs, ROUTING_DEFAULTS)
    if settings.get("per_image"):
        raise ValueError("per_image=True must be left out of a LIMoE, whose sequences hold an image and its caption")
    if settings.get("global_entropy_loss") and settings.get("global_entropy_min_experts") is None:
        E = settings["num_experts"]
        settings["global_entropy_min_experts"] = {"image": max(1, E / 2), "text": max(1, E / 4)}
    return settings


class LIMoE(BlocksMixin, ImageTextModel):
    """One sparse tower for images and text, with open_clip's interface.

    Args:
        embed_dim: C, width of the common embedding.
        pool: "avg", over patches or real text tokens; or "map", attention pooling, for each modality its own.
        **routing: `vmoe.moe.config.RoutingSettings`, `router_preset`; `num_experts=0` makes the dense baseline. The
            defaults are the preset "limoe" with 32 experts and a local entropy loss on text; the global entropy loss
            asks for half of the experts for images and a quarter for text (our choice).

    The other arguments are those of `vmoe.models.text.TextTransformer` and of `ImageTextModel`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        context_length: int = 64,
        vocab_size: int = 49408,
        eot_token_id: int = 49407,
        embed_dim: int = 512,
        width: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        pool: str = "avg",
        drop_path_rate: float = 0.0,
        init_logit_scale: float = INIT_LOGIT_SCALE,
        init_logit_bias: float | None = None,
        output_dict: bool = False,
        moe_layers: str | Sequence[int] = "every2",
        **routing,
    ) -> None:
        super().__init__(init_logit_scale, init_logit_bias, output_dict)
        if pool not in ("avg", "map"):
            raise ValueError(f"pool must be 'avg' or 'map', got {pool!r}")
        settings = _routing(routing)
        self.in_chans, self.embed_dim = in_chans, embed_dim
        self.context_length, self.vocab_size, self.eot_token_id = context_length, vocab_size, eot_token_id
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, width)
        self.image_pos_embed = nn.Parameter(torch.empty(1, self.patch_embed.num_patches, width))
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.text_pos_embed = nn.Parameter(torch.empty(1, context_length, width))
        num_tokens = max(self.patch_embed.num_patches, context_length)
        self.blocks = make_blocks(
            LIMoEBlock, width, depth, num_heads, mlp_ratio, drop_path_rate,
            moe_layers, modalities=MODALITIES, num_tokens=num_tokens, **settings,
        )  # fmt: skip
        self.norm = STYLE["norm_layer"](width)
        pools = [AttentionPoolLatent(width, num_heads=num_heads, **STYLE) if pool == "map" else None for _ in range(2)]
        self.image_pool, self.text_pool = pools
        choose_attention(self, settings)
        self.image_projection = nn.Linear(width, embed_dim, bias=False)
        self.text_projection = nn.Linear(width, embed_dim, bias=False)
        self.init_weights(needs_reset=False)

    def init_weights(self, needs_reset: bool = True) -> None:
        """The reference's ViT initialisation; `needs_reset` after `to_empty`, when all modules reset themselves."""
        named_apply(get_init_weights_vit("jax", needs_reset=needs_reset), self)
        self.reset_logits()
        trunc_normal_(self.image_pos_embed, std=0.02)
        trunc_normal_(self.text_pos_embed, std=0.02)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        for projection in (self.image_projection, self.text_projection):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.patch_embed.img_size

    @property
    def visual(self) -> "LIMoE":
        """The tower itself, for open_clip's `model.visual.image_size`."""
        return self

    def tower(self, x_BPD: Tensor | None, x_BLD: Tensor | None, mask_BL: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, P, D) and (B, L, D), or None -> the same after blocks and final norm, P or L being 0 for None.
        Row b of the sequence is [patches of image b | tokens of text b]: a routing group holds both modalities."""
        x = torch.cat([x for x in (x_BPD, x_BLD) if x is not None], dim=1)
        B, T, _ = x.shape
        P = 0 if x_BPD is None else x_BPD.shape[1]
        modality_BT = (torch.arange(T, device=x.device) >= P).long().expand(B, T)
        mask_BT, bias_B11L = torch.ones(B, P, dtype=torch.bool, device=x.device), None
        if mask_BL is not None:
            mask_BT, bias_B11L = torch.cat([mask_BT, mask_BL], dim=1), attention_bias(mask_BL, x.dtype)
        index_S = mask_BT.flatten().nonzero()[:, 0] if mask_BL is not None and self.packs(x) else None
        tokens = TowerTokens(P, mask_BT, modality_BT, bias_B11L, index_S)
        x_BTD = tokens.unpack(self.forward_blocks(tokens.pack(x), tokens))
        return x_BTD[:, :P], x_BTD[:, P:]

    def packs(self, x: Tensor) -> bool:
        """In training on a CPU blocks skip padding, a tenth of a step. Stochastic depth needs rows."""
        if not self.training or not on_eager_cpu(x.device):
            return False
        return not any(isinstance(module, DropPath) for module in self.blocks.modules())

    def features(self, image: Tensor | None, text: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Images (B, 3, H, W) in -1..1 and token ids (B, L) -> (B, C) each; both compete for the same experts."""
        if image is not None and text is not None and len(image) != len(text):
            if self.training:
                raise ValueError(f"training takes pairs, got {len(image)} images and {len(text)} texts")
            return self.features(image, None)[0], self.features(None, text)[1]
        x_BPD = x_BLD = mask_BL = image_BC = text_BC = None
        if text is not None:
            x_BLD = embed_text(text, self.context_length, self.token_embedding, self.text_pos_embed)
            mask_BL = text_mask(text, self.eot_token_id)
        if image is not None:
            x_BPD = self.patch_embed(image) + self.image_pos_embed
        x_BPD, x_BLD = self.tower(x_BPD, x_BLD, mask_BL)
        if image is not None:
            image_BC = self.image_projection(self.image_pool(x_BPD) if self.image_pool else x_BPD.mean(dim=1))
        if text is not None:
            bias = attention_bias(mask_BL, x_BLD.dtype)
            pooled_BD = self.text_pool(x_BLD, attn_mask=bias) if self.text_pool else masked_mean(x_BLD, mask_BL)
            text_BC = self.text_projection(pooled_BD)
        return image_BC, text_BC

    def lock_image_tower(self, *args, **kwargs) -> None:
        """open_clip's; a ValueError, since images and texts share the tower."""
        raise ValueError("a LIMoE has one tower for images and texts, so neither can be locked: take a two_tower model")

    lock_text_tower = lock_image_tower

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Change the image size; position embeddings are interpolated."""
        old, old_size = self.image_pos_embed, self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size=img_size)
        resized = resample_abs_pos_embed(old, self.patch_embed.grid_size, old_size, num_prefix_tokens=0)
        self.image_pos_embed = nn.Parameter(resized.detach(), old.requires_grad)


_TINY = {**SIZES["tiny"], "img_size": 48, "embed_dim": 128, "context_length": 16, "num_experts": 8}
LIMOE_CONFIGS: dict[str, dict] = {
    "limoe_tiny_patch8_48": {**_TINY, "patch_size": 8},
    "limoe_tiny_patch12_48": {**_TINY, "patch_size": 12},
    "limoe_small_patch32": {**SIZES["small"], "patch_size": 32, "embed_dim": 512},
    "limoe_small_patch16": {**SIZES["small"], "patch_size": 16, "embed_dim": 512},
    "limoe_base_patch32": {**SIZES["base"], "patch_size": 32, "embed_dim": 512},
    "limoe_base_patch16": {**SIZES["base"], "patch_size": 16, "embed_dim": 512},
    "limoe_large_patch32": {**SIZES["large"], "patch_size": 32, "embed_dim": 768},
    "limoe_large_patch16": {**SIZES["large"], "patch_size": 16, "embed_dim": 768},
    "limoe_huge_patch14": {**SIZES["huge"], "patch_size": 14, "embed_dim": 1024},
}
