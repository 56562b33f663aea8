import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vmoe.evaluation.metrics import (
    accuracy_per_class,
    expected_calibration_error,
    ranks,
    right_classes,
    separation,
    share_within,
    top_shares,
)


def label_ranks(scores, labels):
    return ranks(scores, right_classes(labels, torch.arange(len(labels)), scores.shape[1], None))


@given(st.integers(2, 30), st.integers(0, 2**31 - 1))
def test_rank_is_the_position_in_the_sorted_list(num_classes, seed):
    generator = torch.Generator().manual_seed(seed)
    # whole numbers, far apart against the tolerance, without ties
    scores = torch.stack([torch.randperm(num_classes, generator=generator) for _ in range(5)]).float()
    labels = torch.randint(num_classes, (5,), generator=generator)
    order = scores.argsort(dim=1, descending=True)
    expected = (order == labels[:, None]).int().argmax(dim=1)
    assert label_ranks(scores, labels).tolist() == expected.tolist()


def test_a_constant_model_never_hits():
    labels = torch.arange(10)
    found = label_ranks(torch.full((10, 10), 0.3), labels)
    assert share_within(found, 1) == 0
    assert share_within(found, 5) == 0


@given(st.lists(st.integers(0, 9), min_size=1), st.integers(1, 10))
def test_top5_is_reported_of_more_than_five_classes(ranks, num_classes):
    ranks = torch.tensor(ranks).clamp(max=num_classes - 1)
    expected = {"k3_top1": (ranks == 0).double().mean().item(), "k3_top5": (ranks < 5).double().mean().item()}
    if num_classes <= 5:
        assert expected.pop("k3_top5") == 1
    assert top_shares(ranks, num_classes, prefix="k3_") == pytest.approx(expected)


def test_last_bits_do_not_break_a_tie():
    scores = torch.tensor([[0.3, 0.3, 0.1]])
    nudged = torch.nextafter(scores, torch.tensor([[1.0, 0.0, 0.0]]))
    assert label_ranks(nudged, torch.tensor([0])).item() == 1
    assert label_ranks(nudged, torch.tensor([1])).item() == 1


@pytest.mark.parametrize("scores", [[float("nan")] * 3, [float("nan"), 0.0, 0.0], [0.0, float("nan"), -1.0]])
def test_scores_that_are_not_numbers_are_no_hits(scores):
    assert label_ranks(torch.tensor([scores]), torch.tensor([0])).item() > 0


def test_label_out_of_range_is_named():
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.2 for 3 classes, got 0\.\.7"):
        label_ranks(torch.zeros(2, 3), torch.tensor([0, 7]))


def test_any_of_several_right_classes_will_do():
    scores = torch.tensor([[0.1, 0.5, 0.9], [0.9, 0.5, 0.1], [0.2, 0.9, 0.5]])
    right = right_classes(torch.zeros(3).long(), torch.tensor([2, 0, 1]), 3, [(1,), (0, 2), (0, 1)])
    assert right.tolist() == [[True, True, False], [False, True, False], [True, False, True]]
    assert ranks(scores, right).tolist() == [1, 1, 1]


def test_calibration_error_by_hand():
    # two bins: 0.91 and 0.92, of which one is right, and 0.5, which is right
    confidences, hits = torch.tensor([0.91, 0.92, 0.5]), torch.tensor([True, False, True])
    assert expected_calibration_error(confidences, hits) == pytest.approx(0.415 * 2 / 3 + 0.5 / 3, abs=1e-6)
    assert expected_calibration_error(torch.tensor([0.0, 1.0]), torch.tensor([False, True])) == 0


@given(st.integers(1, 300), st.integers(0, 2**31 - 1))
def test_calibration_error_equals_the_definition(num_samples, seed):
    generator = torch.Generator().manual_seed(seed)
    confidences = torch.rand(num_samples, generator=generator)
    hits = torch.rand(num_samples, generator=generator) < 0.5
    expected = 0.0
    for bin_index in range(15):
        inside = (confidences.double() > bin_index / 15) & (confidences.double() <= (bin_index + 1) / 15)
        if inside.any():
            distance = hits[inside].double().mean() - confidences[inside].double().mean()
            expected += inside.double().mean() * distance.abs()
    assert expected_calibration_error(confidences, hits) == pytest.approx(float(expected), abs=1e-5)


def test_accuracy_per_class_by_hand():
    accuracy, counts = accuracy_per_class(torch.tensor([True, False, True]), torch.tensor([0, 0, 2]), 4)
    assert counts.tolist() == [2, 0, 1, 0]
    assert accuracy[[0, 2]].tolist() == [0.5, 1.0]
    assert accuracy[[1, 3]].isnan().all()


def test_confidences_tell_images_of_the_data_from_others():
    from sklearn.metrics import roc_auc_score

    inside, outside = torch.rand(200).round(decimals=2) + 0.2, torch.rand(100).round(decimals=2)
    found = separation(inside, outside)
    labels = torch.cat([torch.ones(200), torch.zeros(100)])
    assert found["auroc"] == pytest.approx(roc_auc_score(labels, torch.cat([inside, outside])), abs=1e-6)
    assert found["fpr95"] == pytest.approx((outside >= inside.sort().values[10]).float().mean().item())
    assert separation(torch.ones(3), torch.zeros(5)) == {"auroc": 1.0, "fpr95": 0.0}
