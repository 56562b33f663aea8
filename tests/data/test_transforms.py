import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip

from vmoe.data import AugmentationConfig, build_mixup, build_transform
from vmoe.data.seeding import isolated_randomness, seed_process

from .conftest import PREPROCESS

STRONG = {"auto_augment": "rand-m9-mstd0.5-inc1", "hflip": 0.5, "re_prob": 1.0, "scale": (0.1, 1.0)}


def seeded(transform, image, seed=3):
    with isolated_randomness():
        seed_process(seed)
        return transform(image)


def test_evaluation_is_timms(photo):
    timms = create_transform(**PREPROCESS)
    for crop_pct in (1.0, 0.9):
        timms = create_transform(**{**PREPROCESS, "crop_pct": crop_pct})
        assert torch.equal(build_transform({**PREPROCESS, "crop_pct": crop_pct}, None)(photo), timms(photo))


@pytest.mark.parametrize("settings", [{}, {"hflip": 0.5, "color_jitter": 0.4}, STRONG])
def test_training_is_timms(photo, settings):
    augmentation = AugmentationConfig(**settings)
    timms = create_transform(
        (3, 8, 8),
        is_training=True,
        mean=PREPROCESS["mean"],
        std=PREPROCESS["std"],
        interpolation="bicubic",
        **{"hflip": 0.0, "scale": (0.8, 1.0), "ratio": (0.9, 1.1), "re_mode": "pixel", "color_jitter": None} | settings,
    )
    ours = build_transform(PREPROCESS, augmentation)
    for seed in range(5):
        assert torch.equal(seeded(ours, photo, seed), seeded(timms, photo, seed))


@pytest.mark.parametrize("padding", [0, 2, 9])
def test_a_crop_with_padding_is_torchvisions(padding):
    """Also of an array, for which no image is made."""
    torchvisions = Compose([RandomCrop(8, padding), RandomHorizontalFlip(0.5)])
    ours = build_transform(PREPROCESS, AugmentationConfig(crop_padding=padding, hflip=0.5))
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    crops = set()
    for seed in range(30):
        crop = seeded(torchvisions, image, seed).tobytes()
        assert seeded(ours.geometry, image, seed).tobytes() == crop
        with isolated_randomness():
            assert ours.quick(pixels, seed).tobytes() == crop
        crops.add(crop)
    assert len(crops) > (20 if padding else 1)


def test_a_crop_with_padding_of_a_larger_image_is_of_its_shorter_side(photo):
    image = seeded(build_transform(PREPROCESS, AugmentationConfig(crop_padding=0)).geometry, photo)
    assert image.size == (8, 8)  # of 16 x 8
    assert np.abs(np.diff(np.asarray(image)[0, :, 0].astype(int))).mean() == pytest.approx(255 / 16, abs=2)


@pytest.mark.parametrize(
    "other",
    [{"vflip": 0.5}, {"color_jitter": 0.4}, {"grayscale_prob": 0.5}, {"auto_augment": "rand-m9-mstd0.5-inc1"}],
)
def test_what_else_is_random_is_left_to_timm(other):
    assert build_transform(PREPROCESS, AugmentationConfig(crop_padding=1)).quick is not None
    assert build_transform(PREPROCESS, AugmentationConfig(crop_padding=1, **other)).quick is None
    assert build_transform(PREPROCESS, AugmentationConfig()).quick is None
    assert build_transform(PREPROCESS | {"input_size": (1, 8, 8)}, AugmentationConfig(crop_padding=1)).quick is None
    assert build_transform(PREPROCESS | {"crop_pct": 0.9}, None).quick is None


def test_bytes_normalised_as_a_batch_equal_images_normalised_alone(photo):
    transform = build_transform(PREPROCESS, None)
    images = [photo, photo.rotate(90), photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    pixels = torch.stack([torch.from_numpy(np.array(transform.geometry(image))) for image in images])
    batch = transform.normalize(pixels)
    assert batch.is_contiguous()
    assert torch.equal(batch, torch.stack([transform(image) for image in images]))
    assert torch.equal(transform.normalize(pixels[0]), batch[0])


@pytest.mark.parametrize("settings", [None, {}, STRONG])
@pytest.mark.parametrize("size", [(1, 1), (1, 100), (100, 1), (3, 2)])
def test_tiny_images_pass(settings, size):
    transform = build_transform(PREPROCESS, settings if settings is None else AugmentationConfig(**settings))
    for seed in range(5):
        assert seeded(transform, Image.new("RGB", size, "red"), seed).shape == (3, 8, 8)


def test_transforms_can_be_sent_to_a_worker(photo):
    transform = build_transform(PREPROCESS, AugmentationConfig(**STRONG))
    again = pickle.loads(pickle.dumps(transform))
    assert torch.equal(seeded(transform, photo), seeded(again, photo))


def test_mixup_depends_on_seed_and_step_only():
    config = AugmentationConfig(mixup=0.8, cutmix=1.0, label_smoothing=0.1)
    image, label = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    before = image.clone()
    mixed, targets = build_mixup(config, 5, seed=1)(image, label, step=7)
    torch.rand(3)
    again, _ = build_mixup(config, 5, seed=1)(image, label, step=7)
    other, _ = build_mixup(config, 5, seed=1)(image, label, step=8)
    assert torch.equal(mixed, again)
    assert not torch.equal(mixed, other)
    assert torch.equal(image, before)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    assert build_mixup(AugmentationConfig(), 5, seed=1) is None
    with pytest.raises(ValueError, match="even"):
        build_mixup(config, 5, seed=1)(image[:3], label[:3], step=0)


def test_gray_images_are_what_colour_would_be_in_gray(photo):
    gray = {**PREPROCESS, "input_size": (1, *PREPROCESS["input_size"][1:]), "mean": (0.4,), "std": (0.2,)}
    for augmentation in (None, AugmentationConfig(**STRONG)):
        transform, colour = build_transform(gray, augmentation), build_transform(PREPROCESS, augmentation)
        image = seeded(transform, photo)
        assert image.shape == (1, *PREPROCESS["input_size"][1:])
        with isolated_randomness():
            seed_process(3)
            pixels = torch.from_numpy(np.array(colour.geometry(photo).convert("L")))
        torch.testing.assert_close(transform.normalize(pixels)[0], (pixels / 255 - 0.4) / 0.2)
        if augmentation is None:
            torch.testing.assert_close(image, transform.normalize(pixels))
        assert torch.equal(
            transform.normalize(pixels.expand(4, -1, -1)), transform.normalize(pixels).expand(4, 1, -1, -1)
        )


def test_channels_that_no_image_file_has_are_named():
    with pytest.raises(ValueError, match="in_chans=4: image files are read as 3 channels"):
        build_transform({**PREPROCESS, "input_size": (4, 8, 8), "mean": (0.5,) * 4, "std": (0.5,) * 4}, None)
