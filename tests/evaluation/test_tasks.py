"""What a task makes of the predictions: metrics of each class and of each condition."""

import pytest
import torch

from vmoe.data import ImageDataset
from vmoe.data.sources.imagenet import CORRUPTIONS
from vmoe.evaluation.classification import Predictions
from vmoe.evaluation.robustness import ALEXNET_ERRORS
from vmoe.evaluation.tasks import classification_outcome


class Conditions(ImageDataset):
    """Two samples under each condition; the second class is never got right."""

    classes = ("a", "b")

    def __init__(self, corruptions):
        self.conditions = [f"{corruption}/{severity}" for corruption in corruptions for severity in range(1, 6)]
        self.condition_of = [position for position, _ in enumerate(self.conditions) for _ in range(2)]

    def __len__(self):
        return len(self.condition_of)

    def __getitem__(self, index):
        raise NotImplementedError


def predictions(number):
    label = torch.arange(number) % 2
    zeros = torch.zeros(number).long()
    return Predictions(torch.arange(number), label, label, zeros, torch.full((number,), 0.5), torch.ones(number), 2, 0)


def test_the_confusion_matrix_is_made_where_it_is_wanted_and_fits(monkeypatch, caplog):
    dataset = Conditions(["fog"])
    assert classification_outcome(predictions(4), dataset, []).confusion_CC is None
    assert classification_outcome(predictions(4), dataset, [], True).confusion_CC.tolist() == [[2, 0], [2, 0]]
    monkeypatch.setattr("vmoe.evaluation.tasks.MOST_CLASSES", 1)
    outcome = classification_outcome(predictions(4), dataset, [], True)
    assert (outcome.confusion_CC, len(outcome.details["per_class"])) == (None, 2)
    assert "2 classes, more than 1: no tables of the classes and no confusion matrix are written" in caplog.text


def test_mean_corruption_error_of_all_conditions():
    dataset = Conditions(CORRUPTIONS)
    outcome = classification_outcome(predictions(len(dataset)), dataset, [])
    assert outcome.results["mce"] == pytest.approx(sum(0.5 / error for error in ALEXNET_ERRORS.values()) / 15)
    assert outcome.details["conditions"]["fog/3"] == {"top1": 0.5, "num_samples": 2}
    assert outcome.details["missing_conditions"] == []
    assert [entry["top1"] for entry in outcome.details["per_class"]] == [1, 0]


def test_without_some_conditions_there_is_no_mean_and_they_are_named():
    dataset = Conditions(["fog", "snow"])
    outcome = classification_outcome(predictions(len(dataset)), dataset, ["torn.png"])
    assert "mce" not in outcome.results
    assert outcome.details["corruption_errors"] == pytest.approx(
        {name: 0.5 / ALEXNET_ERRORS[name] for name in ("fog", "snow")}
    )
    assert len(outcome.details["missing_conditions"]) == 65
    assert "frost/1" in outcome.details["missing_conditions"]
    assert outcome.details["skipped"] == ["torn.png"]


def test_samples_of_several_classes_are_of_none_alone():
    dataset = Conditions(["fog"])
    dataset.conditions = None
    dataset.label_sets = [(position % 2,) for position in range(len(dataset))]
    outcome = classification_outcome(predictions(len(dataset)), dataset, [])
    assert "mean_per_class" not in outcome.results
    assert "per_class" not in outcome.details
    assert outcome.results["top1"] == 0.5
