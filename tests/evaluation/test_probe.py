from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from vmoe.data import SourceConfig
from vmoe.evaluation import probe as module
from vmoe.evaluation.config import EvaluationConfig, FeatureConfig
from vmoe.evaluation.features import Features
from vmoe.evaluation.probe import choose_penalty, fit_linear_probe, knn, linear_probe, nearest_neighbours


def blobs(count, classes=5, width=12, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    return torch.randn(count, width, generator=generator) + spread * torch.eye(width)[labels], labels


# --- logistic regression ---


@pytest.mark.parametrize("penalty", [0.01, 1.0, 100.0])
def test_it_is_scikit_learns_solution(penalty):
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels = blobs(200)
    expected = linear_model.LogisticRegression(C=1 / penalty, tol=1e-10, solver="newton-cholesky")
    expected.fit(features.double().numpy(), labels.numpy())
    far = 30 * features + torch.linspace(-200, 500, 12)  # the same problem, far from mean 0 and deviation 1
    for x, scale in ((features, 1), (far, 30)):
        probe = fit_linear_probe(x, labels, penalty * scale**2)
        assert probe.converged
        assert probe.weight_DC.dtype == torch.float64
        np.testing.assert_allclose(scale * probe.weight_DC.numpy(), expected.coef_.T, atol=2e-4)
        probabilities = probe.scores(x).softmax(1).numpy()
        np.testing.assert_allclose(probabilities, expected.predict_proba(features.double().numpy()), atol=2e-4)


@pytest.mark.parametrize("penalty", [1e-6, 1e-3])
def test_a_small_penalty_on_classes_that_a_plane_parts(penalty):
    """The loss goes to nearly zero there, long before the weights are right."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels = blobs(200, spread=8.0)
    expected = linear_model.LogisticRegression(C=1 / penalty, tol=1e-12, solver="newton-cholesky", max_iter=1000)
    expected.fit(features.double().numpy(), labels.numpy())
    probe = fit_linear_probe(features, labels, penalty)
    assert probe.converged
    error = np.abs(probe.weight_DC.numpy() - expected.coef_.T).max()
    assert error < 1e-3 * np.abs(expected.coef_).max()


@pytest.mark.parametrize("limit", ["MAX_ITERATIONS", "evaluations"])
def test_a_probe_that_ends_early_has_not_converged(limit, monkeypatch):
    features, labels = blobs(200, spread=8.0)
    if limit == "MAX_ITERATIONS":
        monkeypatch.setattr(module, limit, 4)
    else:  # L-BFGS has other reasons to end than its number of iterations
        own = torch.optim.LBFGS
        monkeypatch.setattr(torch.optim, "LBFGS", lambda *args, **kwargs: own(*args, **kwargs | {"max_eval": 5}))
    assert not fit_linear_probe(features, labels, 1e-3).converged


def test_features_that_depend_on_each_other_are_fitted():
    features, labels = blobs(200)
    features = torch.cat([features, features[:, :3] + 1e-6 * features[:, 3:6], torch.full((200, 2), 7.0)], dim=1)
    probe = fit_linear_probe(features, labels, 1.0)
    assert probe.converged
    assert probe.weight_DC[-2:].abs().max() < 1e-6  # the constant ones say nothing that the bias does not
    assert torch.allclose(probe.weight_DC[:3], probe.weight_DC[12:15], atol=1e-3)


def test_it_is_the_minimum():
    features, labels = blobs(60)
    probe = fit_linear_probe(features, labels, 2.0)

    def loss(weight, bias):
        scores = features.double() @ weight + bias
        return torch.nn.functional.cross_entropy(scores, labels, reduction="sum") + weight.square().sum()

    weight, bias = probe.weight_DC.requires_grad_(), probe.bias_C.requires_grad_()
    loss(weight, bias).backward()
    assert weight.grad.abs().max() < 60 * 1e-4  # of the sum; the mean's is 60 times less
    assert bias.grad.abs().max() < 60 * 1e-4


def test_the_start_and_the_blocks_do_not_matter(monkeypatch):
    features, labels = blobs(200)
    cold = fit_linear_probe(features, labels, 1.0)
    warm = fit_linear_probe(features, labels, 1.0, start=fit_linear_probe(features, labels, 50.0))
    monkeypatch.setattr(module, "PROBE_BLOCK", 33)
    blocks = fit_linear_probe(features, labels, 1.0)
    for other in (warm, blocks):
        assert torch.allclose(other.scores(features), cold.scores(features), atol=1e-3)


def test_it_works_without_gradients_and_leaves_features_alone():
    features, labels = blobs(40)
    before = features.clone()
    with torch.no_grad():
        probe = fit_linear_probe(features, labels, 1.0)
    assert (probe.scores(features).argmax(1) == labels).double().mean() > 0.5
    assert features.equal(before)
    assert not probe.weight_DC.requires_grad


def test_labels_may_have_gaps():
    features, labels = blobs(40, classes=2)
    probe = fit_linear_probe(features, 3 * labels + 1, 1.0)
    assert probe.classes_C.tolist() == [1, 4]
    assert probe.scores(features).shape == (40, 2)


def test_what_cannot_be_fitted():
    features, labels = blobs(10)
    with pytest.raises(ValueError, match="the penalty must be > 0, got 0"):
        fit_linear_probe(features, labels, 0.0)
    with pytest.raises(ValueError, match="two classes or more, and the training data have 1"):
        fit_linear_probe(features, torch.zeros(10, dtype=torch.long), 1.0)


def test_features_that_are_all_equal_tell_nothing():
    probe = fit_linear_probe(torch.ones(9, 3), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1]), 1.0)
    probability = probe.scores(torch.ones(1, 3)).softmax(1)[0]
    assert probability.tolist() == pytest.approx([4 / 9, 5 / 9], abs=1e-4)


# --- the choice of the penalty ---


def test_the_search_ends_at_eighths_of_a_decade_around_the_best():
    features, labels = blobs(300, spread=1.5)
    penalty, tried = choose_penalty(features, labels, (1e-6, 1e6), 0.3)
    exponents = sorted(round(8 * np.log10(value)) for value in tried)
    assert {-48, -32, -16, 0, 16, 32, 48} < set(exponents)
    assert len(tried) <= 7 + 4 * 2
    best = round(8 * np.log10(penalty))
    assert {best - 1, best + 1} <= set(exponents) | {49, -49}
    assert tried[penalty] == max(tried.values())
    assert penalty == max(value for value in tried if tried[value] == tried[penalty])
    assert choose_penalty(features, labels, (1e-6, 1e6), 0.3) == (penalty, tried)


def test_noise_wants_a_strong_penalty():
    """One feature of 60 tells the class; the others only invite the probe to learn the examples by heart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % 2
    features = torch.randn(80, 60, generator=generator)
    features[:, 0] += 3 * labels
    penalty, tried = choose_penalty(features, labels, (1e-1, 1e4), 0.3)
    assert penalty > 1
    assert tried[penalty] > tried[min(tried)]


@pytest.mark.parametrize("ends", [(3.0, 700.0), (0.07, 0.08), (2.0, 2.0), (1e-6, 1e6)])
def test_the_ends_of_the_range_are_tried_as_given(ends):
    features, labels = blobs(100)
    penalty, tried = choose_penalty(features, labels, ends, 0.3)
    assert (min(tried), max(tried)) == ends
    assert penalty in tried


def test_nothing_to_hold_back():
    features, _ = blobs(4)
    with pytest.raises(ValueError, match=r"val_share 0.2 .* leaves nothing to choose a penalty on.*set features.l2"):
        choose_penalty(features, torch.arange(4), (1e-6, 1e6), 0.2)


def test_every_class_keeps_an_example_and_gives_its_share():
    labels = torch.tensor([0] * 10 + [1] * 2 + [2] + [3] * 100)
    held = module._held_out(labels, 0.5)
    assert labels[held].bincount(minlength=4).tolist() == [5, 1, 0, 50]
    assert module._held_out(labels, 0.9)[labels == 1].sum() == 1


# --- nearest neighbours ---


@pytest.mark.parametrize("queries", [512, 5, 1])
def test_it_is_scikit_learns_vote(queries, monkeypatch, made_up):
    neighbors = pytest.importorskip("sklearn.neighbors")
    monkeypatch.setattr(module, "QUERY_BLOCK", queries)
    results = run_task(knn, k=[1, 4, 20]).results
    train, test = made_up
    for k in (1, 4, 20):
        vote = neighbors.KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
        ).fit(train.features_ND.double().numpy(), train.labels_N.numpy())
        predicted = vote.predict_proba(test.features_ND.double().numpy())
        best = np.argsort(-predicted, axis=1, kind="stable")
        right = test.labels_N.numpy()
        assert results[f"k{k}_top1"] == pytest.approx((best[:, 0] == right).mean())
        voted = predicted[np.arange(len(right)), right] > 0
        assert results[f"k{k}_top5"] == pytest.approx(((best[:, :5] == right[:, None]).any(1) & voted).mean())


def test_the_nearest_rows_in_order():
    rows = torch.tensor([[1.0, 0.0], [0.0, 3.0], [2.0, 2.0], [-1.0, 0.0], [5.0, 0.0]])
    cosine, row = nearest_neighbours(torch.tensor([[2.0, 0.0], [0.0, -1.0]]), rows, 5)
    assert row.tolist() == [[0, 4, 2, 1, 3], [0, 3, 4, 2, 1]]  # equal cosines: the earlier row
    assert cosine[0].tolist() == pytest.approx([1, 1, 0.5**0.5, 0, -1], abs=1e-6)
    assert cosine[1].tolist() == pytest.approx([0, 0, 0, -(0.5**0.5), -1], abs=1e-6)


def test_votes_are_weighted(made_up):
    """Two far neighbours against a near one: at a low temperature the near one wins, at a high one the two."""
    train = Features(torch.tensor([[1.0, 0.1], [1.0, 1.0], [1.0, 1.1]]), torch.tensor([0, 1, 1]), torch.arange(3), [])
    test = Features(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), torch.arange(1), [])
    made_up[:] = [train, test]
    assert run_task(knn, k=[3], temperature=0.07).results["k3_top1"] == 1
    assert run_task(knn, k=[3], temperature=10.0).results["k3_top1"] == 0
    assert run_task(knn, k=[3], temperature=1e-4).results["k3_top1"] == 1  # no overflow


@pytest.mark.parametrize("k", [0, 6])
def test_more_neighbours_than_rows(k):
    with pytest.raises(ValueError, match=rf"features.k must be in 1\.\.5, the number of training images, got {k}"):
        nearest_neighbours(torch.ones(2, 3), torch.ones(5, 3), k)


# --- the tasks ---


@pytest.fixture
def made_up(monkeypatch):
    """[training, test] features; no model and no image is read."""
    pair = [
        Features(*blobs(120, classes=8, spread=2.0), torch.arange(120), ["torn.jpg"]),
        Features(*blobs(64, classes=8, spread=2.0, seed=1), torch.arange(64), []),
    ]
    monkeypatch.setattr(module, "fit_and_test_features", lambda *_: pair)
    return pair


def run_task(task, classes=8, label_sets=None, console=None, **features):
    data = [SourceConfig("image_folder", name) for name in ("test", "train")]
    config = EvaluationConfig("x", task.__name__, *data, features=FeatureConfig(**features))
    loaded = SimpleNamespace(device=torch.device("cpu"))
    dataset = SimpleNamespace(classes=[str(label) for label in range(classes)], label_sets=label_sets)
    return task(config, loaded, dataset, console or Console(quiet=True))


@pytest.mark.parametrize("task", [linear_probe, knn])
def test_there_is_no_top5_of_five_classes(task, made_up):
    made_up[:] = [Features(*blobs(60, classes=5, spread=2.0, seed=seed), torch.arange(60), []) for seed in (0, 1)]
    names = set(run_task(task, classes=5, k=[3]).results if task is knn else run_task(task, classes=5, l2=1.0).results)
    assert any(name.endswith("top1") for name in names)
    assert not any(name.endswith("top5") for name in names)


def test_the_probe_is_fitted_again_on_all_training_data(made_up):
    outcome = run_task(linear_probe, l2_range=(0.1, 100.0))
    train, test = made_up
    penalty, tried = choose_penalty(train.features_ND, train.labels_N, (0.1, 100.0), 0.2)
    scores = fit_linear_probe(train.features_ND, train.labels_N, penalty).scores(test.features_ND)
    best = scores.argsort(descending=True)
    assert outcome.results == {
        "top1": pytest.approx((best[:, 0] == test.labels_N).double().mean().item()),
        "top5": pytest.approx((best[:, :5] == test.labels_N[:, None]).any(1).double().mean().item()),
        "mean_per_class": pytest.approx((best[:, 0] == test.labels_N).double().mean().item()),  # 8 of each class
        "l2": penalty,
        "num_samples": 64,
        "num_skipped": 0,
    }
    assert 0.5 < outcome.results["top1"] < outcome.results["top5"]
    assert outcome.details["val"] == [{"l2": value, "top1": tried[value]} for value in sorted(tried)]
    assert outcome.details["skipped"] == ["torn.jpg"]
    assert outcome.details["converged"]


def test_blocks_of_test_rows_do_not_matter(made_up, monkeypatch):
    whole = run_task(linear_probe, l2=1.0)
    monkeypatch.setattr(module, "PROBE_BLOCK", 7)
    assert run_task(linear_probe, l2=1.0).results == whole.results


def test_a_probe_that_does_not_converge_is_reported(made_up, monkeypatch, capsys):
    monkeypatch.setattr(module, "MAX_ITERATIONS", 2)
    outcome = run_task(linear_probe, l2=1e-3, console=Console(width=200))
    assert not outcome.details["converged"]
    assert "the linear probe did not converge with features.l2 0.001" in capsys.readouterr().out


@pytest.mark.parametrize(("task", "metric"), [(linear_probe, "top1"), (knn, "k5_top1")])
def test_any_of_several_right_labels_is_a_hit(task, metric, made_up):
    settings = {"l2": 1.0, "k": [5]}
    assert 0 < run_task(task, **settings).results[metric] < 1
    every = [tuple(range(8))] * 64
    assert run_task(task, label_sets=every, **settings).results[metric] == 1


def test_a_class_of_neither_part_is_no_trouble(made_up):
    plain = [run_task(linear_probe, l2=1.0).results, run_task(knn, k=[5]).results]
    more = [run_task(linear_probe, classes=9, l2=1.0).results, run_task(knn, classes=9, k=[5]).results]
    assert plain == more
