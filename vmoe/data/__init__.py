"""Images, captions and labels: data sets, transforms and loaders. Knows neither models nor training."""

from typing import TYPE_CHECKING

from vmoe.utils.lazy import lazy_names

if TYPE_CHECKING:
    from vmoe.data.build import applies_orientation, build_dataset, with_orientation
    from vmoe.data.cache import cache_images
    from vmoe.data.config import AugmentationConfig, LoaderConfig, SourceConfig
    from vmoe.data.dataset import ImageDataset, Sample
    from vmoe.data.images import BadSample, load_image
    from vmoe.data.loader import EvalLoader, TooManyBadSamples, TrainLoader, eval_loader, train_loader
    from vmoe.data.transforms import Transform, build_mixup, build_transform

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "vmoe.data.build": "applies_orientation build_dataset with_orientation",
        "vmoe.data.cache": "cache_images",
        "vmoe.data.config": "AugmentationConfig LoaderConfig SourceConfig",
        "vmoe.data.dataset": "ImageDataset Sample",
        "vmoe.data.images": "BadSample load_image",
        "vmoe.data.loader": "EvalLoader TooManyBadSamples TrainLoader eval_loader train_loader",
        "vmoe.data.transforms": "Transform build_mixup build_transform",
    },
)
