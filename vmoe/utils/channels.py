"""Images of other than three channels."""

from collections.abc import Callable

from PIL import Image
from torchvision.transforms import Grayscale


def to_channels(channels: int) -> list[Callable[[Image.Image], Image.Image]]:
    """Transforms of RGB images for a model: none for 3 channels, gray for 1; ValueError: another number."""
    if channels not in (1, 3):
        raise ValueError(f"in_chans={channels}: image files are read as 3 channels or 1; give the model tensors")
    return [Grayscale()] if channels == 1 else []
