import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vmoe.evaluation import evaluate_retrieval
from vmoe.evaluation.retrieval import retrieval_recall


def recall_by_sorting(scores_IT, image_of_text, k):
    """Recall@k both ways, image by image and text by text, as the literature defines it."""
    by_image = [any(image_of_text[t] == i for t in np.argsort(-scores_IT[i])[:k]) for i in range(scores_IT.shape[0])]
    by_text = [image_of_text[t] in np.argsort(-scores_IT[:, t])[:k] for t in range(scores_IT.shape[1])]
    return float(np.mean(by_image)), float(np.mean(by_text))


@given(st.integers(1, 12), st.integers(1, 3), st.integers(0, 2**31 - 1))
def test_recall_equals_the_definition(num_images, captions, seed):
    generator = torch.Generator().manual_seed(seed)
    image = torch.nn.functional.normalize(torch.randn(num_images, 8, generator=generator), dim=1)
    text = torch.nn.functional.normalize(torch.randn(num_images * captions, 8, generator=generator), dim=1)
    image_of_text = torch.arange(num_images).repeat(captions)
    found = retrieval_recall(image, text, image_of_text, rows_per_block=5)
    for k in (1, 5, 10):
        expected = recall_by_sorting((image @ text.T).numpy(), image_of_text.tolist(), k)
        assert (found[f"image_to_text_recall@{k}"], found[f"text_to_image_recall@{k}"]) == pytest.approx(expected)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_captions_of_one_image_share_it(word_model, batch_size, make_batches):
    # pictures 1, 1, 2, 2, 3; every caption is right
    loader = make_batches([1, 1, 2, 2, 3], texts=[1, 1, 2, 2, 3], batch_size=batch_size)
    result = evaluate_retrieval(word_model, loader, device="cpu", image_ids=["a", "a", "b", "b", "c"])
    assert result["num_images"] == 3
    assert result["num_samples"] == 5
    assert result["image_to_text_recall@1"] == result["text_to_image_recall@1"] == 1
    # taken for five pictures, equal ones tie and cost recall
    result = evaluate_retrieval(word_model, loader, device="cpu")
    assert result["num_images"] == 5
    assert result["text_to_image_recall@1"] == 0.2


def test_constant_model_scores_nothing(constant_model, make_batches):
    numbers = list(range(12))
    result = evaluate_retrieval(constant_model, make_batches(numbers, texts=numbers), device="cpu")
    assert all(value == 0 for name, value in result.items() if "recall" in name)


def test_no_pairs(word_model):
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate_retrieval(word_model, [], device="cpu")
