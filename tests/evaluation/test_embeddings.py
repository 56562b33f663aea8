import json
import sys

import numpy as np
import pytest
import torch

import vmoe
from vmoe.cli import embed, search
from vmoe.data import LoaderConfig, SourceConfig, build_dataset
from vmoe.evaluation import embeddings as module
from vmoe.evaluation.embeddings import Embeddings, embed_images, read_embeddings, write_embeddings
from vmoe.evaluation.loaded_model import load_model
from vmoe.evaluation.search import SearchIndex
from vmoe.models.factory import save_pretrained
from vmoe.utils.config import ConfigError
from vmoe.utils.paths import INDEX_ENDINGS

NUM_IMAGES = 30
LOADER = LoaderConfig(batch_size=3, num_workers=0, on_bad="skip")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Emoji in folders below a folder, one of them twice, with a broken file and one that is no image."""
    folder = tmp_path_factory.mktemp("photos")
    emoji = build_dataset(SourceConfig("emoji", split="held_out"))
    for index in range(NUM_IMAGES):
        file = folder / f"kind {index // 10}" / f"{index:02}.png"
        file.parent.mkdir(exist_ok=True)
        emoji[3 if index == 17 else index].image.save(file)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = vmoe.create_model("limoe_tiny_patch12_48", depth=2, width=32, num_heads=2, embed_dim=16)
    file = tmp_path_factory.mktemp("limoe") / "model.safetensors"
    save_pretrained(model, file)
    return str(file)


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load_model(checkpoint, "cpu")


@pytest.fixture(scope="module")
def dataset(photos):
    return build_dataset(SourceConfig("image_folder", str(photos)))


@pytest.fixture(scope="module")
def index_file(loaded, dataset, tmp_path_factory):
    file = tmp_path_factory.mktemp("index") / "photos.npz"
    embed_images(loaded, dataset, file, LOADER)
    return file


def test_embeddings_are_those_of_the_model(loaded, dataset, index_file):
    found = read_embeddings(index_file)
    images = torch.stack([loaded.transform(dataset[index].image) for index in range(NUM_IMAGES)])
    with torch.no_grad():
        expected = loaded.model.encode_image(images, normalize=True).numpy()
    assert found.embeddings_ND.dtype == np.float16
    np.testing.assert_allclose(found.embeddings_ND, expected, atol=1e-3)
    assert found.paths == [dataset[index].path for index in range(NUM_IMAGES)]
    assert found.labels == [dataset.classes[label] for label in dataset.labels]
    assert (found.captions, found.about["skipped"]) == (None, [])
    assert not index_file.with_name("photos.npz.parts").exists()


@pytest.mark.parametrize("on", [0, 1, 4, 9])
def test_a_stopped_command_continues_with_the_same_result(loaded, dataset, index_file, tmp_path, monkeypatch, on):
    monkeypatch.setattr(module, "PART_IMAGES", 8)  # parts of 9 images, 3 batches
    features, calls = module.image_features, []

    def stop(model, images):
        calls.append(len(images))
        if len(calls) == on + 1:
            raise KeyboardInterrupt
        return features(model, images)

    file = tmp_path / "stopped.npz"
    file.write_text("an older one")
    monkeypatch.setattr(module, "image_features", stop)
    with pytest.raises(KeyboardInterrupt):
        embed_images(loaded, dataset, file, LOADER)
    assert file.read_text() == "an older one"
    parts = tmp_path / "stopped.npz.parts"
    assert parts.exists() == (on > 3)
    if parts.exists():
        name = next(parts.iterdir()).stem
        (parts / f".{name}.f00.npz").write_text("left by a kill")
    embed_images(loaded, dataset, file, LOADER)
    assert len(calls) == on + 1 + 10 - on // 3 * 3  # 10 batches in all; finished parts are not made again
    assert not parts.exists()
    once, again = read_embeddings(index_file), read_embeddings(file)
    np.testing.assert_array_equal(once.embeddings_ND, again.embeddings_ND)
    assert once[1:] == again[1:]


def test_parts_of_another_model_are_not_used(loaded, dataset, index_file, tmp_path, caplog):
    parts = tmp_path / "again.npz.parts"
    parts.mkdir()
    (parts / "0123456789abcdef-00000000.npz").write_text("")
    embed_images(loaded, dataset, tmp_path / "again.npz", LOADER)
    assert "held parts of another model" in caplog.text
    np.testing.assert_array_equal(
        read_embeddings(index_file).embeddings_ND, read_embeddings(tmp_path / "again.npz").embeddings_ND
    )


@pytest.mark.parametrize(
    "names", [["thesis.doc"], ["00000000.npz"], ["0123456789abcdef-00000000.npz", "thesis.doc"]], ids=str
)
def test_other_files_where_parts_would_be_are_kept(loaded, dataset, tmp_path, names):
    parts = tmp_path / "x.npz.parts"
    parts.mkdir()
    content = dict.fromkeys(names, "mine")
    for name, text in content.items():
        (parts / name).write_text(text)
    with pytest.raises(ConfigError, match="holds something else: move it away, or give another output"):
        embed_images(loaded, dataset, tmp_path / "x.npz", LOADER)
    assert {file.name: file.read_text() for file in parts.iterdir()} == content


def test_a_file_where_parts_would_be_is_kept(checkpoint, photos, tmp_path, capsys):
    (tmp_path / "x.npz.parts").write_text("mine")
    more = ["--checkpoint", checkpoint, "--images", str(photos)]
    assert embed.main([*more, "--output", str(tmp_path / "x.npz")]) == 2
    assert "holds something else: move it away" in capsys.readouterr().err
    assert (tmp_path / "x.npz.parts").read_text() == "mine"


@pytest.mark.parametrize("more", [["--device", "foo"], ["--loader.num_workers", "0"]])
def test_an_error_leaves_no_folder(checkpoint, tmp_path, capsys, more):
    (tmp_path / "bad.png").write_text("no image")
    output = ["--output", str(tmp_path / "sub" / "deep" / "x.npz")]
    assert embed.main(["--checkpoint", checkpoint, "--images", str(tmp_path), *output, *more]) > 0
    assert "foo" in (error := capsys.readouterr().err) or "none of the 1 images can be read" in error
    assert [file.name for file in tmp_path.iterdir()] == ["bad.png"]


def test_an_image_with_several_captions_is_one_row(loaded, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PART_IMAGES", 1)
    rows = [f"{image}.png,{caption}" for image in "012" for caption in ("", f"first of {image}", "second")]
    (tmp_path / "x.csv").write_text("\n".join(["image,caption", *rows]))
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes((photos / "kind 0" / f"0{number}.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    pairs = SourceConfig("pairs", "x.csv")
    mixture = SourceConfig("mixture", sources=[pairs, SourceConfig("pairs", str(tmp_path / "x.csv"))])
    for number, source in enumerate((pairs, mixture)):
        dataset = build_dataset(source)
        assert len(dataset) == 9 * (number + 1)
        found = embed_images(loaded, dataset, f"{number}.npz", LoaderConfig(batch_size=1, num_workers=0, on_bad="skip"))
        assert found.captions == [f"first of {number}" for number in range(3)]
        assert found.paths == [str(tmp_path / f"{number}.png") for number in range(3)]
        assert found.about["skipped"] == []


def test_a_long_caption_does_not_swell_the_file(loaded, tmp_path):
    captions = ["x" * 20_000, *["short"] * 2000, "ends with \0"]
    found = Embeddings(np.ones((2002, 4), np.float16), captions, captions, None, {"format": module.FORMAT})
    write_embeddings(found, tmp_path / "x.npz")
    assert (tmp_path / "x.npz").stat().st_size < 500_000
    assert read_embeddings(tmp_path / "x.npz")[1:] == found[1:]


def test_bad_images_are_reported_and_skipped(checkpoint, photos, tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.setattr(module, "PART_IMAGES", 1)
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes((photos / "kind 0" / f"0{number}.png").read_bytes())
    for name in ("0a.jpg", "1a.jpg", "9.jpg"):
        (tmp_path / name).write_text("no image")
    output = ["--output", str(tmp_path / "x.npz"), "--loader.num_workers=0", "--loader.batch_size=1"]
    assert embed.main(["--checkpoint", checkpoint, "--images", str(tmp_path), *output]) == 0
    assert "3 images with 16 features each in" in (out := capsys.readouterr().out)
    assert "3 bad ones skipped" in out
    assert caplog.text.count("bad sample skipped") == 3
    found = read_embeddings(tmp_path / "x.npz")
    assert found.paths == [str(tmp_path / f"{number}.png") for number in range(3)]
    assert found.about["skipped"] == [str(tmp_path / name) for name in ("0a.jpg", "1a.jpg", "9.jpg")]


def test_parquet_holds_the_same(loaded, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow (pip install -e '.[search]')")
    emoji = build_dataset(SourceConfig("emoji", split="held_out", image_size=48))
    emoji.emoji, emoji.indices, emoji.classes = emoji.emoji[:9], emoji.indices[:9], emoji.classes[:9]
    first, second = (embed_images(loaded, emoji, tmp_path / f"x{end}", LOADER) for end in INDEX_ENDINGS)
    for written, end in ((first, ".parquet"), (second, ".npz")):
        read = read_embeddings(tmp_path / f"x{end}")
        np.testing.assert_array_equal(read.embeddings_ND, first.embeddings_ND)
        assert read[1:] == written[1:] == first[1:]
    table = parquet.read_table(tmp_path / "x.parquet")
    assert table.column_names == ["path", "caption", "label", "embedding"]
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: halffloat>[16]"
    assert table["caption"].to_pylist() == emoji.captions


def test_search_finds_what_a_product_finds(index_file, loaded, dataset):
    index = SearchIndex(index_file, device="cpu")
    embeddings = read_embeddings(index_file).embeddings_ND.astype(np.float64)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    with torch.no_grad():
        query = loaded.model.encode_text(loaded.tokenizer(["red apple"]), normalize=True)[0].double().numpy()
    scores = embeddings @ query
    hits = index.by_text("red apple", top=7)
    np.testing.assert_allclose([hit.score for hit in hits], np.sort(scores)[::-1][:7], atol=1e-6)
    assert hits[0].path == dataset[int(scores.argmax())].path
    same = index.by_image(dataset[17].path, top=2)  # 17 is 3 again
    assert {hit.path for hit in same} == {dataset[3].path, dataset[17].path}
    assert same[0].score == pytest.approx(1, abs=1e-3)


def test_faiss_and_the_product_give_the_same_order(index_file):
    pytest.importorskip("faiss", reason="needs faiss (pip install -e '.[search]')")
    index = SearchIndex(index_file, device="cpu")
    assert index._faiss is not None
    index.embeddings.paths[17] = index.embeddings.paths[3]  # the same image, and equal ones have no order
    index.embeddings.labels[17] = index.embeddings.labels[3]
    rng = np.random.default_rng(0)
    queries = [query / np.linalg.norm(query) for query in rng.standard_normal((20, 16))]
    by_faiss = [index.nearest(query, top) for query in queries for top in (1, 4, 99)]
    index._faiss = None
    by_product = [index.nearest(query, top) for query in queries for top in (1, 4, 99)]
    for left, right in zip(by_faiss, by_product, strict=True):
        assert [hit.path for hit in left] == [hit.path for hit in right]
        np.testing.assert_allclose([hit.score for hit in left], [hit.score for hit in right], atol=1e-6)
    assert len(by_faiss[-1]) == NUM_IMAGES


def test_the_command_prints_a_table_or_json(index_file, capsys):
    assert search.main(["a red apple", "--index", str(index_file), "--top", "3", "--json", "--device", "cpu"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [list(row) for row in rows] == [["score", "path", "label"]] * 3
    assert search.main(["a red apple", "--index", str(index_file), "--top", "3", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert f"{rows[0]['score']:.4f}" in shown
    assert rows[2]["label"] in shown


def test_another_model_is_refused(index_file, tmp_path, capsys):
    torch.manual_seed(1)
    model = vmoe.create_model("limoe_tiny_patch12_48", depth=2, width=32, num_heads=2, embed_dim=16)
    save_pretrained(model, tmp_path / "other.safetensors")
    more = ["--index", str(index_file), "--checkpoint", str(tmp_path / "other.safetensors")]
    assert search.main(["x", *more]) == 2
    assert "was made by limoe_tiny_patch12_48 with SHA-256" in capsys.readouterr().err
    moved = read_embeddings(index_file)
    module.write_embeddings(moved._replace(about=moved.about | {"weights": "gone"}), tmp_path / "moved.npz")
    with pytest.raises(ConfigError, match=r"no longer at gone: say where, with --checkpoint"):
        SearchIndex(tmp_path / "moved.npz")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--index", "x.npz"], 2, "give either a text or --image FILE"),
        (["x", "--index", "x.npz", "--top", "0"], 2, "--top must be >= 1"),
        (["x", "--index", "none.npz"], 1, "no index at none.npz: make one with vmoe-embed"),
        (["x", "--index", "torn.npz"], 1, "torn.npz holds no embeddings of vmoe-embed"),
        (["x", "--index", "other.npz"], 1, "other.npz holds no embeddings of vmoe-embed"),
        (["x", "--index", "torn.parquet"], 1, "torn.parquet holds no embeddings of vmoe-embed"),
        (["x", "--index", "x.txt"], 1, "index x.txt must end with .parquet or .npz"),
    ],
)
def test_mistakes_of_a_search(index_file, tmp_path, monkeypatch, capsys, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    content = index_file.read_bytes()
    for name, part in (("x.npz", content), ("torn.npz", content[:500]), ("torn.parquet", b"PAR1"), ("x.txt", b"")):
        (tmp_path / name).write_bytes(part)
    np.savez("other.npz", x=np.zeros(3))
    try:
        found = search.main(arguments)
    except SystemExit as stopped:
        found = stopped.code
    assert found == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "x.csv", "--images", "."], "output x.csv must end with .parquet or .npz"),
        (["--output", "there.npz/x.npz", "--images", "."], "cannot be written: give a file in a folder that can be"),
        (["--output", "x.npz"], "give either images, as in --images FOLDER, or data"),
        (["--output", "x.npz", "--images", ".", "--loader.on_bad", "replace"], "must be 'fail' or 'skip' here"),
        (["--output", "x.npz", "--images", ".", "--loader.naflex.seq_lens", "[16]"], "loader.naflex is for train.py"),
        (["--output", "x.parquet", "--images", "."], "need the package pyarrow: pip install -e '.[search]'"),
    ],
)
def test_mistakes_of_an_embedding_write_nothing(checkpoint, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "there.npz").touch()
    try:
        code = embed.main(["--checkpoint", checkpoint, *arguments])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["there.npz"]
