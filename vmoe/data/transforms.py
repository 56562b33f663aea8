"""Images to tensors: timm's transforms and augmentation, and mixup over a batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import ResizeKeepRatio
from torchvision.transforms import RandomCrop

from vmoe.data.config import AugmentationConfig
from vmoe.data.seeding import derive_seed, isolated_randomness, seed_process
from vmoe.utils.channels import to_channels


class CropAndFlip(NamedTuple):
    """torchvision's RandomCrop with padding and RandomHorizontalFlip of an array, by the same random numbers."""

    shape: tuple[int, ...]  # (H, W, 3)
    padding: int
    hflip: float

    def __call__(self, pixels: np.ndarray, seed: int) -> np.ndarray:
        """(H, W, 3) uint8 of the same size, or the array itself if there is nothing to do."""
        (height, width, _), padding = self.shape, self.padding
        if padding or self.hflip:
            torch.default_generator.manual_seed(seed)
        if padding:
            padded = np.zeros((height + 2 * padding, width + 2 * padding, 3), np.uint8)
            padded[padding : padding + height, padding : padding + width] = pixels
            top, left = (int(torch.randint(2 * padding + 1, (1,))) for _ in range(2))
            pixels = padded[top : top + height, left : left + width]
        return pixels[:, ::-1] if self.hflip and torch.rand(1) < self.hflip else pixels


@dataclass(eq=False, repr=False)
class Transform:
    """From an image to a model's input: (C, H, W) float32, C = 1 or 3.

    A loader keeps images as bytes, which are a quarter of the size: it applies `geometry`, timm's transforms up to the
    conversion to a tensor, to each image and `normalize` to the batch. With `erase`, timm's random erasing of a
    normalised tensor, it does everything on each image.
    """

    geometry: Callable[[Image.Image], Image.Image]
    mean: torch.Tensor  # (C, 1, 1)
    std: torch.Tensor
    erase: Callable[[torch.Tensor], torch.Tensor] | None = None
    quick: CropAndFlip | None = None  # the same as `geometry`, for arrays of its shape

    def __call__(self, image: Image.Image) -> torch.Tensor:
        normalized = self.normalize(torch.from_numpy(np.array(self.geometry(image))))
        return self.erase(normalized) if self.erase is not None else normalized

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """(..., H, W, 3) or gray (..., H, W) uint8 to (..., C, H, W) float32, (value / 255 - mean) / std."""
        pixels = pixels if len(self.mean) > 1 else pixels[..., None]
        image = pixels.movedim(-1, -3).to(torch.float32, memory_format=torch.contiguous_format)
        mean, std = self.mean.to(pixels.device), self.std.to(pixels.device)
        return image.div_(255).sub_(mean).div_(std)

    def __repr__(self) -> str:
        mean, std = self.mean.flatten().tolist(), self.std.flatten().tolist()
        return f"Transform({self.geometry}, mean={mean}, std={std}, erase={self.erase})"


def build_transform(preprocess: dict[str, Any], augmentation: AugmentationConfig | None, **naflex: Any) -> Transform:
    """timm's transform for a model's input.

    `preprocess` holds "input_size" (C, H, W), "mean", "std", "interpolation", and for evaluation "crop_pct" and
    "crop_mode"; see vmoe.models.factory.preprocess_config. Without an augmentation it is the evaluation transform
    (resize, then crop the middle). `naflex` holds timm's settings for images of any sizes, see vmoe/data/naflex.py.
    ValueError: a policy that timm does not know, or C other than 1 or 3.
    """
    mean, std = tuple(preprocess["mean"]), tuple(preprocess["std"])
    settings = {"input_size": tuple(preprocess["input_size"]), "interpolation": preprocess["interpolation"]}
    erase, padding, hflip = None, 0, 0.0
    is_quick = augmentation is None and preprocess.get("crop_pct") == 1 and not naflex
    if augmentation is None:
        settings |= {"crop_pct": preprocess.get("crop_pct"), "crop_mode": preprocess.get("crop_mode")}
    else:
        same = ("scale", "ratio", "hflip", "vflip", "grayscale_prob", "auto_augment")
        settings |= {"is_training": True, **{name: getattr(augmentation, name) for name in same}}
        settings["color_jitter"] = augmentation.color_jitter or None  # timm would apply a jitter of 0, at full cost
        settings["interpolation"] = augmentation.interpolation or preprocess["interpolation"]
        if augmentation.re_prob > 0:
            mode, count = augmentation.re_mode, augmentation.re_count
            erase = RandomErasing(augmentation.re_prob, mode=mode, max_count=count, device="cpu")
    try:
        composed = create_transform(mean=mean, std=std, use_prefetcher=True, **settings, **naflex)
    except AssertionError as error:  # timm checks its policy strings by assertions
        raise ValueError(f"auto_augment {settings.get('auto_augment')!r} is no policy of timm: {error}") from error
    channels, *size = preprocess["input_size"]
    if augmentation is not None and augmentation.crop_padding is not None:
        padding, hflip = augmentation.crop_padding, augmentation.hflip
        crop = [ResizeKeepRatio(size, interpolation=settings["interpolation"]), RandomCrop(size, padding)]
        composed.transforms[:1] = crop
        others = [augmentation.vflip, augmentation.color_jitter, augmentation.grayscale_prob]
        is_quick = not any(others) and augmentation.auto_augment is None
    quick = CropAndFlip((*size, 3), padding, hflip) if is_quick and channels == 3 else None
    # timm's last step makes a tensor; Transform does that itself, which is several times quicker
    composed.transforms = composed.transforms[:-1] + to_channels(channels)
    return Transform(composed, torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1), erase, quick)


class SeededMixup(NamedTuple):
    """timm's mixup and cutmix of a batch, random by (seed, step) only."""

    mixup: Mixup
    seed: int

    def __call__(self, image: torch.Tensor, label: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mixed images (B, 3, H, W), and (B, num_classes) float targets for timm's SoftTargetCrossEntropy.

        `image` (B, 3, H, W) is not changed; ValueError: B is odd. `label` is (B,) long.
        """
        if len(image) % 2:
            problem = f"mixup and cutmix need an even number of images in each process, got {len(image)}"
            raise ValueError(f"{problem}; change data.loader.batch_size (it counts those of all processes)")
        with isolated_randomness():
            seed_process(derive_seed(self.seed, step))
            return self.mixup(image.clone(), label)  # a clone: timm mixes in place


def build_mixup(augmentation: AugmentationConfig, num_classes: int, seed: int) -> SeededMixup | None:
    """Mixup, cutmix or a random one of the two per batch, with label smoothing; None where both are off."""
    if augmentation.mixup == 0 and augmentation.cutmix == 0:
        return None
    probabilities = {"prob": augmentation.mixup_prob, "switch_prob": augmentation.mixup_switch_prob}
    smoothing = {"label_smoothing": augmentation.label_smoothing, "num_classes": num_classes}
    return SeededMixup(Mixup(augmentation.mixup, augmentation.cutmix, **probabilities, **smoothing), seed)
