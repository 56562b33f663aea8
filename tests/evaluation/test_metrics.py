import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vmoe.evaluation.metrics import label_ranks, share_within


@given(st.integers(2, 30), st.integers(0, 2**31 - 1))
def test_rank_is_the_place_in_the_sorted_list(num_classes, seed):
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
