"""Two towers for images and texts, trained contrastively, with experts in either or in both.

Shapes, by suffix: B batch, L text length, C embedding width.
"""

import math
from collections.abc import Mapping

import timm
import torch
from timm.models import group_parameters
from torch import Tensor, nn

from vmoe.models.contrastive import INIT_LOGIT_SCALE, ImageTextModel
from vmoe.models.text import SIZES, TextTransformer

TOWERS = ("image", "text")
IMAGE_TOWER = "vmoe_base_patch16_224"  # if no name is given


class TwoTower(ImageTextModel):
    """An image tower, `visual`, and a text tower, `text`, whose heads give an embedding of width `embed_dim`.

    `image` holds a "name" of timm and that model's own arguments; "num_classes": 0 removes its head, as in LiT (arXiv
    2111.07991), and `embed_dim` is its width then. `text` holds settings of `TextTransformer`. A tower whose parameters
    are all frozen stays in evaluation mode, so that training does not change its outputs.
    """

    def __init__(
        self,
        image: Mapping | None = None,
        text: Mapping | None = None,
        embed_dim: int = 512,
        init_logit_scale: float = INIT_LOGIT_SCALE,
        init_logit_bias: float | None = None,
        output_dict: bool = False,
    ) -> None:
        super().__init__(init_logit_scale, init_logit_bias, output_dict)
        self.embed_dim = embed_dim
        self._freeze_bn_stats = False
        image = {"name": IMAGE_TOWER, "num_classes": embed_dim, **(image or {})}
        self.visual = timm.create_model(image.pop("name"), **image)
        self.text = TextTransformer(**{"num_classes": embed_dim, **(text or {})})
        if (copies := getattr(self.visual, "ensemble_size", 1)) > 1:
            raise ValueError(f"image.ensemble_size must be left out, got {copies}: two towers compare single features")
        self.in_chans = getattr(self.visual, "in_chans", 3)
        self.context_length, self.vocab_size = self.text.context_length, self.text.vocab_size
        for name, tower in zip(TOWERS, (self.visual, self.text), strict=True):
            width = tower.num_classes or tower.head_hidden_size
            if width != embed_dim:
                raise ValueError(
                    f"the {name} tower gives {width} features, embed_dim is {embed_dim}; set embed_dim={width}"
                )
        self._init_image_head()

    def init_weights(self) -> None:
        """The towers' own initialisation; not all of timm's models have one."""
        if not hasattr(self.visual, "init_weights"):
            raise TypeError(f"the image tower {type(self.visual).__name__} has no init_weights; load its weights")
        for module in self.visual.modules():  # timm's leaves out some, such as batch norms
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        self.visual.init_weights()
        self._init_image_head()
        self.text.init_weights()
        self.reset_logits()

    def _init_image_head(self) -> None:
        if isinstance(head := self.visual.get_classifier(), nn.Linear):
            nn.init.normal_(head.weight, std=head.in_features**-0.5)  # timm's zeros have no direction

    def features(self, image: Tensor | None, text: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Images (B, 3, H, W) and token ids (B, L) -> (B, C) each."""
        return None if image is None else self.visual(image), None if text is None else self.text(text)

    def train(self, mode: bool = True) -> "TwoTower":
        super().train(mode)
        for tower in (self.visual, self.text):
            if not _is_trained(tower):
                tower.eval()
        for norm in self.visual.modules() if self._freeze_bn_stats else ():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and not _is_trained(norm):
                norm.eval()  # open_clip puts another class there, which the model's files would not know
        return self

    def lock_image_tower(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freeze the image tower except its last `unlocked_groups` of `group_matcher` (the head is the last), with
        `freeze_bn_stats` also the statistics of its frozen batch norms."""
        _lock(self.visual, unlocked_groups)
        self._freeze_bn_stats = freeze_bn_stats
        self.train(self.training)

    def lock_text_tower(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """Freeze the text tower except its last layer groups (blocks; the head counts as one)."""
        if not freeze_layer_norm:
            raise ValueError(
                "freeze_layer_norm=False is not supported: norms are frozen with their blocks "
                "(open_clip's trainer: --lock-text-freeze-layer-norm)"
            )
        _lock(self.text, unlocked_layers)
        self.train(self.training)

    def set_grad_checkpointing(self, enable: bool = True, **kwargs) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations."""
        for tower in (self.visual, self.text):
            tower.set_grad_checkpointing(enable)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Change the image size; position embeddings are interpolated."""
        self.visual.set_input_size(img_size=img_size)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        image, text = getattr(self.visual, "no_weight_decay", set)(), self.text.no_weight_decay()
        return {"logit_scale", "logit_bias", *(f"visual.{n}" for n in image), *(f"text.{n}" for n in text)}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False):
        """Parameter groups by depth, for layer decay: counted from the top, where the towers meet."""
        depth_from_top = {}
        for prefix, tower in (("visual", self.visual), ("text", self.text)):
            groups = group_parameters(tower, tower.group_matcher(coarse=coarse), reverse=True)
            depth_from_top |= {f"{prefix}.{name}": max(groups.values()) - layer for name, layer in groups.items()}
        return lambda name: -depth_from_top.get(name, 0)


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _lock(tower: nn.Module, unlocked_groups: int) -> None:
    """Freezes all layer groups but the last ones."""
    if unlocked_groups < 0:
        raise ValueError(f"the number of unlocked groups must be >= 0, got {unlocked_groups}")
    groups = group_parameters(tower, tower.group_matcher())
    for layer, names in groups.items():
        for name in names if unlocked_groups == 0 or layer <= max(groups) - unlocked_groups else ():
            tower.get_parameter(name).requires_grad_(False)


def merge_settings(settings: Mapping, given: Mapping) -> dict:
    """A two-tower model's settings with the user's over them; a named image tower starts from that name's own."""
    merged = {**settings, **given}
    for tower in TOWERS:
        own, users = settings.get(tower) or {}, given.get(tower) or {}
        if not isinstance(users, Mapping):
            raise ValueError(f"{tower} must hold the {tower} tower's settings, got {users!r}")
        merged[tower] = {**({} if "name" in users else own), **users}
    name = merged["image"].get("name", IMAGE_TOWER)
    if not (isinstance(name, str) and timm.is_model(name)):
        raise ValueError(f"image.name must be a model of timm's registry, got {name!r}")
    return merged


_TINY = {"text": {**SIZES["tiny"], "context_length": 16}, "embed_dim": 128}


def _soft(image_name: str, embed_dim: int) -> dict:
    """The Soft MoE paper's contrastive models: a Soft MoE without a head, and a dense B for texts of 16 tokens."""
    return {
        "image": {"name": image_name, "img_size": 256, "num_classes": 0},
        "text": {**SIZES["base"], "context_length": 16, "qk_norm": True, "num_experts": 0},
        "embed_dim": embed_dim,
        "init_logit_scale": math.log(10),
        "init_logit_bias": -10.0,
    }


TWO_TOWER_CONFIGS: dict[str, dict] = {
    "two_tower_tiny_patch8_48": {"image": {"name": "vmoe_tiny_patch8_48"}, **_TINY},
    "two_tower_tiny_patch12_48": {"image": {"name": "vmoe_tiny_patch8_48", "patch_size": 12}, **_TINY},
    "two_tower_small_patch32": {"image": {"name": "vmoe_small_patch32_224"}, "text": SIZES["small"], "embed_dim": 512},
    "two_tower_base_patch32": {"image": {"name": "vmoe_base_patch32_224"}, "text": SIZES["base"], "embed_dim": 512},
    "two_tower_base_patch16": {"image": {"name": "vmoe_base_patch16_224"}, "text": SIZES["base"], "embed_dim": 512},
    "two_tower_large_patch16": {"image": {"name": "vmoe_large_patch16_224"}, "text": SIZES["large"], "embed_dim": 768},
    "two_tower_soft_small_patch16_256": _soft("softmoe_small_patch16_224", 384),
    "two_tower_soft_base_patch16_256": _soft("softmoe_base_patch16_224", 768),
    "two_tower_soft_large_patch16_256": _soft("softmoe_large_patch16_224", 1024),
}
