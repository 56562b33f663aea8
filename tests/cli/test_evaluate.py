import csv
import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image

import vmoe
from vmoe.cli.evaluate import main
from vmoe.data.config import SourceConfig
from vmoe.data.sources.imagenet import imagenet_synsets
from vmoe.evaluation.config import CapacityConfig, EvaluationConfig, FeatureConfig
from vmoe.evaluation.loaded_model import load_model
from vmoe.evaluation.results_file import output_file
from vmoe.models.factory import find_weights, save_pretrained
from vmoe.models.manifest import describe_files, find_problems, write_manifest
from vmoe.utils.config import find_config, read_config, shipped_config_dirs

A_INDICES = Path(timm.data.__file__).parent / "_info" / "imagenet_a_indices.txt"
TINY = {"depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Two classes of three images each, and pairs of the same images with two captions each."""
    root = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    with open(root / "pairs.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption"])
        for name in ("cat", "dog"):
            (root / "folder" / name).mkdir(parents=True)
            for i in range(3):
                pixels = generator.integers(0, 255, (50, 60, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / "folder" / name / f"{i}.png")
                rows.writerow([f"folder/{name}/{i}.png", f"{name} number {i}"])
                rows.writerow([f"./folder/{name}/{i}.png", f"a image of {name} {i}"])
    return root


@pytest.fixture(scope="module")
def limoe(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("limoe")
    model = vmoe.create_model("limoe_tiny_patch8_48", width=32, embed_dim=16, **TINY)
    save_pretrained(model, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("classifier")
    model = vmoe.create_model("vmoe_tiny_patch8_48", num_classes=2, embed_dim=32, **TINY)
    save_pretrained(model, folder / "model.safetensors", extra={"class_names": ["cat", "dog"]})
    return folder


def arguments(checkpoint, output, *others):
    return ["--checkpoint", str(checkpoint), "--output", str(output), "--loader.num_workers", "0", *others]


def folder_arguments(tree):
    return ["--data.type", "image_folder", "--data.path", str(tree / "folder")]


def test_classification_of_a_folder(tree, classifier, tmp_path, capsys):
    results = []
    for batch_size in (1, 6):
        folder = ["--config", "classification_folder", *folder_arguments(tree)]
        argv = arguments(classifier, tmp_path / "out.json", *folder)
        assert main([*argv, "--loader.num_workers=0", "--loader.batch_size", str(batch_size)]) == 0
        report = json.loads((tmp_path / "out.json").read_text())
        results.append(report["results"])
    assert results[0] == results[1]
    assert results[0]["num_samples"] == 6
    # no top5 of two classes
    assert set(results[0]) == {"top1", "mean_per_class", "nll", "ece", "num_samples", "num_skipped"}
    assert report["config"]["loader"]["batch_size"] == 6
    assert report["checkpoints"][0]["model"]["name"] == "vmoe_tiny_patch8_48"
    assert report["versions"]["torch"] == torch.__version__
    assert "top1" in capsys.readouterr().out


def test_zero_shot_of_a_folder(tree, limoe, tmp_path):
    argv = arguments(limoe, tmp_path / "out.json", "--config", "zero_shot_folder", *folder_arguments(tree))
    assert main([*argv, "--loader.num_workers=0"]) == 0
    plain = json.loads((tmp_path / "out.json").read_text())
    assert plain["results"]["num_samples"] == 6
    # the same names from a file, one per line, in reverse: what was right is wrong
    (tmp_path / "names.txt").write_text("dog\ncat\n")
    assert main([*argv, "--loader.num_workers=0", "--class_names", str(tmp_path / "names.txt")]) == 0
    swapped = json.loads((tmp_path / "out.json").read_text())
    assert swapped["results"]["top1"] == pytest.approx(1 - plain["results"]["top1"])


def test_experts_kept_in_fewer_bytes(tree, classifier, tmp_path, capsys):
    argv = arguments(classifier, tmp_path / "out.json", "--config", "classification_folder", *folder_arguments(tree))
    entries = {}
    for kind in ("null", "bfloat16", "int8"):
        assert main([*argv, "--experts", kind]) == 0
        [entries[kind]] = json.loads((tmp_path / "out.json").read_text())["checkpoints"]
    assert "experts" not in entries["null"]["model"]
    assert entries["int8"]["model"]["experts"] == "int8"
    memory = [entry["expert_bytes"] for entry in entries.values()]
    assert memory[0] > 1.9 * memory[1] > 3.4 * memory[2]
    dense = vmoe.create_model("vmoe_tiny_patch8_48", num_classes=2, embed_dim=32, num_experts=0, **TINY)
    save_pretrained(dense, tmp_path / "dense" / "model.safetensors")
    argv[1] = str(tmp_path / "dense")
    assert main([*argv, "--experts", "int8"]) == 1
    assert "no experts to keep as int8" in capsys.readouterr().err


def test_retrieval_knows_one_image_by_its_path(tree, limoe, tmp_path):
    argv = arguments(
        limoe, tmp_path / "out.json", "--config", "retrieval_pairs", "--data.path", str(tree / "pairs.csv")
    )
    assert main([*argv, "--loader.num_workers=0", "--loader.batch_size=5"]) == 0
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert results["num_images"] == 6
    assert results["num_samples"] == 12
    assert results["text_to_image_recall@10"] == 1


def test_captions_longer_than_the_context_are_counted(tree, limoe, tmp_path, caplog):
    (tmp_path / "pairs.csv").write_text(f"image,caption\nfolder/cat/0.png,cat\nfolder/dog/0.png,{'very ' * 15}old\n")
    data = ["--data.path", str(tmp_path / "pairs.csv"), "--data.image_root", str(tree)]
    assert main(arguments(limoe, tmp_path / "out.json", "--config", "retrieval_pairs", *data)) == 0
    assert "1 of 2 captions are longer than the model's context and are cut, such as 'very very" in caplog.text


def test_settings_made_in_python_are_checked():
    data = SourceConfig(type="emoji")
    with pytest.raises(ValueError, match=r"class_names must be str \| None, got \['a'\]; give one value, not a list"):
        EvaluationConfig(checkpoint="x", task="zero_shot", data=data, class_names=["a"])
    with pytest.raises(ValueError, match=r"features\.k must be list\[int\], got 10; write a list, as in \[10\]"):
        FeatureConfig(k=10)
    with pytest.raises(ValueError, match=r"capacity\.factors must be .*; write a list, as in \[0\.5\]"):
        CapacityConfig(factors=0.5)


def test_several_checkpoints_give_mean_and_spread(tree, classifier, tmp_path, capsys):
    torch.manual_seed(1)
    other = vmoe.create_model("vmoe_tiny_patch8_48", num_classes=2, embed_dim=32, **TINY)
    save_pretrained(other, tmp_path / "other" / "model.safetensors", extra={"class_names": ["cat", "dog"]})
    common = ["--task", "classification", *folder_arguments(tree), "--loader.num_workers", "0"]
    single = []
    for checkpoint in (classifier, tmp_path / "other"):
        assert main([*common, "--checkpoint", str(checkpoint), "--output", str(tmp_path / "out.json")]) == 0
        single.append(json.loads((tmp_path / "out.json").read_text()))
    both = f"[{classifier}, {tmp_path / 'other'}]"
    assert main([*common, "--checkpoint", both, "--output", str(tmp_path / "out.json")]) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    for name in ("top1", "ece"):
        values = [one["results"][name] for one in single]
        assert report["results"][name] == pytest.approx(np.mean(values))
        if values[0] != values[1]:
            assert report["spread"][name] == pytest.approx(np.std(values, ddof=1))
            assert f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}" in capsys.readouterr().out
    assert report["results"]["num_samples"] == 6
    assert [entry["results"] for entry in report["checkpoints"]] == [one["results"] for one in single]
    assert report["checkpoints"][0]["sha256"] != report["checkpoints"][1]["sha256"]
    assert report["data"] == single[0]["data"]


def test_several_checkpoints_are_one_ensemble(tree, classifier, tmp_path, capsys):
    torch.manual_seed(1)
    other = vmoe.create_model("vmoe_tiny_patch8_48", num_classes=2, embed_dim=32, weight_init="", **TINY)
    torch.nn.init.normal_(other.head.weight)
    save_pretrained(other, tmp_path / "other.safetensors", extra={"class_names": ["cat", "dog"]})
    checkpoints = [str(classifier), str(tmp_path / "other.safetensors")]
    words = ["--config", "classification_folder", *folder_arguments(tree), "--ensemble", "true"]
    ood = ["--ood_data.type", "image_folder", "--ood_data.path", str(tree / "folder")]  # the same: no difference
    output = tmp_path / "result.json"
    assert main([*arguments(json.dumps(checkpoints), output, *words, *ood)]) == 0
    report = json.loads(output.read_text())
    [entry] = report["checkpoints"]
    assert entry["checkpoint"] == checkpoints
    assert len(set(entry["sha256"])) == 2
    loaded = [load_model(checkpoint, "cpu") for checkpoint in checkpoints]
    files = [Image.open(file) for file in sorted((tree / "folder").glob("*/*.png"))]
    images, labels = torch.stack([loaded[0].transform(file) for file in files]), torch.tensor([0, 0, 0, 1, 1, 1])
    with torch.no_grad():
        mean = torch.stack([each.model(images).softmax(-1) for each in loaded]).mean(0)
    assert report["results"]["nll"] == pytest.approx(-mean[range(6), labels].log().mean().item(), abs=1e-4)
    assert report["results"]["top1"] == pytest.approx((mean.argmax(1) == labels).double().mean().item())
    assert report["results"]["diversity"] > 0
    assert (report["results"]["auroc"], report["results"]["fpr95"]) == (0.5, 1.0)
    assert (tmp_path / "result_confusion.csv").is_file()
    with pytest.raises(SystemExit):
        main(arguments(checkpoints[0], output, *words))
    assert "ensemble needs several checkpoints" in capsys.readouterr().err


def test_other_data_that_cannot_be_read_is_said_to_be(tree, classifier, tmp_path, capsys):
    others = tmp_path / "others" / "any"
    others.mkdir(parents=True)
    (others / "bad.png").write_bytes(b"no image")
    words = ["--config", "classification_folder", *folder_arguments(tree), "--loader.on_bad", "skip"]
    words += ["--ood_data.path", str(others.parent)]
    output = tmp_path / "result.json"
    with pytest.raises(SystemExit):
        main(arguments(classifier, output, *words))
    assert "ood_data needs a type: set ood_data.type" in capsys.readouterr().err
    words += ["--ood_data.type", "image_folder"]
    assert main(arguments(classifier, output, *words)) == 1
    assert "nothing to evaluate: the data set gave no sample (1 were skipped)" in capsys.readouterr().err
    (others / "good.png").write_bytes(next((tree / "folder").glob("*/*.png")).read_bytes())
    assert main(arguments(classifier, output, *words, "--loader.max_bad_share", "0.9")) == 0
    assert json.loads(output.read_text())["results"]["num_ood_skipped"] == 1


def test_unreadable_file_is_named_or_skipped(tree, classifier, tmp_path, capsys):
    for name in ("cat", "dog"):
        (tmp_path / "tree" / name).mkdir(parents=True)
        (tmp_path / "tree" / name / "good.png").write_bytes((tree / "folder" / name / "0.png").read_bytes())
    (tmp_path / "tree" / "cat" / "torn.png").write_bytes((tree / "folder" / "cat" / "1.png").read_bytes()[:300])
    argv = ["--task", "classification", "--data.type", "image_folder", "--data.path", str(tmp_path / "tree")]
    argv = arguments(classifier, tmp_path / "out.json", *argv)
    assert main(argv) == 1
    assert "torn.png" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()
    assert main([*argv, "--loader.on_bad", "skip"]) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["results"]["num_samples"] == 2
    assert report["results"]["num_skipped"] == 1
    assert report["checkpoints"][0]["details"]["skipped"][0].endswith("torn.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--task", "zero_shot"], "holds a classifier: use classification"),
        (["--class_names", "x.txt"], "class_names is for task zero_shot"),
        (["--templates", '["a {}"]'], "templates is for task zero_shot"),
        (["--capacity.factors", "[0.1]"], "capacity is for task capacity"),
        (["--features.shots", "[1]"], "features is for task few_shot"),
        (["--checkpoint", "[]"], "checkpoint must name at least one checkpoint"),
        (["--checkpoint", "[a, a]"], "checkpoint must name at least one checkpoint and none twice"),
        (["--data.image_root", "x"], "image_root is for pairs and karpathy, and type is 'image_folder'"),
        (["--output", "FOLDER"], "cannot be written: give another file"),
        (["--loader.on_bad", "replace"], "loader.on_bad must be 'fail' or 'skip'"),
        (["--loader.batchsize", "3"], "unknown key 'loader.batchsize'; the nearest known key is 'loader.batch_size'"),
        (["--precision", "half"], "precision must be"),
        (["--data.type", "pairs", "--data.path", "PAIRS"], "needs labels, and data of type 'pairs' has none"),
    ],
)
def test_settings_that_do_not_fit(tree, classifier, tmp_path, capsys, change, message):
    paths = {"PAIRS": str(tree / "pairs.csv"), "FOLDER": str(tree)}
    change = [paths.get(word, word) for word in change]
    argv = arguments(classifier, tmp_path / "out.json", "--task", "classification", *folder_arguments(tree), *change)
    try:
        code = main(argv)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_other_classes_than_trained_on(tree, classifier, tmp_path, capsys):
    for name in ("cat", "horse"):
        (tmp_path / "tree" / name).mkdir(parents=True)
        (tmp_path / "tree" / name / "0.png").write_bytes((tree / "folder" / "cat" / "0.png").read_bytes())
    argv = ["--task", "classification", "--data.type", "image_folder", "--data.path", str(tmp_path / "tree")]
    assert main(arguments(classifier, tmp_path / "out.json", *argv)) == 2
    assert "class 1 is 'dog'" in capsys.readouterr().err


def test_a_folder_stands_for_its_moving_average(tmp_path):
    for step in (9, 10):
        folder = tmp_path / "checkpoints" / f"step_{step:06d}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").touch()
        write_manifest(folder, {}, describe_files(folder, ["model.safetensors"]))
    last = tmp_path / "checkpoints" / "step_000010"
    assert find_weights(str(tmp_path)) == last / "model.safetensors"
    (last / "ema.safetensors").touch()
    write_manifest(last, {}, describe_files(last, ["model.safetensors", "ema.safetensors"]))
    assert find_weights(str(tmp_path)) == last / "ema.safetensors"
    assert find_weights(str(last)) == last / "ema.safetensors"
    assert find_weights(str(last / "model.safetensors")) == last / "model.safetensors"


def test_a_damaged_checkpoint_is_named_once(tree, classifier, tmp_path, caplog):
    for step in (1, 2):
        folder = tmp_path / "checkpoints" / f"step_{step:06d}"
        folder.mkdir(parents=True)
        shutil.copy(Path(classifier) / "model.safetensors", folder / "model.safetensors")
    whole = tmp_path / "checkpoints" / "step_000001"
    write_manifest(whole, {}, describe_files(whole, ["model.safetensors"]))
    argv = ["--task", "classification", *folder_arguments(tree)]
    assert main(arguments(tmp_path, tmp_path / "out.json", *argv)) == 0
    assert caplog.text.count("step_000002 is damaged (manifest.json is missing); step_000001 is used instead") == 1


@pytest.mark.parametrize("second", ["missing", "limoe"])
def test_a_wrong_checkpoint_among_several_is_found_first(tree, classifier, limoe, tmp_path, capsys, second):
    second = limoe if second == "limoe" else tmp_path / "missing"
    argv = ["--task", "classification", *folder_arguments(tree), "--checkpoint", f"[{classifier}, {second}]"]
    assert main([*argv, "--output", str(tmp_path / "out.json")]) != 0
    shown = capsys.readouterr()
    assert str(second) in shown.err
    assert "top1" not in shown.out


def test_outputs_of_another_classifier_do_not_stand_for_imagenet(tree, tmp_path, capsys):
    # ImageNet-A's classes are 200 outputs of a classifier of 1,000; this one has more, of other classes
    synsets = imagenet_synsets()
    for synset in [synsets[int(position)] for position in A_INDICES.read_text().split()]:
        (tmp_path / "tree" / synset).mkdir(parents=True)
        (tmp_path / "tree" / synset / "0.png").write_bytes((tree / "folder" / "cat" / "0.png").read_bytes())
    for number, message in ((1500, "has 1500 classes and ImageNet-1k, "), (1000, "class 0 is 'bird 0'")):
        model = vmoe.create_model("vmoe_tiny_patch8_48", num_classes=number, embed_dim=32, **TINY)
        names = [f"bird {position}" for position in range(number)]
        save_pretrained(model, tmp_path / "model.safetensors", extra={"class_names": names})
        argv = ["--config", "imagenet_a", "--data.path", str(tmp_path / "tree"), "--loader.num_workers", "0"]
        assert main(arguments(tmp_path / "model.safetensors", tmp_path / "out.json", *argv)) == 2
        assert message in capsys.readouterr().err


def test_names_that_are_not_utf8_are_written(tree, classifier, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "tree" / name).mkdir(parents=True)
        (tmp_path / "tree" / name / "0.png").write_bytes((tree / "folder" / name / "0.png").read_bytes())
    with open(bytes(tmp_path / "tree" / "cat") + b"/f\xff.png", "wb") as file:
        file.write(b"torn")
    argv = ["--task", "classification", "--data.type", "image_folder", "--data.path", str(tmp_path / "tree")]
    assert main(arguments(classifier, tmp_path / "out.json", *argv, "--loader.on_bad", "skip")) == 0
    [skipped] = json.loads((tmp_path / "out.json").read_text())["checkpoints"][0]["details"]["skipped"]
    assert skipped.endswith("f\udcff.png")


def test_default_output_differs_with_data_and_checkpoint(tmp_path):
    (tmp_path / "a").mkdir()
    sources = [
        SourceConfig("karpathy", "coco.json", split="test"),
        SourceConfig("karpathy", "coco.json", split="val"),
        SourceConfig("torchvision", "root", split="test", name="CIFAR10"),
        SourceConfig("torchvision", "root", split="test", name="FashionMNIST"),
        SourceConfig("image_folder", "."),
    ]
    checkpoints = [
        str(tmp_path / "a"),
        str(tmp_path / "a" / "ema.safetensors"),
        [str(tmp_path / "a"), str(tmp_path / "b")],
    ]
    files = [
        output_file(EvaluationConfig(checkpoint, "zero_shot", source))
        for checkpoint in checkpoints
        for source in sources
    ]
    assert len(set(files)) == len(files)
    assert all(file.parent == tmp_path / "a" for file in files)


def test_default_output_is_beside_the_checkpoint(tmp_path):
    config = EvaluationConfig(checkpoint=str(tmp_path), task="zero_shot")
    config.data = SourceConfig("emoji", split="held_out")
    assert output_file(config) == tmp_path / "evaluation_zero_shot_emoji_held_out.json"
    config.data = SourceConfig("pairs", "somewhere/val.csv")
    assert output_file(config) == tmp_path / "evaluation_zero_shot_pairs_val.json"
    config.checkpoint = str(tmp_path / "model.safetensors")
    assert output_file(config).parent == tmp_path


def test_results_of_other_settings_are_kept(tree, limoe, tmp_path):
    """Each setting has a file of its own; the same settings, whatever the batches, replace theirs."""
    checkpoint = shutil.copytree(limoe, tmp_path / "run")
    plain = ["--config", "zero_shot_folder", "--checkpoint", str(checkpoint), *folder_arguments(tree)]
    plain += ["--loader.num_workers", "0"]
    for more in [
        ["--templates", "a {}"],
        ["--templates", '["a {}", "the {}"]'],
        ["--templates", "a {}", "--experts", "int8"],
        ["--templates", "a {}", "--precision", "bf16"],
        ["--templates", "a {}", "--loader.on_bad", "skip"],
        ["--templates", "a {}", "--loader.batch_size", "2", "--device", "cpu"],  # the first again
    ]:
        assert main([*plain, *more]) == 0
    name = "evaluation_zero_shot_image_folder_folder"
    files = [checkpoint / f"{name}{number}.json" for number in ("", "_2", "_3", "_4", "_5")]
    assert sorted(checkpoint.glob("evaluation*")) == sorted(files)
    configs = [json.loads(file.read_text())["config"] for file in files]
    assert [config["templates"] for config in configs] == ["a {}", ["a {}", "the {}"], "a {}", "a {}", "a {}"]
    assert [config["experts"] for config in configs] == [None, None, "int8", None, None]
    assert configs[0]["loader"]["batch_size"] == 2
    files[0].write_text("not of an evaluation")
    assert main([*plain, "--templates", "a {}"]) == 0
    assert files[0].read_text() == "not of an evaluation"
    assert (checkpoint / f"{name}_6.json").exists()


def test_a_result_whose_name_no_file_can_have_is_refused(limoe):
    """And not searched for without end."""
    data = SourceConfig("image_folder", path="y" * 250)
    config = EvaluationConfig(checkpoint=str(limoe), task="zero_shot", data=data)
    assert len(output_file(config).name) > 255


@pytest.mark.parametrize("path", sorted((shipped_config_dirs()[0] / "eval").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_read(path):
    assert find_config(path.stem, "eval").samefile(path)
    more = [] if path.stem.startswith("emoji") else ["--data.path", "somewhere"]
    if path.stem == "few_shot_folder":
        more = ["--data.path", "somewhere", "--train_data.path", "elsewhere"]
    config = read_config(EvaluationConfig, ["--config", path.stem, "--checkpoint", "run", *more], folder="eval")
    assert config.checkpoint == "run"


def test_the_script_lists_every_setting(monkeypatch, capsys):
    script = str(shipped_config_dirs()[-1].parent / "eval.py")
    monkeypatch.setattr(sys, "argv", [script, "--help", "all"])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(script, run_name="__main__")
    assert done.value.code == 0
    shown = capsys.readouterr().out
    for key in ("--checkpoint", "--data.path", "--loader.on_bad", "--templates", "--precision", "--output"):
        assert key in shown
    assert "openai_imagenet" in shown


def test_a_classifier_without_class_names_on_numbered_folders(tmp_path, caplog):
    """Folders 0, 1, 10, 11, 2 are sorted as text: which output is which folder is said."""
    model = vmoe.create_model("vmoe_tiny_patch8_48", num_classes=12, embed_dim=32, **TINY)
    save_pretrained(model, tmp_path / "model.safetensors")
    for number in range(12):
        (tmp_path / "tree" / str(number)).mkdir(parents=True)
        Image.new("RGB", (48, 48)).save(tmp_path / "tree" / str(number) / "1.png")
    data = ["--task", "classification", "--data.type", "image_folder", "--data.path", str(tmp_path / "tree")]
    assert main(arguments(tmp_path, tmp_path / "out.json", *data)) == 0
    assert "label 0 is '0', 1 is '1', 2 is '10', 3 is '11', 4 is '2', ...; check that " in caplog.text
    assert "which holds no class names, has the same order" in caplog.text


def test_tables_of_the_classes_are_beside_a_given_output(tree, classifier, limoe, tmp_path):
    for checkpoint, config in ((classifier, "classification_folder"), (limoe, "zero_shot_folder")):
        output = tmp_path / f"{config}.json"
        assert main(arguments(checkpoint, output, "--config", config, *folder_arguments(tree))) == 0
        per_class = json.loads(output.read_text())["checkpoints"][0]["details"]["per_class"]
        lines = (tmp_path / f"{config}_per_class.csv").read_text().splitlines()
        assert [line.split(",")[0] for line in lines[1:]] == [entry["class"] for entry in per_class]
        matrix = [line.split(",")[1:] for line in (tmp_path / f"{config}_confusion.csv").read_text().splitlines()[1:]]
        assert [sum(map(int, row)) for row in matrix] == [entry["num_samples"] for entry in per_class]
        assert (tmp_path / f"{config}_confusion.png").is_file()
    shutil.copytree(classifier, tmp_path / "other")
    both = ["--checkpoint", f"[{classifier}, {tmp_path / 'other'}]", "--output", str(tmp_path / "two.json")]
    assert main([*both, "--config", "classification_folder", *folder_arguments(tree)]) == 0
    first, second = (tmp_path / f"two_{number}_confusion.csv" for number in (1, 2))
    assert first.read_text() == second.read_text()


def test_files_that_cannot_be_written_are_found_first(tree, classifier, tmp_path, capsys):
    (tmp_path / "dd_confusion.csv").mkdir()
    argv = ["--config", "classification_folder", *folder_arguments(tree)]
    assert main(arguments(classifier, tmp_path / "dd.json", *argv)) == 2
    shown = capsys.readouterr()
    assert "dd_confusion.csv, which belongs to it, cannot be written: give another file" in shown.err
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    sweep = arguments(classifier, tmp_path / "cc.json", "--task", "capacity", *folder_arguments(tree))
    (tmp_path / "cc.png").mkdir()
    assert main(sweep) == 2
    assert "cc.png, which belongs to it, cannot be written" in capsys.readouterr().err
    assert main(arguments("nowhere", tmp_path / "new" / "out.json", *argv)) == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cc.png", "dd_confusion.csv"]


def test_files_of_outputs_with_other_endings_do_not_meet(tree, classifier, tmp_path, capsys):
    argv = ["--config", "classification_folder", *folder_arguments(tree)]
    assert main(arguments(classifier, tmp_path / "new" / "res.v2", *argv)) == 0
    endings = ("", "_per_class.csv", "_confusion.csv", "_confusion.png", "_samples.csv")
    ours = {f"res.v2{ending}" for ending in endings}
    assert {file.name for file in (tmp_path / "new").iterdir()} == ours
    (tmp_path / "thesis.doc").touch()
    assert main(arguments(classifier, tmp_path / "thesis.doc", *argv)) == 2
    assert "thesis.doc is there and no .json file: give another file" in capsys.readouterr().err


def test_results_do_not_damage_a_checkpoint(tree, classifier, tmp_path, capsys):
    folder = tmp_path / "run" / "checkpoints" / "step_000001"
    folder.mkdir(parents=True)
    shutil.copy(Path(classifier) / "model.safetensors", folder)
    write_manifest(folder, {}, describe_files(folder, ["model.safetensors"]))
    (tmp_path / "run" / "best").symlink_to(Path("checkpoints", folder.name))
    argv = ["--config", "classification_folder", *folder_arguments(tree), "--checkpoint"]
    name = "evaluation_classification_image_folder_folder"
    for checkpoint, suffix in (
        (folder, "_step_000001"),
        (tmp_path / "run" / "best", "_best"),
        (folder / "model.safetensors", "_step_000001"),
    ):
        assert main([*argv, str(checkpoint)]) == 0
        assert (tmp_path / "run" / f"{name}{suffix}.json").is_file()
        assert find_problems(folder) == []
    for output in (folder / "out.json", tmp_path / "run" / "best" / "below" / "out.json"):
        assert main([*argv, str(folder), "--output", str(output)]) == 2
        assert "lies in a checkpoint, which another file would damage" in capsys.readouterr().err
    assert find_problems(folder) == []
