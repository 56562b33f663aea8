"""V-MoE: a ViT whose MLPs are experts in some blocks (arXiv 2106.05974), in timm's registry.

The model is timm's `VisionTransformer` with another MLP in the sparse blocks, so all that timm does with a ViT works:
pooling variants, `features_only`, `reset_classifier`, `set_input_size`, `dynamic_img_size`, layer decay, drop path.
"""

from collections.abc import Sequence
from functools import partial

import torch
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import Mlp
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import nn

from vmoe.moe import SparseMoE

ROUTING_DEFAULTS = {"num_experts": 8, "num_selected_experts": 2, "moe_layers": "every2"}


def sparse_blocks(moe_layers: str | Sequence[int], depth: int) -> tuple[int, ...]:
    """Indices of the blocks that hold experts.

    Args:
        moe_layers: "everyN": the last of each N blocks, so "every2" is 1, 3, 5, ...; "lastN": the last N of the blocks
            of "every2", as in the V-MoE paper (so "last2" of 8 blocks is 5 and 7); or the indices themselves.
        depth: number of blocks.

    Raises:
        ValueError: for an unknown word or an index outside the model.
    """
    if isinstance(moe_layers, str):
        for word in ("every", "last"):
            number = moe_layers.removeprefix(word)
            if number != moe_layers and number.isdecimal() and int(number) > 0:
                count = int(number)
                odd = range(1, depth, 2)
                if count > (depth if word == "every" else len(odd)):
                    raise ValueError(f"moe_layers={moe_layers!r} asks for more than a model with {depth} blocks has")
                return tuple(range(count - 1, depth, count) if word == "every" else odd[-count:])
        raise ValueError(f"moe_layers must be 'everyN', 'lastN' or a list of block indices, got {moe_layers!r}")
    blocks = tuple(sorted(set(moe_layers)))
    if any(index not in range(depth) for index in blocks):
        raise ValueError(
            f"moe_layers must lie in 0..{depth - 1} (the model has {depth} blocks), got {list(moe_layers)}"
        )
    return blocks


class VisionMoE(VisionTransformer):
    """A `timm` ViT with experts in some blocks.

    Args:
        moe_layers: "everyN", "lastN", or block indices; see `sparse_blocks`.
        num_experts: E; 0 makes the dense twin.
        num_selected_experts: K.
        depth: number of blocks.
        **kwargs: routing settings of `vmoe.SparseMoE`, and arguments of `timm.models.VisionTransformer`.
    """

    def __init__(
        self,
        *args,
        moe_layers: str | Sequence[int] = "every2",
        num_experts: int = 8,
        num_selected_experts: int = 2,
        depth: int = 12,
        router: str = "top_k",
        capacity_factor: float | None = 1.05,
        eval_capacity_factor: float | None = None,
        batch_priority: bool = False,
        group_size: int | None = None,
        noise_std: float = 1.0,
        importance_loss: float = 0.005,
        load_loss: float = 0.005,
        gshard_loss: float = 0.0,
        z_loss: float = 0.0,
        local_entropy_loss: float = 0.0,
        global_entropy_loss: float = 0.0,
        global_entropy_min_experts: float | None = None,
        auxiliary_loss: str = "record",
        **kwargs,
    ) -> None:
        sparse_mlp = partial(
            SparseMoE,
            num_experts=num_experts,
            num_selected_experts=num_selected_experts,
            router=router,
            capacity_factor=capacity_factor,
            eval_capacity_factor=eval_capacity_factor,
            batch_priority=batch_priority,
            group_size=group_size,
            noise_std=noise_std,
            importance_loss=importance_loss,
            load_loss=load_loss,
            gshard_loss=gshard_loss,
            z_loss=z_loss,
            local_entropy_loss=local_entropy_loss,
            global_entropy_loss=global_entropy_loss,
            global_entropy_min_experts=global_entropy_min_experts,
            auxiliary_loss=auxiliary_loss,
        )
        chosen = sparse_blocks(moe_layers, depth) if num_experts else ()
        kwargs["block_fn"] = _block_maker(kwargs.get("block_fn", Block), sparse_mlp, chosen)
        super().__init__(*args, depth=depth, **kwargs)
        if sum(isinstance(module, SparseMoE) for module in self.modules()) != len(chosen):
            raise ValueError("this block_fn has no MLP that experts could take the place of; use timm's Block")

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        # timm's layer decay spares only parameters of one axis; the experts' biases have two.
        return super().no_weight_decay() | {name for name, _ in self.named_parameters() if name.endswith(".bias")}

    def fix_init_weight(self) -> None:
        for index, block in enumerate(self.blocks):
            scale = (2.0 * (index + 1)) ** 0.5
            second = block.mlp.experts.fc2 if isinstance(block.mlp, SparseMoE) else block.mlp.fc2
            block.attn.proj.weight.data.div_(scale)
            second.weight.data.div_(scale)


def _block_maker(block_fn, sparse_mlp, chosen: tuple[int, ...]):
    """A `block_fn` for timm that puts experts into the blocks in `chosen`."""

    def make(*, depth: int, mlp_layer=Mlp, **kwargs) -> nn.Module:
        return block_fn(depth=depth, mlp_layer=sparse_mlp if depth in chosen else mlp_layer, **kwargs)

    return make


def _cfg(**kwargs) -> dict:
    """timm's description of a model's input; pixels are scaled to -1..1, as in the reference."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "fixed_input_size": True,
        "mean": IMAGENET_INCEPTION_MEAN,
        "std": IMAGENET_INCEPTION_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2106.05974",
        "paper_name": "Scaling Vision with Sparse Mixture of Experts",
        "origin_url": "https://github.com/google-research/vmoe",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "vmoe_tiny_patch8_48": _cfg(input_size=(3, 48, 48), crop_pct=1.0, interpolation="bicubic"),
        "vmoe_small_patch32_224": _cfg(),
        "vmoe_base_patch32_224": _cfg(),
        "vmoe_base_patch16_224": _cfg(),
        "vmoe_large_patch32_224": _cfg(),
        "vmoe_large_patch16_224": _cfg(),
        "vmoe_huge_patch14_224": _cfg(),
    }
)


def _create(variant: str, pretrained: bool, **kwargs) -> VisionMoE:
    model_args = {
        **ROUTING_DEFAULTS,
        "act_layer": "gelu_tanh",
        "norm_layer": partial(nn.LayerNorm, eps=1e-6),
        "weight_init": "jax",
        **kwargs,
    }
    out_indices = model_args.pop("out_indices", 3)
    return build_model_with_cfg(
        VisionMoE,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **model_args,
    )


@register_model
def vmoe_tiny_patch8_48(pretrained: bool = False, **kwargs) -> VisionMoE:
    """V-MoE of 6 blocks of width 128 for 48 px pictures in patches of 8 px: for tests and first steps."""
    args = {"img_size": 48, "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4, "num_selected_experts": 1}
    return _create("vmoe_tiny_patch8_48", pretrained, **{**args, **kwargs})


@register_model
def vmoe_small_patch32_224(pretrained: bool = False, **kwargs) -> VisionMoE:
    """V-MoE S/32: 8 blocks of width 512 (the reference's S, not timm's), experts in the last two odd blocks."""
    args = {"patch_size": 32, "embed_dim": 512, "depth": 8, "num_heads": 8, "moe_layers": "last2"}
    return _create("vmoe_small_patch32_224", pretrained, **{**args, **kwargs})


@register_model
def vmoe_base_patch32_224(pretrained: bool = False, **kwargs) -> VisionMoE:
    """V-MoE B/32: 12 blocks of width 768, experts in every second."""
    args = {"patch_size": 32, "embed_dim": 768, "depth": 12, "num_heads": 12}
    return _create("vmoe_base_patch32_224", pretrained, **{**args, **kwargs})


@register_model
def vmoe_base_patch16_224(pretrained: bool = False, **kwargs) -> VisionMoE:
    """V-MoE B/16: 12 blocks of width 768, experts in every second."""
    args = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
    return _create("vmoe_base_patch16_224", pretrained, **{**args, **kwargs})


@register_model
def vmoe_large_patch32_224(pretrained: bool = False, **kwargs) -> VisionMoE:
    """V-MoE L/32: 24 blocks of width 1024, experts in every second."""
    args = {"patch_size": 32, "embed_dim": 1024, "depth": 24, "num_heads": 16}
    return _create("vmoe_large_patch32_224", pretrained, **{**args, **kwargs})


@register_model
def vmoe_large_patch16_224(pretrained: bool = False, **kwargs) -> VisionMoE:
    """V-MoE L/16: 24 blocks of width 1024, experts in every second."""
    args = {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16}
    return _create("vmoe_large_patch16_224", pretrained, **{**args, **kwargs})


@register_model
def vmoe_huge_patch14_224(pretrained: bool = False, **kwargs) -> VisionMoE:
    """V-MoE H/14: 32 blocks of width 1280, experts in every second."""
    args = {"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16}
    return _create("vmoe_huge_patch14_224", pretrained, **{**args, **kwargs})
