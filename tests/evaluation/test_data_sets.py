"""ImageNet's test sets, ObjectNet and Karpathy's captions, from made-up files to metrics, by the command."""

import json
import pkgutil

import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo

import vmoe
from vmoe.cli.evaluate import main
from vmoe.data.sources import imagenet as imagenet_module
from vmoe.data.sources.imagenet import ImageNetC, imagenet_words
from vmoe.evaluation import loaded_model
from vmoe.evaluation.loaded_model import load_model
from vmoe.models.factory import save_pretrained

SYNSETS = ImageNetInfo("imagenet-1k").label_names()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """1,000 outputs; its answer to any image is class 6, then 11, then 0 (by the bias of its head)."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("classifier")
    model = vmoe.create_model("vmoe_tiny_patch8_48", num_classes=1000, embed_dim=32, depth=2, num_heads=2)
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data = -torch.arange(1000.0)
    model.head.bias.data[[6, 11]] = torch.tensor([9.0, 8.0])
    save_pretrained(model, folder / "model.safetensors", extra={"class_names": list(imagenet_words())})
    return folder


@pytest.fixture(scope="module")
def limoe(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("limoe")
    model = vmoe.create_model("limoe_tiny_patch8_48", width=32, embed_dim=16, depth=2, num_heads=2)
    save_pretrained(model, folder / "model.safetensors")
    return folder


def evaluate(checkpoint, task, kind, path, *others):
    output = path.parent / f"{kind}.json"
    arguments = ["--checkpoint", str(checkpoint), "--output", str(output), "--loader.num_workers", "0"]
    data = ["--data.type", kind, "--data.path", str(path)]
    assert main([*arguments, "--task", task, *data, *others]) == 0
    return json.loads(output.read_text())


def make_image(file, colour="red", size=(12, 10)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(file)


def test_a_subset_is_judged_by_its_own_outputs(classifier, tmp_path):
    columns = subset_columns("imagenet_a")
    for column in columns:
        make_image(tmp_path / "a" / SYNSETS[column] / "1.jpg")
    report = evaluate(classifier, "classification", "imagenet_a", tmp_path / "a")
    assert columns[:2] == [6, 11]
    assert report["results"]["num_samples"] == 200
    assert report["results"]["top1"] == pytest.approx(1 / 200)
    # 6 and 11 by the bias, then the lowest of the other 198: outputs outside the 200, such as 0, do not count
    assert report["results"]["top5"] == pytest.approx(5 / 200)
    assert report["checkpoints"][0]["details"]["per_class"][0]["top1"] == 1


def subset_columns(kind):
    return [int(line) for line in pkgutil.get_data("timm.data", f"_info/{kind}_indices.txt").split()]


def test_a_subset_zero_shot(limoe, tmp_path):
    for column in subset_columns("imagenet_r"):
        make_image(tmp_path / "r" / SYNSETS[column] / "1.jpg")
    report = evaluate(limoe, "zero_shot", "imagenet_r", tmp_path / "r", "--templates", "[a {}]")
    assert report["results"]["num_samples"] == 200
    assert len(report["checkpoints"][0]["details"]["per_class"]) == 200


def make_tiny_imagenet(root):
    """Two validation images each of classes 6 and 11 of ImageNet-1k, of which Tiny-ImageNet has just these here."""
    for number in range(4):
        make_image(root / "val" / "images" / f"val_{number}.JPEG")
    lines = [f"val_{number}.JPEG\t{SYNSETS[(6, 11)[number % 2]]}\t0\t0\t9\t9\n" for number in range(4)]
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text(f"{SYNSETS[11]}\n{SYNSETS[6]}\n")
    (root / "words.txt").write_text("".join(map("{}\t{}\n".format, SYNSETS, imagenet_words())))
    return root


def test_tiny_imagenet_is_judged_by_the_outputs_of_its_classes(classifier, limoe, tmp_path):
    root = make_tiny_imagenet(tmp_path / "tiny")
    of_val = ["--data.split", "val"]
    report = evaluate(classifier, "classification", "tiny_imagenet", root, *of_val)
    assert report["results"]["top1"] == 0.5
    assert [entry["top1"] for entry in report["checkpoints"][0]["details"]["per_class"]] == [1, 0]  # it answers 6
    report = evaluate(limoe, "zero_shot", "tiny_imagenet", root, *of_val, "--templates", "[a {}]")
    assert report["results"]["num_samples"] == 4


@pytest.mark.parametrize("kind", ["tiny_imagenet", "image_folder"])
def test_one_of_two_cranes_is_known_by_its_synset(classifier, tmp_path, kind):
    """As in Tiny-ImageNet, whose "crane" has the name of a bird and of a machine."""
    machine, root = SYNSETS[517], tmp_path / "data"
    if kind == "tiny_imagenet":
        make_tiny_imagenet(root)
        for file in (root / "wnids.txt", root / "val" / "val_annotations.txt"):
            file.write_text(file.read_text().replace(SYNSETS[11], machine))
        (root / "words.txt").write_text(f"{SYNSETS[6]}\tstingray\n{machine}\tcrane\n")
    else:
        for synset in (SYNSETS[6], machine):
            make_image(root / synset / "1.jpg")
    split = ["--data.split", "val"] if kind == "tiny_imagenet" else []
    (entry,) = evaluate(classifier, "classification", kind, root, *split)["checkpoints"]
    found = [(one["class"], one["top1"]) for one in entry["details"]["per_class"]]
    assert found == [("stingray", 1), ("crane", 0)]  # it answers 6


def test_a_classifier_of_tiny_imagenet_itself(tmp_path):
    root = make_tiny_imagenet(tmp_path / "tiny")
    model = vmoe.create_model("vmoe_tiny_patch8_48", num_classes=2, embed_dim=32, depth=2, num_heads=2)
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data = torch.tensor([0.0, 1.0])
    names = [imagenet_words()[column] for column in (6, 11)]
    save_pretrained(model, tmp_path / "model.safetensors", extra={"class_names": names})
    report = evaluate(tmp_path, "classification", "tiny_imagenet", root, "--data.split", "val")
    assert [entry["top1"] for entry in report["checkpoints"][0]["details"]["per_class"]] == [0, 1]


def test_real_counts_any_of_its_labels_and_reports_what_it_leaves_out(classifier, tmp_path):
    """The classifier answers 6, 11, 0, 1, 2: the first image is right, the third within five, the second neither."""
    for number in (1, 2, 3, 4):
        make_image(tmp_path / "val" / f"ILSVRC2012_val_{number:08d}.JPEG")
    (tmp_path / "real.json").write_text(json.dumps([[500, 6], [500, 600], [700, 2], []]))
    labels = ["--data.labels_file", str(tmp_path / "real.json")]
    report = evaluate(classifier, "classification", "imagenet_real", tmp_path / "val", *labels)
    assert report["results"]["top1"] == pytest.approx(1 / 3)
    assert report["results"]["top5"] == pytest.approx(2 / 3)
    assert report["data"]["left_out"] == {"images without a label in ReaL": 1}


def test_corruptions_have_their_errors_and_missing_ones_are_named(classifier, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(imagenet_module, "imagenet_synsets", lambda: tuple(SYNSETS[5:8]))  # of labels 0, 1, 2
    for severity in range(1, 6):
        for synset in SYNSETS[5:8]:
            make_image(tmp_path / "c" / "fog" / str(severity) / synset / "1.JPEG", size=(224, 224))
    shares = []
    monkeypatch.setattr(
        loaded_model, "load_model", lambda *arguments: shares.append(arguments[3]) or load_model(*arguments)
    )
    report = evaluate(classifier, "classification", "imagenet_c", tmp_path / "c")
    assert shares == [1]
    details = report["checkpoints"][0]["details"]
    assert list(details["conditions"]) == [f"fog/{severity}" for severity in range(1, 6)]
    assert details["corruption_errors"] == {"fog": pytest.approx(1 / 0.819324)}
    assert len(details["missing_conditions"]) == 70
    assert "mce" not in report["results"]
    assert "70 of 75 conditions are missing" in caplog.text


def test_the_data_may_say_how_much_of_an_image_is_kept(classifier):
    """ImageNet-C's images are cropped already, and must not be cropped again."""
    assert ImageNetC.crop_pct == 1
    image = Image.radial_gradient("L").resize((48, 48)).convert("RGB")
    whole, half = (load_model(str(classifier), "cpu", crop_pct=share).transform.geometry(image) for share in (1, 0.5))
    assert whole.tobytes() == image.tobytes()
    assert half.getextrema()[0][1] < image.getextrema()[0][1]  # the corners are lighter than the middle


def test_karpathys_captions(limoe, tmp_path):
    images = []
    for number, colour in enumerate(("red", "green", "blue")):
        make_image(tmp_path / "val2014" / f"{number}.jpg", colour)
        sentences = [{"raw": f"{text} {colour}"} for text in ("a", "all", "so very")]
        images.append({"filename": f"{number}.jpg", "filepath": "val2014", "split": "test", "sentences": sentences})
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images}))
    report = evaluate(limoe, "retrieval", "karpathy", tmp_path / "dataset_coco.json", "--data.split", "test")
    assert report["results"]["num_images"] == 3
    assert report["results"]["num_samples"] == 9
    assert report["results"]["text_to_image_recall@5"] == 1


def test_a_strangers_tree(classifier, tmp_path, capsys, caplog):
    """One empty class folder, one .DS_Store, one broken JPEG: each is named, by the command."""
    for name in ("cat", "dog"):
        make_image(tmp_path / "tree" / name / "1.jpg")
    (tmp_path / "tree" / "cat" / ".DS_Store").touch()
    (tmp_path / "tree" / "cow").mkdir()
    arguments = ["--checkpoint", str(classifier), "--task", "classification", "--loader.num_workers", "0"]
    arguments += ["--data.type", "image_folder", "--data.path", str(tmp_path / "tree")]
    assert main(arguments) == 1
    assert f"{tmp_path}/tree/cow: holds no image" in capsys.readouterr().err
    (tmp_path / "tree" / "cow").rmdir()
    (tmp_path / "tree" / "cat" / "1.jpg").write_bytes((tmp_path / "tree" / "cat" / "1.jpg").read_bytes()[:200])
    two = tmp_path / "two"
    two.mkdir()
    model = vmoe.create_model("vmoe_tiny_patch8_48", num_classes=2, embed_dim=32, depth=2, num_heads=2)
    save_pretrained(model, two / "model.safetensors")
    assert main([*arguments, "--checkpoint", str(two)]) == 1
    assert f"{tmp_path}/tree/cat/1.jpg: unreadable image" in capsys.readouterr().err
    assert f"{tmp_path}/tree/cat/.DS_Store" in caplog.text
