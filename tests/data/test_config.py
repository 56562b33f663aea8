import pytest

from vmoe.data import AugmentationConfig, LoaderConfig, SourceConfig


@pytest.mark.parametrize(
    ("config_class", "settings", "named"),
    [
        (SourceConfig, {"type": "pairs"}, "path"),
        (SourceConfig, {"type": "imagenet_c"}, "data source of type 'imagenet_c' needs a path"),
        (SourceConfig, {"type": "karpathy", "path": "x", "split": "restval"}, "must be one of train, val, test"),
        (SourceConfig, {"type": "torchvision", "path": "x"}, "name"),
        (SourceConfig, {"type": "emoji", "split": "test"}, "held_out"),
        (SourceConfig, {"type": "emoji_groups", "split": "held_out"}, "val"),
        (SourceConfig, {"image_size": 0}, "image_size"),
        (SourceConfig, {"type": "pairs", "path": "x", "delimiter": ";;"}, "delimiter must be one character"),
        (SourceConfig, {"type": "shards", "path": "x", "delimiter": ";"}, "delimiter is for pairs"),
        (SourceConfig, {"type": "pairs", "path": "x", "max_pixels": 0}, "max_pixels must be >= 1"),
        (SourceConfig, {"type": "emoji", "max_pixels": 9}, "max_pixels are for image files"),
        (SourceConfig, {"type": "emoji", "exif_orientation": False}, "exif_orientation and max_pixels are for image"),
        (SourceConfig, {"image_size": "48"}, "image_size must be int, got '48'; leave the quotation marks out"),
        (SourceConfig, {"type": "shards", "path": ["a.tar", "b.tar"]}, "path must be .* shards may be joined by '::'"),
        (SourceConfig, {"type": "image_folder", "path": "x", "class_names": ["a"]}, "class_names must be .* not a"),
        (SourceConfig, {"type": "mixture", "sources": {"type": "emoji"}}, "sources must be .* a list of sections"),
        (SourceConfig, {"type": "mixture", "sources": ["emoji"]}, "sources.0. must be a section with the keys type, "),
        (SourceConfig, {"type": "mixture", "sources": [{"type": "emoji", "wieght": 1}]}, "key 'sources.0..wieght'"),
        (LoaderConfig, {"num_workers": 1.5}, "num_workers must be int"),
        (AugmentationConfig, {"crop_padding": -1}, "crop_padding must be >= 0, got -1"),
        (AugmentationConfig, {"crop_padding": 4, "scale": (0.5, 1.0)}, "replaces scale and ratio: leave"),
        (AugmentationConfig, {"scale": 0.5}, "scale must be .* write a list of 2 values"),
        (LoaderConfig, {"batch_size": 0}, "batch_size"),
        (LoaderConfig, {"num_workers": -1}, "num_workers"),
        (LoaderConfig, {"max_bad_share": 2.0}, "max_bad_share"),
        (AugmentationConfig, {"scale": (0.9, 0.5)}, "scale"),
        (AugmentationConfig, {"ratio": (0.0, 1.0)}, "ratio"),
        (AugmentationConfig, {"hflip": 1.5}, "hflip"),
        (AugmentationConfig, {"mixup": -1.0}, "mixup"),
        (AugmentationConfig, {"label_smoothing": 1.0}, "label_smoothing"),
        (AugmentationConfig, {"re_count": 0}, "re_count"),
    ],
)
def test_a_wrong_setting_is_named(config_class, settings, named):
    with pytest.raises(ValueError, match=named):
        config_class(**settings)
