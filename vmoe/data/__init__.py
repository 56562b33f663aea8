"""Images, captions and labels: data sets, transforms and loaders. Knows neither models nor training."""

from typing import TYPE_CHECKING

from vmoe.utils.lazy import lazy_names

if TYPE_CHECKING:
    from vmoe.data.build import applies_orientation, build_dataset, with_orientation
    from vmoe.data.config import AugmentationConfig, LoaderConfig, SourceConfig
    from vmoe.data.dataset import ImageDataset, Sample
    from vmoe.data.images import BadSample, load_image
    from vmoe.data.loader import EvalLoader, TooManyBadSamples, TrainLoader, eval_loader, train_loader
    from vmoe.data.transforms import Transform, build_mixup, build_transform

__all__ = [
    "AugmentationConfig",
    "BadSample",
    "EvalLoader",
    "ImageDataset",
    "LoaderConfig",
    "Sample",
    "SourceConfig",
    "TooManyBadSamples",
    "TrainLoader",
    "Transform",
    "applies_orientation",
    "build_dataset",
    "build_mixup",
    "build_transform",
    "eval_loader",
    "load_image",
    "train_loader",
    "with_orientation",
]

__getattr__ = lazy_names(
    __name__,
    {
        **dict.fromkeys(("applies_orientation", "build_dataset", "with_orientation"), "vmoe.data.build"),
        **dict.fromkeys(("AugmentationConfig", "LoaderConfig", "SourceConfig"), "vmoe.data.config"),
        **dict.fromkeys(("ImageDataset", "Sample"), "vmoe.data.dataset"),
        **dict.fromkeys(("BadSample", "load_image"), "vmoe.data.images"),
        **dict.fromkeys(("EvalLoader", "TrainLoader", "eval_loader", "train_loader"), "vmoe.data.loader"),
        "TooManyBadSamples": "vmoe.data.loader",
        **dict.fromkeys(("Transform", "build_mixup", "build_transform"), "vmoe.data.transforms"),
    },
)
