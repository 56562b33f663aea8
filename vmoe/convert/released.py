"""The checkpoints that the reference's authors released, by name: config, preprocessing, and what is known of them.

Source: the reference's README and vmoe/configs/vmoe_paper. The files lie at gs://vmoe_checkpoints/NAME.*; nothing is
downloaded here. The two E3 ensembles of that list are models of another kind and are not converted.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Released:
    """A released checkpoint.

    Attributes:
        description: what it was trained on.
        config: the reference's model config.
        preprocess: of its evaluation, in the words of timm's `pretrained_cfg`.
    """

    description: str
    config: dict[str, Any]
    preprocess: dict[str, Any] = field(repr=False)


def _config(
    width: int,
    depth: int,
    patch: int,
    layers: list[int],
    image_size: int,
    num_classes: int,
    capacity_factor: float,
    representation_size: int | None = None,
    expert_drop: float = 0.0,
) -> dict[str, Any]:
    tokens = (image_size // patch) ** 2 + 1
    return {
        "name": "VisionTransformerMoe",
        "image_size": image_size,
        "num_classes": num_classes,
        "patch_size": [patch, patch],
        "hidden_size": width,
        "classifier": "token",
        "representation_size": representation_size,
        "encoder": {
            "num_layers": depth,
            "mlp_dim": 4 * width,
            "num_heads": width // 64,
            "dropout_rate": 0.0,
            "attention_dropout_rate": 0.0,
            "moe": {
                "num_experts": 8,
                "layers": layers,
                "dropout_rate": expert_drop,
                "group_size": 8 * tokens,  # of eight pictures
                "router": {
                    "num_selected_experts": 2,
                    "noise_std": 1.0,
                    "importance_loss_weight": 0.005,
                    "load_loss_weight": 0.005,
                    "dispatcher": {
                        "name": "einsum",
                        "bfloat16": True,
                        "capacity_factor": capacity_factor,
                        "batch_priority": False,
                    },
                },
            },
        },
    }


def _s32(**settings) -> dict[str, Any]:
    return _config(512, 8, 32, [5, 7], **settings)


def _b16(**settings) -> dict[str, Any]:
    return _config(768, 12, 16, [1, 3, 5, 7, 9, 11], **settings)


# decode | resize_small(256) | central_crop(224), and decode | resize(384) without a crop; pixels from -1 to 1.
_CROPPED = {"input_size": [3, 224, 224], "crop_pct": 0.875, "crop_mode": "center", "interpolation": "bilinear"}
_SQUASHED = {"input_size": [3, 384, 384], "crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bilinear"}

# Capacity: that of the evaluation where the reference's config has one of its own (4.0), else that of the training.
_SCRATCH = {"image_size": 224, "num_classes": 1000, "capacity_factor": 4.0, "representation_size": 512}
_FINE_TUNED = {"image_size": 384, "num_classes": 1000, "capacity_factor": 1.5}

RELEASED: dict[str, Released] = {
    "vmoe_s32_last2_ilsvrc2012_randaug_light1": Released(
        "V-MoE S/32, experts in the last two odd blocks, ILSVRC2012, 300 epochs with light RandAugment",
        _s32(**_SCRATCH, expert_drop=0.2),
        _CROPPED,
    ),
    "vmoe_s32_last2_ilsvrc2012_randaug_light1_ft_ilsvrc2012": Released(
        "the same, fine-tuned on ILSVRC2012 at 384 px", _s32(**_FINE_TUNED), _SQUASHED
    ),
    # The reference has no config file for this one; that of "light1" with its README's description.
    "vmoe_s32_last2_ilsvrc2012_randaug_medium": Released(
        "V-MoE S/32, experts in the last two odd blocks, ILSVRC2012, 1000 epochs with medium RandAugment",
        _s32(**_SCRATCH, expert_drop=0.2),
        _CROPPED,
    ),
    "vmoe_b16_imagenet21k_randaug_strong": Released(
        "V-MoE B/16, experts in every odd block, ImageNet-21k, 300 epochs with strong RandAugment",
        _b16(image_size=224, num_classes=21843, capacity_factor=1.05),
        _CROPPED,
    ),
    "vmoe_b16_imagenet21k_randaug_strong_ft_ilsvrc2012": Released(
        "the same, fine-tuned on ILSVRC2012 at 384 px", _b16(**_FINE_TUNED), _SQUASHED
    ),
}
