"""Images of their own shape as patches (NaFlex), by timm's transforms and collator; loaders take them as any others."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.naflex_dataset import NaFlexCollator
from timm.data.naflex_transforms import Patchify

from vmoe.data.config import AugmentationConfig
from vmoe.data.images import BadSample
from vmoe.data.transforms import Transform, build_transform


@dataclass
class NaFlexTransform:
    """From images to batches of patches: a `Transform` for each number of patches, {sequence length: transform}."""

    by_length: dict[int, Transform]
    patchify: Patchify

    def check(self, image: Image.Image | np.ndarray, path: str) -> None:
        """BadSample: the image, or array (H, W, 3), is smaller than a patch."""
        width, height = image.size if isinstance(image, Image.Image) else image.shape[1::-1]
        rows, columns = self.patchify.patch_size
        if width < columns or height < rows:
            raise BadSample(path, f"{width} x {height} pixels, smaller than a patch ({columns} x {rows})")

    def stack(self, images: Sequence[torch.Tensor], seq_len: int) -> dict[str, torch.Tensor]:
        """Images (C, H, W) of whole patches -> {"patches": (B, seq_len, pixels), "patch_coord": (B, seq_len, 2) row and
        column, "patch_valid": (B, seq_len) bool}; zeros fill the rows."""
        batch, _ = NaFlexCollator(seq_len)([(self.patchify(image), 0) for image in images])
        return {name: batch[name] for name in ("patches", "patch_coord", "patch_valid")}


def build_naflex(
    preprocess: dict[str, Any],
    augmentation: AugmentationConfig | None,
    seq_lens: Sequence[int],
    patch_size: tuple[int, int],
    channels_last: bool = True,
) -> NaFlexTransform:
    """timm's NaFlex transforms: an image keeps about its shape, and is resized to the most patches that a sequence
    holds. Arguments as of `build_transform`; `channels_last` is the order of a patch's pixels."""
    sizes = [{"naflex": True, "patch_size": patch_size, "max_seq_len": seq_len} for seq_len in seq_lens]
    transforms = [build_transform(preprocess, augmentation, **size) for size in sizes]
    return NaFlexTransform(dict(zip(seq_lens, transforms)), Patchify(patch_size, channels_last=channels_last))
