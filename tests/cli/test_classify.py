import csv
import json
import shutil

import pytest
import torch
from PIL import Image

import vmoe
from vmoe.cli.classify import find_images, main
from vmoe.models.factory import save_pretrained


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An image-text model, a classifier with and one without class names, and three images."""
    folder = tmp_path_factory.mktemp("classify")
    torch.manual_seed(0)
    model = vmoe.create_model("limoe_tiny_patch8_48", depth=2, width=32, num_heads=2, embed_dim=16)
    save_pretrained(model, folder / "limoe.safetensors")
    settings = {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 32, "num_classes": 3}
    classifier = vmoe.create_model("vit_tiny_patch16_224", **settings)
    save_pretrained(classifier, folder / "vit.safetensors", extra={"class_names": ["[red]apple", "pear", "fig"]})
    save_pretrained(classifier, folder / "nameless.safetensors")
    (folder / "photos" / "below").mkdir(parents=True)
    for index, name in enumerate(("a.png", "b.JPG", "below/c.png")):
        Image.effect_noise((60 + index, 50), 90).convert("RGB").save(folder / "photos" / name, format="PNG")
    (folder / "photos" / ".DS_Store").write_bytes(b"junk")
    (folder / "photos" / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(autouse=True)
def _no_traceback(monkeypatch):
    monkeypatch.delenv("VMOE_TRACEBACK", raising=False)


def test_json_equals_zero_shot_classify(files, capsys):
    image = str(files / "photos" / "a.png")
    options = ["--checkpoint", str(files / "limoe.safetensors"), "--templates", "a {}", "--templates", "the {}"]
    assert main([image, "--labels", "cat, dog,fox", *options, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    model = vmoe.create_model(pretrained=files / "limoe.safetensors")
    labels = ["cat", "dog", "fox"]
    expected = vmoe.zero_shot_classify(model, vmoe.get_tokenizer(model), image, labels, ["a {}", "the {}"])[0]
    assert found["image"] == image
    assert {one["label"]: one["probability"] for one in found["predictions"]} == pytest.approx(
        dict(zip(labels, expected.tolist())), abs=1e-6
    )
    values = [one["probability"] for one in found["predictions"]]
    assert values == sorted(values, reverse=True)


def test_a_table_for_every_image_of_a_folder(files, capsys, tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("cat\nfox, red\n[bold]dog\n", encoding="utf-8")
    options = ["--checkpoint", str(files / "limoe.safetensors"), "--labels_file", str(labels), "--top", "2"]
    assert main([str(files / "photos"), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = [line for line in lines if line.startswith(str(files))]
    assert shown == [str(files / "photos" / name) for name in ("a.png", "b.JPG", "below/c.png")]
    rows = [line for line in lines if line.strip(" │").startswith(("cat ", "fox, red ", "[bold]dog "))]
    assert len(rows) == 6


def test_a_classifier_shows_its_own_classes(files, capsys):
    image = files / "photos" / "a.png"
    assert main([str(image), "--checkpoint", str(files / "vit.safetensors"), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    model, _, transform = vmoe.create_model_and_transforms(pretrained=files / "vit.safetensors")
    with torch.no_grad():
        expected = model(transform(Image.open(image))[None]).softmax(dim=1)[0].tolist()
    assert {one["label"]: one["probability"] for one in found["predictions"]} == pytest.approx(
        dict(zip(["[red]apple", "pear", "fig"], expected)), abs=1e-6
    )
    assert main([str(image), "--checkpoint", str(files / "vit.safetensors")]) == 0
    assert "[red]apple" in capsys.readouterr().out


def test_published_names(files, capsys):
    image = str(files / "photos" / "a.png")
    options = ["--checkpoint", str(files / "limoe.safetensors"), "--labels_file", "stl10", "--json", "--top", "20"]
    assert main([image, *options]) == 0
    assert len(json.loads(capsys.readouterr().out)[0]["predictions"]) == 10


def test_images_are_found(files, monkeypatch):
    photos = files / "photos"
    every = [photos / "a.png", photos / "b.JPG", photos / "below" / "c.png"]
    assert find_images([str(photos)]) == every
    assert find_images([str(every[2]), str(photos)]) == [every[2], *every[:2]]
    odd = files / "odd [1].png"
    shutil.copy(every[0], odd)
    assert find_images([str(odd)]) == [odd]
    (files / "none").mkdir()
    with pytest.raises(ValueError, match=r"none: no image there"):
        find_images([str(files / "none")])


def test_a_broken_file_stops_no_other(files, capsys, tmp_path):
    for name in ("a.png", "b.JPG"):
        shutil.copy(files / "photos" / name, tmp_path)
    for name in ("0.jpg", "aa.png"):
        (tmp_path / name).write_bytes(b"broken")
    options = ["--checkpoint", str(files / "vit.safetensors"), "--json", "--batch_size", "1"]
    whole = [str(tmp_path / name) for name in ("a.png", "b.JPG")]
    assert main([*whole, *options]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert main([str(tmp_path), *options]) == 1
    found = capsys.readouterr()
    assert json.loads(found.out) == expected
    assert [one["image"] for one in expected] == whole
    assert f"2 of 4 images cannot be read: {tmp_path / '0.jpg'}: not an image file" in found.err
    assert f"; {tmp_path / 'aa.png'}: not an image file" in found.err


def test_skipped_files_are_counted(files, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("vmoe.data.images.reads_heif", lambda: False)
    assert len(find_images([str(files / "photos")])) == 3
    assert "photos: skipped other files: 1 .txt" in caplog.text
    for name in ("IMG_1.HEIC", "IMG_2.heic", "clip.mov"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"no image there .*, but other files: 2 \.heic, 1 \.mov"):
        find_images([str(tmp_path)])


def test_images_are_turned_upright_unless_switched_off(files, capsys, tmp_path):
    model = vmoe.create_model(pretrained=files / "vit.safetensors")
    save_pretrained(model, tmp_path / "vit.safetensors", extra={"class_names": ["a", "b", "c"]})
    pixels = torch.rand(8, 12, 3, generator=torch.Generator().manual_seed(0)).mul(255).byte().numpy()
    upright, exif = Image.fromarray(pixels).resize((60, 40)), Image.Exif()
    exif[274] = 6  # to be turned a quarter clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "side.png", exif=exif)
    upright.save(tmp_path / "upright.png")

    def probabilities(image, *options):
        checkpoint = str(tmp_path / "vit.safetensors")
        assert main([str(tmp_path / image), "--checkpoint", checkpoint, "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)[0]["predictions"]

    assert probabilities("side.png") == probabilities("upright.png")
    assert probabilities("side.png", "--no-exif_orientation") != probabilities("upright.png")


def _error(capsys, arguments, code):
    try:
        found = main(arguments)
    except SystemExit as error:  # argparse's own
        found = error.code
    captured = capsys.readouterr()
    assert (found, captured.out) == (code, "")
    (line,) = captured.err.splitlines()
    return line.removeprefix("vmoe-classify: error: ")


def test_bad_input_is_one_sentence(files, capsys, tmp_path):
    image, limoe = str(files / "photos" / "a.png"), ["--checkpoint", str(files / "limoe.safetensors")]
    labels = ["--labels", "cat,dog"]
    broken = tmp_path / "broken.png"
    broken.write_bytes((files / "photos" / "a.png").read_bytes()[:300])
    notes = files / "photos" / "notes.txt"
    (tmp_path / "empty").mkdir()
    for arguments, code, error in (
        (["no.png", *labels, *limoe], 1, "no.png: no such file or folder"),
        ([str(broken), *labels, *limoe], 1, f"{broken}: unreadable image"),
        ([str(broken), str(notes), *labels, *limoe], 1, f"2 of 2 images cannot be read: {broken}: unreadable"),
        ([str(notes), *labels, *limoe], 1, "notes.txt: not an image file"),
        ([str(tmp_path / "empty"), *labels, *limoe], 1, "empty: no image there"),
        ([image, *limoe], 2, "give some, as --labels 'cat,dog'"),
        ([image, "--labels", "cat,dog,cat", *limoe], 2, "--labels: class_names must be unique; given twice: 'cat'"),
        ([image, "--labels", "cat,,dog", *limoe], 2, "--labels: class_names: name 1 is empty"),
        (
            [image, "--labels", '["cat", "dog"]', *limoe],
            2,
            "--labels: must be one text with commas, as in 'cat,hot dog'",
        ),
        ([image, "--labels", "cat", "dog", *limoe], 2, "arguments: dog; labels are one text with commas"),
        ([image, "--labels", "cat", *limoe], 2, "'cat' alone would always get the probability 1"),
        ([image, "--labels_file", "cifar11", *limoe], 2, "--labels_file: class_names 'cifar11': no such file"),
        ([image, *labels, "--templates", "a photo", *limoe], 2, "--templates: templates 'a photo': no such file"),
        ([image, *labels, "--labels_file", "stl10", *limoe], 2, "--labels_file: not allowed with argument --labels"),
        ([image, *labels, "--top", "0", *limoe], 2, "--top must be >= 1, got 0"),
        ([image, *labels], 2, "the following arguments are required: --checkpoint"),
        (limoe, 2, "the following arguments are required: IMAGE"),
        ([image, *labels, "--checkpoint", "nowhere"], 1, "no weights at nowhere: it does not exist"),
        ([image, *labels, "--checkpoint", str(files / "vit.safetensors")], 2, "leave --labels out"),
        (
            [image, "--checkpoint", str(files / "nameless.safetensors")],
            2,
            "without class names; save it again with vmoe.models.factory.save_pretrained(",
        ),
    ):
        assert error in _error(capsys, arguments, code)


def test_predictions_in_files(files, capsys, tmp_path, caplog, monkeypatch):
    """A row per image, in batches, as --json gives them; broken files and HEIC are named, and have no row."""
    for name in ("a.png", "b.JPG", "below/c.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(files / "photos" / name, tmp_path / "in" / name)
    monkeypatch.setattr("vmoe.data.images.reads_heif", lambda: False)
    model = ["--checkpoint", str(files / "vit.safetensors"), "--top", "2"]
    assert main([str(tmp_path / "in"), *model, "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    (tmp_path / "in" / "aa.png").write_bytes(b"broken")
    (tmp_path / "in" / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(8))
    csv_file, jsonl_file = tmp_path / "new" / "out.csv", tmp_path / "out.jsonl"
    jsonl_file.write_text("old")
    for file, batch_size in ((csv_file, "2"), (jsonl_file, "1")):
        assert main([str(tmp_path / "in"), *model, "--output", str(file), "--batch_size", batch_size]) == 1
        printed = capsys.readouterr()
        assert printed.out == f"3 images: {file}\n"
        assert "error: 2 of 5 images cannot be read, each named above" in printed.err
    assert [json.loads(line) for line in jsonl_file.read_text(encoding="utf-8").splitlines()] == [
        {
            **one,
            "predictions": [{**each, "probability": pytest.approx(each["probability"])} for each in one["predictions"]],
        }
        for one in expected
    ]
    assert "IMG_1.HEIC: not an image file" in caplog.text
    assert "install pillow-heif (pip install -e '.[heic]' in a checkout)" in caplog.text
    with csv_file.open(newline="", encoding="utf-8") as stream:
        header, *rows = csv.reader(stream)
    assert header == ["image", "label_1", "probability_1", "label_2", "probability_2"]
    for row, one in zip(rows, expected, strict=True):
        assert row[:1] + row[1::2] == [one["image"], *(each["label"] for each in one["predictions"])]
        assert [float(value) for value in row[2::2]] == pytest.approx([e["probability"] for e in one["predictions"]])
    assert [file.name for file in csv_file.parent.iterdir()] == ["out.csv"]


def test_output_that_cannot_be_written(files, capsys, tmp_path):
    image, model = str(files / "photos" / "a.png"), ["--checkpoint", str(files / "vit.safetensors")]
    (tmp_path / "file").touch()
    (tmp_path / "dir.csv").mkdir()
    for output, code, error in (
        ("out.txt", 2, "out.txt must end with .csv or .jsonl"),
        ("dir.csv", 2, "dir.csv cannot be written: give a file in a folder that can be"),
        ("file/out.csv", 2, "file/out.csv cannot be written"),
    ):
        assert error in _error(capsys, [image, *model, "--output", str(tmp_path / output)], code)
    broken, new = tmp_path / "broken.png", tmp_path / "new" / "dir"
    broken.write_bytes(b"broken")
    for arguments in (
        [str(broken), *model],
        ["no.png", *model],
        [image, "--checkpoint", "nowhere"],
        [image, *model, "--top", "0"],
        [image, *model, "--labels", "cat,dog"],
    ):
        assert main([*arguments, "--output", str(new / "none.csv")]) != 0
        assert not new.parent.exists()
