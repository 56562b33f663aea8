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
    "change", [{"shots": [0]}, {"shots": []}, {"l2_penalties": [0.0]}, {"l2_penalties": []}], ids=str
)
def test_numbers_out_of_range(blobs, change):
    with pytest.raises(ValueError, match="shots must be >= 1 and l2_penalties > 0"):
        few_shot_accuracy(*blobs, **change)


def test_nothing_to_test(blobs):
    with pytest.raises(ValueError, match="got none"):
        few_shot_accuracy(*blobs[:2], blobs[2][:0], blobs[3][:0])
