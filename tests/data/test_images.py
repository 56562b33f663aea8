import io

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from vmoe.data import images
from vmoe.data.images import BadSample, Reading, load_image


def saved(path, image, **options):
    image.save(path, **options)
    return load_image(path)


def test_rgb_is_kept(tmp_path, photo):
    assert np.array_equal(saved(tmp_path / "a.png", photo), photo)


def test_cmyk_gives_the_same_colours(tmp_path, photo):
    loaded = saved(tmp_path / "a.jpg", photo.convert("CMYK"), quality=95)
    assert loaded.mode == "RGB"
    assert np.abs(np.asarray(loaded, int) - np.asarray(photo, int)).mean() < 8


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_16_bit_grey_keeps_its_range(tmp_path, suffix):
    values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    loaded = np.asarray(saved(tmp_path / f"a{suffix}", Image.fromarray(values)), int)
    assert np.abs(loaded - (values >> 8)[..., None]).max() <= 1


def test_an_image_of_unknown_range_is_bad(tmp_path):
    for number, pixels in enumerate([np.full((4, 4), 0.5, np.float32), np.full((4, 4), 10**6, np.int32)]):
        with pytest.raises(BadSample, match="unknown range"):
            saved(tmp_path / f"{number}.tif", Image.fromarray(pixels))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparency_is_laid_on_white(tmp_path, mode):
    clear = Image.new("RGBA", (6, 6), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 3, 6))
    if mode == "P":
        image = clear.convert("RGB").convert("P")
        loaded = saved(tmp_path / "a.png", image, transparency=image.getpixel((5, 5)))
    else:
        loaded = saved(
            tmp_path / ("a.tif" if mode == "PA" else "a.png"), clear.convert("LA" if mode != "RGBA" else mode)
        )
    assert loaded.getpixel((5, 5)) == (255, 255, 255)
    assert loaded.getpixel((0, 0)) != (255, 255, 255)


def test_rgb_with_a_transparent_colour(tmp_path, photo):
    photo.paste((9, 9, 9), (0, 0, 5, 10))
    loaded = saved(tmp_path / "a.png", photo, transparency=(9, 9, 9))
    assert loaded.getpixel((2, 2)) == (255, 255, 255)
    assert loaded.getpixel((15, 2)) == photo.getpixel((15, 2))


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp"])
def test_of_an_animation_the_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    loaded = saved(tmp_path / f"a{suffix}", frames[0], save_all=True, append_images=frames[1:])
    red, green, blue = loaded.getpixel((4, 4))
    assert red > 240 > 20 > max(green, blue)


def test_a_cameras_file_of_several_images(tmp_path):
    """MPO: a JPEG file with further images behind the first (a preview, the other eye)."""
    image, other = (Image.new("RGB", (16, 12), colour) for colour in ("red", "blue"))
    image.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[other])
    with Image.open(tmp_path / "a.jpg") as opened:
        assert opened.format == "MPO"
    for loaded in (load_image(tmp_path / "a.jpg"), load_image("a.jpg", (tmp_path / "a.jpg").read_bytes())):
        assert loaded.size == (16, 12)
        assert loaded.getpixel((3, 3))[0] > 240


def test_grey_one_bit_and_single_pixel(tmp_path):
    for mode in ("L", "1"):
        assert saved(tmp_path / f"{mode}.png", Image.new(mode, (1, 1), 1)).mode == "RGB"


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".gif", ".tif", ".webp", ".bmp"])
def test_every_truncation_is_bad_or_an_image(tmp_path, suffix, photo):
    """Whatever the cut, BadSample is the only exception, and most cuts are noticed."""
    buffer = io.BytesIO()
    photo.resize((40, 40)).save(buffer, Image.registered_extensions()[suffix])
    data, noticed = buffer.getvalue(), 0
    cuts = sorted({int(share * len(data)) for share in np.linspace(0, 0.9, 25)})
    for cut in cuts:
        path = tmp_path / f"cut{suffix}"
        path.write_bytes(data[:cut])
        try:
            load_image(path)
        except BadSample:
            noticed += 1
    assert noticed > len(cuts) // 2


def test_what_is_no_image(tmp_path):
    (tmp_path / "text.jpg").write_text("this is text")
    (tmp_path / "empty.jpg").write_bytes(b"")
    for name, reason in [("text.jpg", "not an image"), ("empty.jpg", "not an image"), ("gone.jpg", "no such file")]:
        with pytest.raises(BadSample, match=reason) as caught:
            load_image(tmp_path / name)
        assert caught.value.path == str(tmp_path / name)
    with pytest.raises(BadSample):
        load_image(tmp_path)


def with_orientation(image, number, suffix):
    exif, file = Image.Exif(), io.BytesIO()
    exif[274] = number
    image.save(file, Image.registered_extensions()[suffix], exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("number", range(10))
def test_exif_orientation(suffix, number, photo):
    content = with_orientation(photo, number, suffix)
    turned = load_image("a", content, Reading(exif_orientation=True))
    with Image.open(io.BytesIO(content)) as image:
        assert np.array_equal(turned, ImageOps.exif_transpose(image).convert("RGB"))
        assert np.array_equal(load_image("a", content), image.convert("RGB"))  # as torchvision's ImageFolder
    assert turned.size == ((10, 20) if number in (5, 6, 7, 8) else (20, 10))


def test_exif_orientation_of_transparent_and_grey_images(photo):
    for mode in ("RGBA", "L", "P"):
        turned = load_image("a", with_orientation(photo.convert(mode), 8, ".png"), Reading(exif_orientation=True))
        assert (turned.mode, turned.size) == ("RGB", (10, 20))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_broken_exif_data_say_nothing(photo):
    file = io.BytesIO()
    photo.save(file, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\xff broken")
    assert load_image("a", file.getvalue(), Reading(exif_orientation=True)).size == photo.size


def test_an_orientation_that_is_not_applied_is_said_once(photo, monkeypatch, caplog):
    monkeypatch.setattr(images, "_warned", False)
    load_image("plain.jpg", with_orientation(photo, 1, ".jpg"))
    load_image("turned.jpg", with_orientation(photo, 6, ".jpg"), Reading(exif_orientation=True))
    assert not caplog.text
    for _ in range(2):
        load_image("side.jpg", with_orientation(photo, 6, ".jpg"))
    assert caplog.text.count("side.jpg: its EXIF orientation is not applied, as in torchvision and timm") == 1


@pytest.mark.parametrize("size", [(61, 40), (60, 41), (8, 8), (80, 40)])
def test_a_large_jpeg_is_read_at_half_its_size(size):
    image, file = Image.linear_gradient("L").rotate(45).crop((80, 80, 170, 170)).resize(size), io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=95)
    width, height = size
    half = (width + 1) // 2, (height + 1) // 2
    for limit, expected in (
        (width * height, size),
        (width * height - 1, half),
        (half[0] * half[1], half),
        (half[0] * half[1] - 1, None),
    ):
        if expected is None:
            with pytest.raises(BadSample, match=rf"{width} x {height} pixels, more than .* {limit} \(max_pixels\)"):
                load_image("a", file.getvalue(), Reading(max_pixels=limit))
            continue
        loaded = load_image("a", file.getvalue(), Reading(max_pixels=limit))
        assert loaded.size == expected
    small = load_image("a", file.getvalue(), Reading(max_pixels=width * height - 1))
    expected = np.asarray(image.resize(half, Image.Resampling.BOX), int)
    assert np.abs(np.asarray(small, int)[..., 0] - expected).mean() < 2


@pytest.mark.parametrize(("format", "options"), [("JPEG", {"progressive": True}), ("PNG", {}), ("BMP", {})])
def test_other_large_files_are_bad(format, options):
    """A progressive JPEG file takes the memory of its whole size, however it is read."""
    file = io.BytesIO()
    Image.new("RGB", (40, 40)).save(file, format, **options)
    with pytest.raises(BadSample, match=r"40 x 40 pixels, more than the limit of 1599 \(max_pixels\)"):
        load_image("a", file.getvalue(), Reading(max_pixels=1599))
    assert load_image("a", file.getvalue(), Reading(max_pixels=1600)).size == (40, 40)


def test_the_limit_can_be_above_pillows(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    for format in ("PNG", "JPEG", "TIFF"):
        file = io.BytesIO()
        Image.new("RGB", (40, 40)).save(file, format)
        assert load_image("a", file.getvalue(), Reading(max_pixels=1600)).size == (40, 40)


@pytest.mark.filterwarnings("error")
def test_a_photo_of_108_megapixels(tmp_path):
    Image.new("L", (12_000, 9_000)).save(tmp_path / "a.jpg")
    assert load_image(tmp_path / "a.jpg").size == (6000, 4500)


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("after", [True, False])
def test_a_png_file_with_long_texts(photo, compressed, after):
    """As programs write that keep how an image was made; Pillow's limit for a compressed text is 1 MiB."""
    info, file = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_text("prompt", "word " * 2**20, zip=compressed)
    info.add_itxt("workflow", "node " * 2**20, zip=compressed)
    info.chunks = [(*chunk[:2], after) for chunk in info.chunks]
    photo.save(file, "PNG", pnginfo=info)
    assert len(file.getvalue()) > 10 * 2**20 or compressed
    assert np.array_equal(load_image("a", file.getvalue()), photo)


@pytest.mark.parametrize(("brand", "name"), [(b"heic", "HEIC"), (b"mif1", "HEIF"), (b"avif", "AVIF")])
def test_formats_of_phones_are_named(brand, name):
    with pytest.raises(BadSample, match=rf"not an image file \(JPEG, .*\); it is {name}, save it as one of these"):
        load_image("IMG_1.HEIC", b"\0\0\0\x18ftyp" + brand + bytes(8))


def test_heic_is_read_by_pillow_heif(photo, tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif", reason="needs pillow-heif (pip install -e '.[test]')")
    pillow_heif.from_pillow(photo).save(tmp_path / "a.heic", quality=-1)
    read = load_image(tmp_path / "a.heic")
    assert read.size == photo.size
    assert np.abs(np.asarray(read).astype(int) - np.asarray(photo)).mean() < 4
