import statistics
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from vmoe.data import SourceConfig
from vmoe.evaluation import few_shot as module
from vmoe.evaluation.config import EvaluationConfig, FeatureConfig
from vmoe.evaluation.features import Features
from vmoe.evaluation.few_shot import best_penalty, few_shot, few_shot_accuracy
from vmoe.utils.config import ConfigError


@pytest.fixture
def blobs():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat(30)
    features = torch.randn(120, 16, generator=generator) + 3 * torch.eye(16)[labels]
    return features[:80], labels[:80], features[80:], labels[80:]


def test_separable_classes_are_found(blobs):
    accuracy = few_shot_accuracy(*blobs, shots=[1, 10], l2_penalties=[1.0, 100.0], num_classes=4)
    assert set(accuracy) == {(1, 1.0), (1, 100.0), (10, 1.0), (10, 100.0)}
    assert accuracy[10, 100.0] > 0.85
    assert accuracy[10, 100.0] > accuracy[1, 100.0]


@pytest.mark.parametrize("shot", [2, 20])  # fewer rows than features, and more
def test_it_is_the_regularised_least_squares_solution(blobs, shot):
    train, labels, test, test_labels = blobs
    rows = torch.cat([(labels == label).nonzero().flatten()[:shot] for label in range(4)])
    x = train[rows].double()
    mean, std = x.mean(0), x.std(0, correction=0) + 1e-5
    x, t = (torch.cat([(v - mean) / std, torch.full((len(v), 1), 100.0)], 1) for v in (x, test.double()))
    y = 2 * torch.nn.functional.one_hot(labels[rows], 4).double() - 1
    weight = torch.linalg.solve(x.T @ x + 2.0 * torch.eye(x.shape[1]), x.T @ y)
    expected = ((t @ weight).argmax(1) == test_labels).double().mean().item()
    assert few_shot_accuracy(*blobs, shots=[shot], l2_penalties=[2.0], num_classes=4)[shot, 2.0] == pytest.approx(
        expected
    )


def test_generator_chooses_the_examples(blobs):
    def run(generator):
        return few_shot_accuracy(*blobs, [1], [1.0], 4, generator)[1, 1.0]

    drawn = {run(torch.Generator().manual_seed(seed)) for seed in range(8)}
    assert len(drawn) > 1
    assert run(torch.Generator().manual_seed(3)) == run(torch.Generator().manual_seed(3))


def test_best_penalty_ranks_over_all_data_sets():
    results = [{(1, 1.0): 0.9, (1, 2.0): 0.8, (1, 4.0): 0.1}, {(1, 1.0): 0.1, (1, 2.0): 0.8, (1, 4.0): 0.7}]
    assert best_penalty(results, 1) == 2.0


# --- the task ---

CLASSES = ["ant", "bee", "cat", "dog"]
PENALTIES = FeatureConfig().l2_penalties
FOLDERS = [SourceConfig("image_folder", name) for name in ("train", "test")]


def make_features(seed, count, labels=None):
    """Two of 16 features tell the class, and faintly."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4 if labels is None else labels
    features = torch.randn(len(labels), 16, generator=generator) + torch.eye(16)[labels]
    return Features(features, labels, torch.arange(len(labels)), [])


@pytest.fixture
def made_up(monkeypatch):
    """[training, test] features; no model and no image is read."""
    pair = [make_features(0, 80), make_features(1, 200)]
    monkeypatch.setattr(module, "fit_and_test_features", lambda *_: pair)
    return pair


def run_task(console=None, label_sets=None, model=None, **features):
    features = FeatureConfig(**{"shots": [1, 5], "l2_penalties": PENALTIES, **features})
    config = EvaluationConfig("x", "few_shot", FOLDERS[1], FOLDERS[0], features=features)
    loaded = SimpleNamespace(model=model, device=torch.device("cpu"))
    dataset = SimpleNamespace(classes=CLASSES, label_sets=label_sets)
    return few_shot(config, loaded, dataset, console or Console(quiet=True))


def test_one_penalty_for_all_seeds(made_up):
    outcome = run_task(seeds=[3, 7])
    rows = [tensor for part in made_up for tensor in (part.features_ND, part.labels_N)]
    curves = [few_shot_accuracy(*rows, [1, 5], PENALTIES, 4, torch.Generator().manual_seed(seed)) for seed in (3, 7)]
    for shot in (1, 5):
        rank = dict.fromkeys(PENALTIES, 0)
        for accuracy in curves:
            for position, penalty in enumerate(sorted(PENALTIES, key=lambda penalty: accuracy[shot, penalty])):
                rank[penalty] += position
        best = max(PENALTIES, key=rank.get)
        assert outcome.results[f"{shot}shot_l2"] == best
        values = [accuracy[shot, best] for accuracy in curves]
        assert outcome.results[f"{shot}shot"] == pytest.approx(statistics.fmean(values))
        assert outcome.results[f"{shot}shot_std"] == pytest.approx(statistics.stdev(values))
    assert outcome.results["num_samples"] == 200
    assert len(outcome.details["accuracy"]) == 2 * 2 * len(PENALTIES)
    first = {"seed": 3, "shots": 1, "l2": PENALTIES[0], "accuracy": curves[0][1, PENALTIES[0]]}
    assert outcome.details["accuracy"][0] == first


def test_embeddings_are_scaled_to_length_one(made_up):
    def scaled(factor):
        train = made_up[0]
        factors = torch.linspace(1, factor, len(train.features_ND))[:, None]
        made_up[0] = train._replace(features_ND=train.features_ND * factors)
        return run_task(model=model).details

    model = SimpleNamespace(encode_image=None, encode_text=None)  # what makes a model contrastive
    assert scaled(1.0) == scaled(50.0)
    model = None
    assert scaled(1.0) != scaled(50.0)


def test_a_class_with_few_examples_gives_all_with_a_message(made_up, capsys):
    labels = torch.tensor([0] * 9 + [1] * 9 + [2] * 3 + [3] * 9)
    made_up[0] = make_features(0, 0, labels)
    outcome = run_task(Console(width=200))
    assert outcome.details["short_classes"] == {"cat": 3}
    assert (
        "train_data: 1 of 4 classes have fewer than 5 examples, and give all that they have" in capsys.readouterr().out
    )


def test_several_right_labels_per_image(made_up):
    with pytest.raises(ConfigError, match="data: task 'few_shot' needs one right label per image"):
        run_task(label_sets=[(0, 1)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shots": [0]}, "shots must be >= 1, each once"),
        ({"shots": [5, 5]}, "shots must be >= 1, each once"),
        ({"seeds": []}, r"seeds must be >= 0, each once, got \[\]"),
        ({"l2": 0.0}, r"l2 must be > 0 and finite, got 0.0"),
        ({"l2_penalties": [1.0, float("inf")]}, "l2_penalties must be > 0 and finite"),
        ({"l2_range": (10.0, 1.0)}, "l2_range must be the least and the greatest"),
        ({"val_share": 1.0}, "val_share must be between 0 and 1"),
        ({"temperature": 0.0}, "temperature must be > 0"),
    ],
    ids=str,
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        FeatureConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "knn"}, "task 'knn' needs train_data"),
        ({"task": "few_shot", "train_data": SourceConfig()}, "needs train_data"),
        ({"task": "few_shot", "train_data": FOLDERS[1]}, "train_data and data are the same"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(ConfigError, match=message):
        EvaluationConfig("x", data=FOLDERS[1], **settings)
