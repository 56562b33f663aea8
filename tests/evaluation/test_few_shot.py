import math

import pytest
import torch

from vmoe.evaluation.few_shot import best_penalty, few_shot_accuracy


@pytest.fixture
def blobs():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat(30)
    features = torch.randn(120, 16, generator=generator) + 3 * torch.eye(16)[labels]
    return features[:80], labels[:80], features[80:], labels[80:]


def test_separable_classes_are_found(blobs):
    accuracy = few_shot_accuracy(*blobs, shots=[1, 10], l2_penalties=[1.0, 100.0])
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
    assert few_shot_accuracy(*blobs, shots=[shot], l2_penalties=[2.0])[shot, 2.0] == pytest.approx(expected)


def test_generator_chooses_the_examples(blobs):
    def run(generator):
        return few_shot_accuracy(*blobs, shots=[1], l2_penalties=[1.0], generator=generator)[1, 1.0]

    drawn = {run(torch.Generator().manual_seed(seed)) for seed in range(8)}
    assert len(drawn) > 1
    assert run(torch.Generator().manual_seed(3)) == run(torch.Generator().manual_seed(3))


def test_best_penalty_ranks_over_all_data_sets():
    results = [{(1, 1.0): 0.9, (1, 2.0): 0.8, (1, 4.0): 0.1}, {(1, 1.0): 0.1, (1, 2.0): 0.8, (1, 4.0): 0.7}]
    assert best_penalty(results, 1) == 2.0


@pytest.mark.parametrize(
    "change",
    [{"shots": [0]}, {"shots": []}, {"l2_penalties": [0.0]}, {"l2_penalties": []}, {"l2_penalties": [math.nan]}],
    ids=str,
)
def test_numbers_out_of_range(blobs, change):
    with pytest.raises(ValueError, match="shots must be >= 1 and l2_penalties > 0"):
        few_shot_accuracy(*blobs, **change)


def test_nothing_to_test(blobs):
    with pytest.raises(ValueError, match="got none"):
        few_shot_accuracy(*blobs[:2], blobs[2][:0], blobs[3][:0])


def with_entry(tensor, value):
    changed = tensor.clone()
    changed[3] = value
    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y, t, z: (x, y[:-1], t, z), r"train features and labels .* got \(80, 16\) and \(79,\)"),
        (lambda x, y, t, z: (x, y, t, z[:1]), r"test features and labels .* got \(40, 16\) and \(1,\)"),
        (lambda x, y, t, z: (x[:, 0], y, t, z), r"train features and labels .* got \(80,\)"),
        (lambda x, y, t, z: (x, y, t[:, :4], z), "equally many features, got 16 and 4"),
        (lambda x, y, t, z: (with_entry(x, math.nan), y, t, z), "train features must be finite, 1 of 80 rows"),
        (lambda x, y, t, z: (x, y, with_entry(t, math.inf), z), "test features must be finite, 1 of 40 rows"),
        (lambda x, y, t, z: (x, with_entry(y, -1), t, z), r"train labels .* in 0\.\.C-1, got torch.int64 from -1 to 3"),
        (lambda x, y, t, z: (x, y.float(), t, z), "train labels must be whole numbers .* torch.float32"),
        (lambda x, y, t, z: (x, y, t, with_entry(z, 4)), r"test labels .* in 0\.\.3, got torch.int64 from 0 to 4"),
    ],
)
def test_input_that_does_not_belong_together(blobs, change, message):
    with pytest.raises(ValueError, match=message):
        few_shot_accuracy(*change(*blobs), shots=[1], l2_penalties=[1.0])


@pytest.mark.parametrize(
    ("num_classes", "message"), [(0, "num_classes must be >= 1"), (3, r"train labels .* in 0\.\.2")]
)
def test_number_of_classes_out_of_range(blobs, num_classes, message):
    with pytest.raises(ValueError, match=message):
        few_shot_accuracy(*blobs, shots=[1], l2_penalties=[1.0], num_classes=num_classes)


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([], "with 1 examples per class, there are none"),
        ([{(5, 1.0): 0.5}], "with 1 examples per class, there are none"),
        ([{(1, 1.0): 0.5}, {(1, 2.0): 0.5}], "the same shots and penalties"),
    ],
)
def test_no_best_penalty(results, message):
    with pytest.raises(ValueError, match=message):
        best_penalty(results, 1)
