import pytest
import timm
import torch
import torch.nn.functional as F

import vmoe  # noqa: F401  (registers the models)
from vmoe.evaluation import evaluate_classification
from vmoe.evaluation.classification import predict, select_columns
from vmoe.evaluation.metrics import expected_calibration_error


class Shifted(torch.nn.Module):
    """Classifier of 10 numbers that is right for even ones and off by one for odd ones."""

    def forward(self, image):
        number = image[:, 0, 0, 0].long()
        logits = -(torch.arange(10)[None] - (number - number % 2)[:, None]).abs().float()
        return logits + 0.25 * torch.arange(10) / 10  # no ties


@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_known_accuracy_whatever_the_batch_size(batch_size, make_batches):
    loader = make_batches(list(range(10)), labels=list(range(10)), batch_size=batch_size)
    result = evaluate_classification(Shifted(), loader, device="cpu", num_classes=10)
    assert {name: result[name] for name in ("top1", "top5", "mean_per_class")} == {
        "top1": 0.5,
        "top5": 1.0,
        "mean_per_class": 0.5,
    }
    assert (result["num_samples"], result["num_skipped"]) == (10, 0)
    logits = torch.cat([Shifted()(batch["image"]) for batch in loader])
    confidence, predicted = logits.softmax(1).max(1)
    assert result["ece"] == expected_calibration_error(confidence, predicted == torch.arange(10))
    assert result["nll"] == pytest.approx(float(F.cross_entropy(logits, torch.arange(10))), abs=6e-5)  # it is rounded
    assert "diversity" not in result


def test_wrong_number_of_classes_names_both(make_batches):
    loader = make_batches([1, 2], labels=[1, 2])
    with pytest.raises(ValueError, match="model has 10 classes and the data set 7"):
        evaluate_classification(Shifted(), loader, device="cpu", num_classes=7)


def test_nothing_to_evaluate(make_batches):
    loader = make_batches([])
    loader.num_skipped = 3
    with pytest.raises(ValueError, match="3 were skipped"):
        evaluate_classification(Shifted(), loader, device="cpu")


def test_sparse_model_mode_is_restored_and_batches_do_not_matter():
    model = timm.create_model("vmoe_tiny_patch8_48", num_classes=5, depth=2, embed_dim=32, num_heads=2)
    model.blocks[0].eval()
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(12, 3, 48, 48, generator=generator), torch.arange(12) % 5
    results = []
    for batch_size in (1, 5, 12):
        batches = [
            {"image": image, "label": label} for image, label in zip(images.split(batch_size), labels.split(batch_size))
        ]
        results.append(evaluate_classification(model, batches, device="cpu"))
    assert results[0] == results[1] == results[2]
    assert model.training
    assert model.blocks[1].training
    assert not model.blocks[0].training


def test_bf16():
    model = timm.create_model("vmoe_tiny_patch8_48", num_classes=5, depth=2, embed_dim=32, num_heads=2)
    batches = [{"image": torch.randn(4, 3, 48, 48), "label": torch.arange(4)}]
    assert evaluate_classification(model, batches, device="cpu", precision="bf16")["num_samples"] == 4
    with pytest.raises(ValueError, match="precision must be one of float32, bf16, fp16, got 'half'"):
        evaluate_classification(model, batches, device="cpu", precision="half")


def test_classes_that_are_some_outputs_of_the_model(make_batches):
    # class 0 is output 4 or 6, class 1 is output 2
    columns = [[4, 6], [2]]
    assert select_columns(torch.tensor([[0.0, 1, 9, 1, 3, 1, 5]]), columns).tolist() == [[5, 9]]
    loader = make_batches([6, 4, 2, 2], labels=[0, 0, 1, 0], batch_size=2)
    predictions = predict(lambda images: select_columns(Shifted()(images), columns), loader, device="cpu")
    assert predictions.predicted_N.tolist() == [0, 0, 1, 1]
    assert predictions.results()["top1"] == 0.75
    assert predictions.per_class(["a", "b"]) == [
        {"class": "a", "top1": pytest.approx(2 / 3), "num_samples": 3},
        {"class": "b", "top1": 1, "num_samples": 1},
    ]
    with pytest.raises(ValueError, match=r"outputs 0\.\.999 .* model has 10:"):
        select_columns(torch.zeros(1, 10), [[999], [2]])


def test_nan_scores_are_misses_with_a_warning(make_batches, caplog):
    loader = make_batches([2, 4], labels=[2, 4])
    result = predict(lambda images: Shifted()(images) * float("nan"), loader, device="cpu").results()
    assert result["top1"] == 0
    assert "ece" not in result
    assert "scores of 2 samples are NaN" in caplog.text


def test_a_tie_is_a_miss_also_in_the_confusion_matrix():
    scores = torch.tensor([[2.0, 2, 0], [2.0, 2, 0], [2.0, 2, 0], [0.0, 1, 2], [0.0, 1, 1]])
    batches = [{"image": torch.zeros(5, 1), "label": torch.tensor([0, 1, 2, 2, 1])}]
    predictions = predict(lambda images: scores, batches, device="cpu")
    assert predictions.predicted_N.tolist() == [1, 0, 0, 2, 2]
    hits = (predictions.predicted_N == predictions.label_N).double().mean().item()
    assert predictions.results()["top1"] == hits == 0.2


def test_an_ensemble_is_judged_by_its_mean_probability_and_how_far_its_members_differ():
    torch.manual_seed(0)
    tiny = {"num_classes": 5, "depth": 2, "embed_dim": 32, "num_heads": 2, "ensemble_size": 2}
    model = timm.create_model("vmoe_tiny_patch8_48", **tiny).eval()
    torch.nn.init.normal_(model.head.weight)
    images, labels = torch.randn(12, 3, 48, 48), torch.arange(12) % 5
    batches = [{"image": image, "label": label} for image, label in zip(images.split(5), labels.split(5))]
    result = evaluate_classification(model, batches, device="cpu", num_classes=5)
    with torch.no_grad():
        p, q = model.member_logits(images).softmax(-1).unflatten(0, (-1, 2)).unbind(1)
    mean = (p + q) / 2
    assert result["top1"] == (mean.argmax(1) == labels).double().mean()
    assert result["nll"] == pytest.approx(float(F.nll_loss(mean.log(), labels)), abs=6e-5)
    assert result["ece"] == pytest.approx(expected_calibration_error(mean.amax(1), mean.argmax(1) == labels), abs=2e-6)
    divergence = ((p - q) * (p.log() - q.log())).sum(1).mean() / 2  # KL(p, q) and KL(q, p)
    assert result["diversity"] == pytest.approx(float(divergence), abs=2e-5)
    assert result["diversity"] > 1e-3
    model.load_state_dict({name: both_halves(name, tensor) for name, tensor in model.state_dict().items()})
    assert evaluate_classification(model, batches, device="cpu")["diversity"] == 0


def both_halves(name, tensor):
    """The first member's experts and gate for both."""
    if ".experts." not in name and ".router." not in name:
        return tensor
    return torch.cat([tensor.chunk(2)[0]] * 2)
