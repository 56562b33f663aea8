import json
import pickle
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import vmoe
from vmoe.cli.evaluate import run
from vmoe.data import BadSample, ImageDataset, LoaderConfig, Sample, SourceConfig
from vmoe.evaluation.config import EvaluationConfig, FeatureConfig
from vmoe.evaluation.features import extract_features, image_features
from vmoe.evaluation.loaded_model import load_model
from vmoe.models.factory import save_pretrained
from vmoe.utils.config import ConfigError

TINY = {"depth": 2, "num_heads": 2}
LOADER = LoaderConfig(batch_size=4, num_workers=0)


class RandomImages(ImageDataset):
    """Random images of two classes, of which one may be unreadable."""

    def __init__(self, count=10, seed=0, bad=None, shift=0):
        self.classes = ["cat", "dog"]
        self.bad, self.shift, self.read = bad, shift, 0
        generator = np.random.default_rng(seed)
        self.pixels = generator.integers(0, 255, (count, 40, 40, 3), dtype=np.uint8)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        self.read += 1
        if index == self.bad:
            raise BadSample(f"{index}.png", "torn")
        return Sample(Image.fromarray(self.pixels[index]), (index + self.shift) % 2, None, f"{index}.png")


def save(folder, name, seed=0, **kwargs):
    torch.manual_seed(seed)
    save_pretrained(vmoe.create_model(name, **TINY, **kwargs), folder / "model.safetensors")
    return folder


def make_classifier(folder, seed=0, **kwargs):
    return save(folder, "vmoe_tiny_patch8_48", seed, num_classes=2, embed_dim=32, **kwargs)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return load_model(str(make_classifier(tmp_path_factory.mktemp("classifier"))), "cpu")


@pytest.fixture(scope="module")
def limoe(tmp_path_factory):
    folder = save(tmp_path_factory.mktemp("limoe"), "limoe_tiny_patch8_48", width=32, embed_dim=16)
    return load_model(str(folder), "cpu")


def images_of(dataset, loaded):
    return torch.stack([loaded.transform(Image.fromarray(pixels)) for pixels in dataset.pixels])


def test_a_classifier_gives_what_its_last_layer_reads(classifier):
    dataset = RandomImages()
    features = extract_features(classifier, dataset, LOADER)
    with torch.no_grad():
        logits = classifier.model(images_of(dataset, classifier))
    assert features.features_ND.shape == (10, 32)
    assert features.features_ND.dtype == torch.float32
    assert torch.allclose(classifier.model.head(features.features_ND), logits, atol=1e-5)
    assert features.labels_N.tolist() == [0, 1] * 5
    assert features.index_N.tolist() == list(range(10))


def test_an_image_text_model_gives_embeddings_of_full_length(limoe):
    dataset = RandomImages()
    features = extract_features(limoe, dataset, LOADER)
    with torch.no_grad():
        expected = limoe.model.encode_image(images_of(dataset, limoe), normalize=False)
    assert torch.allclose(features.features_ND, expected, atol=1e-5)
    assert not torch.allclose(features.features_ND.norm(dim=1), torch.ones(10), atol=0.01)


def test_the_batch_size_does_not_matter(classifier):
    whole, *parts = (
        extract_features(classifier, RandomImages(), LoaderConfig(batch_size=size, num_workers=0))
        for size in (64, 1, 7)
    )
    for part in parts:
        assert torch.allclose(whole.features_ND, part.features_ND, atol=1e-5)
        assert whole.labels_N.equal(part.labels_N)


def test_a_model_without_pooling():
    model = vmoe.create_model("vmoe_tiny_patch8_48", num_classes=0, embed_dim=32, global_pool="", **TINY)
    with pytest.raises(ValueError, match=r"features must be \(batch, features\), got \(1, 37, 32\)"):
        image_features(model, torch.zeros(1, 3, 48, 48))


def test_data_without_classes_or_images(classifier):
    dataset = RandomImages()
    dataset.classes = None
    with pytest.raises(ValueError, match="has no classes"):
        extract_features(classifier, dataset, LOADER)
    with pytest.raises(ValueError, match="gave no sample"):
        extract_features(classifier, RandomImages(count=0), LOADER)


def test_features_that_are_not_finite(classifier, tmp_path):
    loaded = classifier._replace(model=load_model(classifier.checkpoint, "cpu").model)
    with torch.no_grad():
        loaded.model.patch_embed.proj.bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"those of 10 of 10 images hold NaN or infinity; precision is 'float32'"):
        extract_features(loaded, RandomImages(), LOADER, cache=tmp_path)
    assert not list(tmp_path.iterdir())


# --- the cache ---


def test_a_second_time_nothing_is_computed(classifier, tmp_path):
    dataset, skip = RandomImages(bad=3), LoaderConfig(batch_size=4, num_workers=0, on_bad="skip")
    first = extract_features(classifier, dataset, skip, cache=tmp_path)
    assert first.skipped_paths == ["3.png"]
    assert first.index_N.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    [file] = tmp_path.iterdir()  # nothing half-written stays behind
    read = dataset.read
    again = extract_features(classifier, dataset, replace(skip, batch_size=3), cache=tmp_path)
    assert dataset.read == read
    assert all(torch.equal(*pair) for pair in zip(again[:3], first[:3]))
    assert again.skipped_paths == first.skipped_paths
    with np.load(file) as content:
        key = json.loads(str(content["key"]))
    assert (key["data"], key["precision"]) == (dataset.fingerprint(), "float32")
    assert key["model"]["name"] == "vmoe_tiny_patch8_48"
    assert key["versions"]["torch"] == torch.__version__
    with pytest.raises(BadSample, match="torn"):
        extract_features(classifier, RandomImages(bad=3), LOADER, cache=tmp_path)


def other_weights(loaded, folder):
    return load_model(str(make_classifier(folder / "other", seed=1)), "cpu")


def other_size(loaded, folder):
    return load_model(str(make_classifier(folder / "other", img_size=64)), "cpu")


def other_transform(loaded, folder):
    transform = load_model(loaded.checkpoint, "cpu").transform
    transform.mean = transform.mean + 0.1
    return loaded._replace(transform=transform)


def other_precision(loaded, folder):
    return loaded._replace(precision="bf16")


def other_experts(loaded, folder):
    return load_model(loaded.checkpoint, "cpu", experts="int8")


def other_routing(loaded, folder):
    model = load_model(loaded.checkpoint, "cpu").model
    model.blocks[1].mlp.eval_capacity_factor = 0.1
    return loaded._replace(model=model)


@pytest.mark.parametrize(
    "change",
    [
        *(other_weights, other_size, other_transform, other_precision, other_experts, other_routing),
        *({"seed": 1}, {"shift": 1}, {"on_bad": "skip"}),
    ],
)
def test_something_else_is_not_taken_from_the_cache(classifier, tmp_path, change):
    cache = tmp_path / "cache"
    extract_features(classifier, RandomImages(), LOADER, cache=cache)
    loaded = change(classifier, tmp_path) if callable(change) else classifier
    changes = {} if callable(change) else dict(change)
    loader = replace(LOADER, on_bad=changes.pop("on_bad", None))
    kept = extract_features(loaded, RandomImages(**changes), loader, cache=cache)
    assert len(list(cache.iterdir())) == 2
    new = extract_features(loaded, RandomImages(**changes), loader)
    assert kept.features_ND.equal(new.features_ND)
    assert kept.labels_N.equal(new.labels_N)


def test_with_a_capacity_the_batch_size_is_part_of_the_key(tmp_path):
    loaded = load_model(str(make_classifier(tmp_path / "limited", eval_capacity_factor=0.2)), "cpu")
    for size in (2, 5):
        loader = LoaderConfig(batch_size=size, num_workers=0)
        kept = extract_features(loaded, RandomImages(), loader, cache=tmp_path / "cache")
        assert kept.features_ND.equal(extract_features(loaded, RandomImages(), loader).features_ND)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def set_in_directory(file, offset, value):
    """Changes a byte of the last entry of a zip file's directory."""
    content = bytearray(file.read_bytes())
    content[content.rindex(b"PK\x01\x02") + offset] = value
    file.write_bytes(content)


@pytest.mark.parametrize(
    "harm",
    [
        lambda file: set_in_directory(file, 6, 109),
        lambda file: set_in_directory(file, 8, 1),
        lambda file: file.write_bytes(file.read_bytes()[:-100]),
        lambda file: file.write_bytes(file.read_bytes()[:20]),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes().replace(array := np.arange(10).tobytes(), array[::-1])),
        lambda file: np.savez(file, features_ND=np.ones(2)),
        lambda file: file.write_bytes(pickle.dumps(ConfigError)),
    ],
    ids=["version of zip", "encrypted", "truncated", "header", "empty", "bit", "another", "pickle"],
)
def test_a_damaged_file_is_made_again(harm, classifier, tmp_path, caplog):
    expected = extract_features(classifier, RandomImages(), LOADER, cache=tmp_path)
    [file] = tmp_path.iterdir()
    harm(file)
    for warned in (True, False):
        caplog.clear()
        again = extract_features(classifier, RandomImages(), LOADER, cache=tmp_path)
        assert again.features_ND.equal(expected.features_ND)
        assert (f"{file} cannot be used" in caplog.text) is warned


def test_a_cache_that_cannot_be_written_to(classifier, tmp_path, monkeypatch, caplog):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(ConfigError, match=r"features.cache .*taken cannot be written to: give another folder, or null"):
        extract_features(classifier, RandomImages(), LOADER, cache=tmp_path / "taken")
    full = Mock(side_effect=OSError("No space left on device"))
    monkeypatch.setattr(np, "savez", full)
    assert len(extract_features(classifier, RandomImages(), LOADER, cache=tmp_path).labels_N) == 10
    assert "No space left on device): the features will be computed again" in caplog.text


# --- the tasks, from settings to metrics ---


def write_tree(root, classes=("cat", "dog"), count=12, seed=0):
    """Images whose brightness tells the class."""
    generator = np.random.default_rng(seed)
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 20, (48, 48, 3), dtype=np.uint8) + np.uint8(110 * number)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return SourceConfig("image_folder", str(root))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("trees")
    return write_tree(root / "train"), write_tree(root / "test", seed=1, count=5)


def evaluate(task, loaded, sources, tmp_path, **features):
    defaults = {"cache": None, "shots": [1, 3], "k": [1, 5], "l2_range": (1.0, 100.0)}
    features = FeatureConfig(**{**defaults, **features})
    train, test = sources
    output = str(tmp_path / "out.json")
    return run(EvaluationConfig(loaded.checkpoint, task, test, train, LOADER, features=features, output=output))


@pytest.mark.parametrize("kind", ["classifier", "limoe"])
def test_separable_classes_are_found_by_every_task(kind, sources, tmp_path, request):
    loaded = request.getfixturevalue(kind)
    results = evaluate("few_shot", loaded, sources, tmp_path)["results"]
    assert results["3shot"] == 1
    assert results["3shot_std"] == 0
    assert results["1shot"] > 0.7
    assert results["num_samples"] == 10
    results = evaluate("knn", loaded, sources, tmp_path)["results"]
    assert results["k1_top1"] == results["k5_top1"] == 1
    report = evaluate("linear_probe", loaded, sources, tmp_path)
    assert report["results"]["top1"] == 1
    details = report["checkpoints"][0]["details"]
    assert report["results"]["l2"] in [tried["l2"] for tried in details["val"]]
    assert details["num_train_samples"] == 24


def test_a_fixed_penalty_is_taken(classifier, sources, tmp_path):
    report = evaluate("linear_probe", classifier, sources, tmp_path, l2=3.0)
    assert report["results"]["l2"] == 3
    assert report["checkpoints"][0]["details"]["val"] is None
    results = evaluate("few_shot", classifier, sources, tmp_path, l2=3.0)["results"]
    assert results["1shot_l2"] == results["3shot_l2"] == 3


def test_the_folder_of_the_cache(classifier, sources, tmp_path, monkeypatch):
    monkeypatch.setenv("VMOE_CACHE", str(tmp_path / "cache"))
    evaluate("knn", classifier, sources, tmp_path, cache=None)
    assert not (tmp_path / "cache").exists()
    for setting, folder in (("auto", tmp_path / "cache" / "features"), (str(tmp_path / "here"), tmp_path / "here")):
        evaluate("knn", classifier, sources, tmp_path, cache=setting)
        assert len(list(folder.iterdir())) == 2


def test_classes_that_do_not_belong_together(classifier, sources, tmp_path):
    train = write_tree(tmp_path / "train", ("cat", "eel", "fox"), count=2)
    with pytest.raises(ConfigError, match="data has 2 classes and train_data 3; .* only one of them has 'dog', 'eel'"):
        evaluate("knn", classifier, (train, sources[1]), tmp_path)
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("image,caption\na.png,a\n")
    with pytest.raises(ConfigError, match="train_data has no classes"):
        evaluate("knn", classifier, (SourceConfig("pairs", str(pairs)), sources[1]), tmp_path)


def test_a_class_without_a_training_example(classifier, sources, tmp_path):
    train = write_tree(tmp_path / "train", count=3)
    for file in (tmp_path / "train" / "dog").iterdir():
        file.write_bytes(b"torn")
    loader, features = replace(LOADER, on_bad="skip"), FeatureConfig(k=[1], cache=None)
    config = EvaluationConfig(classifier.checkpoint, "knn", sources[1], train, loader, features=features)
    with pytest.raises(ValueError, match=r"1 of the classes that are tested have no .*, among them 'dog'"):
        run(config)
