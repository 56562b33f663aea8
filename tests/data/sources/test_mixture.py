"""Several data sets as one."""

import pytest
import torch

from tests.data.conftest import PREPROCESS, Images, tokenize
from vmoe.data import AugmentationConfig, LoaderConfig, SourceConfig, build_dataset, build_transform, train_loader
from vmoe.data.sources.mixture import Mixture
from vmoe.training.config import Config
from vmoe.utils.config import ConfigError, read_config


def loader(sizes=(30, 10), weights=(3.0, 1.0), part=None, **settings):
    dataset = Mixture([Images(size) for size in sizes], weights)
    config = LoaderConfig(batch_size=8, num_workers=0)
    transform = build_transform(PREPROCESS, AugmentationConfig(scale=(0.2, 1.0), color_jitter=0.4))
    return train_loader(dataset, transform, tokenize, config, 5, part=part)


def test_shares_of_a_batch_and_an_exact_position():
    whole = loader()
    batches = [next(whole) for _ in range(12)]
    for batch in batches:
        assert (batch["index"] < 30).sum() == 6
    second = [loader(part=(rank, 2)) for rank in range(2)]
    for one in second:
        one.load_state_dict(whole.state_dict() | {"step": 7})
    for batch in batches[7:]:
        halves = [next(one) for one in second]
        for name in batch:
            assert torch.equal(torch.cat([half[name] for half in halves]), batch[name])


def test_a_repeated_sample_is_augmented_anew():
    batches = loader(sizes=(30, 2), weights=(1.0, 1.0))
    seen = {}
    for _ in range(3):
        batch = next(batches)
        for index, image in zip(batch["index"].tolist(), batch["image"]):
            assert not any(torch.equal(image, other) for other in seen.setdefault(index, []))
            seen[index].append(image)
    assert len(seen[30]) >= 5


def test_samples_captions_and_classes():
    dataset = Mixture([Images(3), Images(2)])
    assert len(dataset) == 5
    assert dataset[4].caption == "image number 1"
    assert dataset.classes == ("even", "odd")
    assert dataset.weights == [3, 2]
    other = Images(2)
    other.classes = ("left", "right")
    mixed = Mixture([Images(3), other])
    assert mixed.classes is None
    assert mixed[0].label is None
    other.has_captions = False
    with pytest.raises(ValueError, match="must all have captions, or all the same classes"):
        Mixture([Images(3), other])


def test_from_a_config(tmp_path):
    (tmp_path / "a.csv").write_text("image,caption\na.png,one\nb.png,two\n")
    text = f"""
task: contrastive
output_dir: {tmp_path}
data:
  train:
    type: mixture
    sources:
      - {{type: pairs, path: {tmp_path}/a.csv, weight: 2}}
      - {{type: emoji, split: held_out, weight: 0.5}}
"""
    (tmp_path / "c.yaml").write_text(text)
    source = read_config(Config, ["--config", str(tmp_path / "c.yaml")]).data.train
    assert [type(one) for one in source.sources] == [SourceConfig] * 2
    dataset = build_dataset(source)
    assert (len(dataset), dataset.weights) == (402, [2.0, 0.5])
    for old, new, message in [
        ("path: {}/a.csv", "pth: x", r"unknown key 'data.train.sources\[0\].pth'"),
        ("weight: 2", "weight: x", "data.train.sources"),
        ("weight: 2", "weight: -1", "weight must be > 0, got -1"),
        (", weight: 2", "", "weight must be set for all sources of a mixture or for none; 'pairs' .*a.csv has none"),
        ("type: pairs, path", "type: mixture, path", "type 'mixture' needs sources"),
        ("type: pairs, path: {}/a.csv", "path: x", r"sources\[0\]: type must be that of a plain data set, got None"),
        ("type: emoji, split: held_out", "type: emoji, split: x", "split of data source 'emoji'"),
    ]:
        (tmp_path / "c.yaml").write_text(text.replace(old.format(tmp_path), new))
        with pytest.raises(ConfigError, match=message) as caught:
            read_config(Config, ["--config", str(tmp_path / "c.yaml")])
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="needs sources"):
        SourceConfig("mixture")
    with pytest.raises(ValueError, match="sources is for mixture, and type is 'pairs'"):
        SourceConfig("pairs", "x", sources=[SourceConfig("emoji")])
