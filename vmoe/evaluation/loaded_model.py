"""A model from a checkpoint, with all that its evaluation needs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.models.naflexvit import NaFlexVit
from timm.utils import unwrap_model
from torch import Tensor, nn

from vmoe.data import AugmentationConfig, LoaderConfig, Transform, build_transform
from vmoe.data.naflex import NaFlexTransform, build_naflex
from vmoe.evaluation.inference import pick_device
from vmoe.evaluation.zero_shot import Template, feature_scorer
from vmoe.models.factory import create_model, find_weights, get_tokenizer, is_contrastive, preprocess_config
from vmoe.models.serialization import read_pretrained_metadata
from vmoe.moe import quantize_experts
from vmoe.utils.config import ConfigError
from vmoe.utils.printable import printable


class LoadedModel(NamedTuple):
    """A model to evaluate."""

    model: nn.Module  # in eval(), on `device`
    tokenizer: Callable[[list[str]], Tensor] | None  # list of texts -> tokens (B, L); None for a classifier
    transform: Transform | NaFlexTransform  # PIL image -> (3, H, W), as the model expects it, or images -> patches
    device: torch.device
    precision: str  # "float32", "bf16" or "fp16" (autocast)
    checkpoint: str  # folder or file, as the user gave it
    weights: Path  # the file that was read
    exif_orientation: bool = False  # whether its training applied EXIF orientation

    @property
    def class_names(self) -> list[str] | None:
        """Names of a classifier's classes, if its file holds them; ValueError: not as many as its outputs."""
        return stored_class_names(self.weights, self.model.num_classes)

    def scorer(self, names: Sequence[str], templates: Sequence[Template] | str | None) -> Callable[[Tensor], Tensor]:
        """images (B, 3, H, W) -> scores (B, C) of its classes or of `names`; call it inside `evaluating`."""
        if self.tokenizer is not None:
            score = feature_scorer(self.model, self.tokenizer, names, templates, self.device)
            return lambda images: score(self.model.encode_image(images, normalize=True))
        return lambda images: self.model(images).float()


def load_model(
    checkpoint: str,
    device: str = "auto",
    precision: str = "float32",
    crop_pct: float | None = None,
    weights: Path | None = None,
    experts: str | None = None,
    loader: LoaderConfig | None = None,
) -> LoadedModel:
    """Loads a checkpoint: the folder of a run (its newest) or of a checkpoint, or a .safetensors file.

    `crop_pct` is the share of the image's side that the transform keeps, `weights` what `find_weights` finds for the
    checkpoint, `experts` the type of `vmoe.quantize_experts`; None: as the checkpoint has them. `loader` says whether
    the model sees patches (`loader.naflex`). ValueError: no such checkpoint or device, or a file that cannot be used,
    has no experts to quantize or takes no patches.
    """
    torch_device = pick_device(device)
    weights = find_weights(checkpoint) if weights is None else weights
    model = create_model(None, pretrained=weights)
    if experts is not None:
        quantize_experts(model, experts)
    model = model.to(torch_device).eval()
    tokenizer = get_tokenizer(model) if is_contrastive(model) else None
    transform = image_transform(model, loader, crop_pct=crop_pct)
    turned = trained_on_turned(weights)
    return LoadedModel(model, tokenizer, transform, torch_device, precision, checkpoint, weights, turned)


def image_transform(
    model: nn.Module,
    loader: LoaderConfig | None,
    augmentation: AugmentationConfig | None = None,
    crop_pct: float | None = None,
) -> Transform | NaFlexTransform:
    """How images reach a model from a loader, arguments as of `load_model`; ConfigError: the model takes no patches."""
    preprocess = preprocess_config(model) | ({} if crop_pct is None else {"crop_pct": crop_pct})
    if loader is None or loader.naflex is None:
        return build_transform(preprocess, augmentation)
    if not isinstance(vit := unwrap_model(model), NaFlexVit):
        known = "such as vmoe_naflex_base_patch16 or an upcycled naflexvit_base_patch16_gap"
        problem = f"needs a NaFlexVit of timm's, {known}, got {type(vit).__name__}"
        raise ConfigError(f"loader.naflex (in training data.loader.naflex) {problem}: leave it out")
    patches = vit.embeds.patch_size, vit.embeds.channels_last
    return build_naflex(preprocess, augmentation, loader.naflex.seq_lens, *patches)


class DeepEnsemble(nn.Module):
    """Classifiers as one, whose members are asked as those of an ensemble of experts (`checked_logits`)."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models, self.ensemble_size, self.num_classes = nn.ModuleList(models), len(models), models[0].num_classes

    def member_logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B · M, classes), those of an image next to each other."""
        return torch.stack([model(images).float() for model in self.models], dim=1).flatten(0, 1)


def as_ensemble(members: Sequence[LoadedModel]) -> LoadedModel:
    """Loaded classifiers of the same classes as one; ValueError: they see images in different ways."""
    first = members[0]
    for other in members[1:]:
        own, theirs = ((preprocess_config(each.model), _patches(each.transform)) for each in (first, other))
        if own != theirs or first.class_names != other.class_names:
            what = "preprocessing" if own != theirs else "class names"
            raise ValueError(f"{other.checkpoint} has another {what} than {first.checkpoint}: an ensemble needs one")
    model = DeepEnsemble([each.model for each in members]).eval()
    return first._replace(model=model, checkpoint=", ".join(each.checkpoint for each in members))


def _patches(transform: Transform | NaFlexTransform) -> dict[str, Any] | None:
    """Size of a patch and order of its pixels; None for squares."""
    return vars(transform.patchify) if isinstance(transform, NaFlexTransform) else None


def trained_on_turned(weights: str | Path) -> bool:
    """Whether the training of a weights file's model applied EXIF orientation."""
    return read_pretrained_metadata(weights)["extra"].get("exif_orientation") is True


def weights_fingerprint(weights: str | Path) -> str:
    """SHA-256 (hex) of a weights file, or of a folder's files together."""
    if Path(weights).is_dir():  # the shards of a sharded run
        parts = [f"{file.name} {weights_fingerprint(file)}\n" for file in sorted(Path(weights).iterdir())]
        return hashlib.sha256("".join(parts).encode()).hexdigest()
    with open(weights, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def stored_class_names(weights: str | Path, outputs: int) -> list[str] | None:
    """Names of the classes that a weights file holds, or None; ValueError: they are no list of `outputs` texts."""
    names = read_pretrained_metadata(weights)["extra"].get("class_names")
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"the class names in {weights} must be a list of texts, got {printable(names)}")
    if len(names) != outputs:
        raise ValueError(f"{weights} names {len(names)} classes, but the model has {outputs} outputs")
    return names
