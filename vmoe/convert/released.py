"""The checkpoints that the reference's authors released, by name: config and preprocessing.

Source: the reference's README and vmoe/configs/vmoe_paper. The files lie at gs://vmoe_checkpoints/NAME.*; nothing is
downloaded here. Those that begin with "eee" are ensembles (E3, arXiv 2110.03360).
"""

from typing import Any, NamedTuple


class Released(NamedTuple):
    """A released checkpoint: the reference's model config, and the preprocessing in timm's words."""

    config: dict[str, Any]
    preprocess: dict[str, Any]


# decode | resize_small(256) | central_crop(224), and decode | resize(N) without a crop; pixels from -1 to 1.
_CROPPED = {"input_size": [3, 224, 224], "crop_pct": 0.875, "crop_mode": "center", "interpolation": "bilinear"}
_SQUASHED = {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bilinear"}

_S32 = {"width": 512, "depth": 8, "patch": 32, "layers": [5, 7]}
_B16 = {"width": 768, "depth": 12, "patch": 16, "layers": [1, 3, 5, 7, 9, 11]}


def _released(
    capacity_factor: float,
    width: int,
    depth: int,
    patch: int,
    layers: list[int],
    num_classes: int = 1000,
    representation_size: int | None = None,
    expert_drop: float = 0.0,
    image_size: int = 224,
    members: int = 1,
) -> Released:
    """capacity_factor: the evaluation's where the reference's config has one of its own (4.0), else the training's. The
    ensembles choose one expert for each of their members."""
    router = {
        "num_selected_experts": 2 if members == 1 else 1,
        "noise_std": 1.0,
        "importance_loss_weight": 0.005,
        "load_loss_weight": 0.005,
        "dispatcher": {"name": "einsum", "capacity_factor": capacity_factor, "batch_priority": False},
    }
    moe = {"num_experts": 8, "layers": layers, "dropout_rate": expert_drop, "router": router}
    moe["group_size"] = 8 * members * ((image_size // patch) ** 2 + 1)  # of eight images
    if members > 1:
        moe["ensemble_size"] = members
    config = {
        "name": "VisionTransformerMoe" if members == 1 else "VisionTransformerMoeEnsemble",
        "image_size": image_size,
        "num_classes": num_classes,
        "patch_size": [patch, patch],
        "hidden_size": width,
        "classifier": "token",
        "representation_size": representation_size,
        "encoder": {"num_layers": depth, "mlp_dim": 4 * width, "num_heads": width // 64, "moe": moe},
    }
    squashed = {**_SQUASHED, "input_size": [3, image_size, image_size]}
    return Released(config, _CROPPED if image_size == 224 else squashed)


_E3 = {"members": 2, "representation_size": 512}
_S32_SCRATCH = _released(4.0, **_S32, representation_size=512, expert_drop=0.2)

RELEASED: dict[str, Released] = {
    "vmoe_s32_last2_ilsvrc2012_randaug_light1": _S32_SCRATCH,
    "vmoe_s32_last2_ilsvrc2012_randaug_light1_ft_ilsvrc2012": _released(1.5, **_S32, image_size=384),
    "vmoe_s32_last2_ilsvrc2012_randaug_medium": _S32_SCRATCH,  # the reference has no config file for this one
    "vmoe_b16_imagenet21k_randaug_strong": _released(1.05, **_B16, num_classes=21843),
    "vmoe_b16_imagenet21k_randaug_strong_ft_ilsvrc2012": _released(1.5, **_B16, image_size=384),
    # The reference has no config file for the first of these.
    "eee_s32_last2_ilsvrc2012": _released(4.0, **_S32, **_E3, expert_drop=0.2),
    "eee_s32_last2_ilsvrc2012_ft_cifar100": _released(1.5, **_S32, **_E3, num_classes=100, image_size=128),
}
