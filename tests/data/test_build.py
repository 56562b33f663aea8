import pytest
from PIL import Image

from vmoe.data import BadSample, SourceConfig, applies_orientation, build_dataset, with_orientation

from .test_shards import write


def test_files_folders_and_trees(tmp_path, photo):
    (tmp_path / "tree" / "class").mkdir(parents=True)
    (tmp_path / "pairs").mkdir()
    photo.save(tmp_path / "tree" / "class" / "a.png")
    photo.save(tmp_path / "pairs" / "a.png")
    (tmp_path / "pairs" / "a.txt").write_text("a ramp")
    (tmp_path / "pairs.csv").write_text("image,caption\na.png,a ramp\n")
    root = str(tmp_path)
    sources = [
        SourceConfig("pairs", f"{root}/pairs"),
        SourceConfig("pairs", f"{root}/pairs.csv", image_root=f"{root}/pairs"),
        SourceConfig("image_folder", f"{root}/tree"),
    ]
    samples = [build_dataset(source)[0] for source in sources]
    assert [sample.caption for sample in samples] == ["a ramp", "a ramp", None]
    assert [sample.label for sample in samples] == [None, None, 0]


def test_an_unknown_type_is_refused():
    with pytest.raises(ValueError, match="'video'"):
        build_dataset(SourceConfig("video"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (SourceConfig("image_folder", "gone"), "data.train.path gone: no such folder"),
        (
            SourceConfig("pairs", "gone.csv"),
            "data.train.path gone.csv: cannot be read (No such file",
        ),
        (
            SourceConfig("mixture", sources=[SourceConfig("emoji"), SourceConfig("image_folder", "gone")]),
            "data.train: sources[1].path gone: no such folder",
        ),
        (SourceConfig("torchvision", "x", name="LSUN"), "data.train: name must be a data set of torchvision that"),
    ],
)
def test_errors_begin_with_the_setting(source, message):
    with pytest.raises(ValueError) as error:
        build_dataset(source, "data.train")
    assert str(error.value).startswith(message)


def test_every_type_reads_files_as_the_settings_say(tmp_path, monkeypatch, photo):
    """Its EXIF data say that the image, 20 x 10, stands on its side; shards and Parquet files hold the same file."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs datasets")
    pyarrow = pytest.importorskip("pyarrow")
    monkeypatch.setenv("VMOE_CACHE", str(tmp_path / "cache"))
    exif = Image.Exif()
    exif[274] = 6
    (tmp_path / "folder" / "class").mkdir(parents=True)
    image = tmp_path / "folder" / "class" / "a.jpg"
    photo.save(image, exif=exif)
    image.with_suffix(".txt").write_text("a photo")
    (tmp_path / "pairs.csv").write_text("image,caption\nfolder/class/a.jpg,a photo\n")
    write(tmp_path / "0.tar", [("a.jpg", image.read_bytes()), ("a.txt", b"a photo")])
    table = pyarrow.table({"image": [image.read_bytes()], "text": ["a photo"]})
    parquet.write_table(table, tmp_path / "train.parquet")
    sources = [
        {"type": "pairs", "path": str(tmp_path / "folder")},
        {"type": "pairs", "path": str(tmp_path / "pairs.csv")},
        {"type": "shards", "path": str(tmp_path / "0.tar")},
        {"type": "hf", "path": str(tmp_path / "train.parquet")},
        {"type": "image_folder", "path": str(tmp_path / "folder")},
    ]
    (tmp_path / "other.csv").write_text("image,caption\nfolder/class/a.jpg,a photo\n")
    mixed = {"type": "mixture", "sources": [{**sources[1], "path": str(tmp_path / "other.csv")}, sources[2]]}
    for settings in [*sources, mixed]:
        if settings["type"] == "image_folder":
            image.with_suffix(".txt").unlink()

        def size(default=False, settings=settings, **more):
            source = SourceConfig(**settings, **more)
            return build_dataset(with_orientation(source) if default else source)[0].image.size

        assert (size(), size(True)) == ((20, 10), (10, 20))
        if settings is not mixed:
            assert (size(exif_orientation=True), size(True, exif_orientation=False)) == ((10, 20), (20, 10))
            assert size(max_pixels=199) == (10, 5)
            with pytest.raises(BadSample, match="20 x 10 pixels, more than the limit of 49"):
                size(max_pixels=49)
    mixed["sources"][0]["exif_orientation"] = True
    assert applies_orientation(SourceConfig(**mixed))
    assert not applies_orientation(SourceConfig(**sources[0]))
    assert [one.image.size for one in build_dataset(SourceConfig(**mixed))] == [(10, 20), (20, 10)]
