import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vmoe.data import BadSample, LoaderConfig, SourceConfig, build_dataset, build_transform
from vmoe.evaluation import evaluate_retrieval
from vmoe.evaluation.retrieval import retrieval_loader, retrieval_recall

PREPROCESS = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}


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


def evaluate(model, tokenize, loader, texts, image_of_caption):
    return evaluate_retrieval(model, tokenize, loader, [str(text) for text in texts], image_of_caption, device="cpu")


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_captions_of_one_image_share_it(word_model, tokenize, batch_size, make_batches):
    # images 1, 2, 3; every caption is right
    loader = make_batches([1, 2, 3], batch_size=batch_size)
    result = evaluate(word_model, tokenize, loader, [1, 1, 2, 2, 3], [0, 0, 1, 1, 2])
    assert result["num_images"] == 3
    assert result["num_samples"] == 5
    assert result["image_to_text_recall@1"] == result["text_to_image_recall@1"] == 1
    # taken for five images, equal ones tie and cost recall
    loader = make_batches([1, 1, 2, 2, 3], batch_size=batch_size)
    result = evaluate(word_model, tokenize, loader, [1, 1, 2, 2, 3], [0, 1, 2, 3, 4])
    assert result["num_images"] == 5
    assert result["text_to_image_recall@1"] == 0.2


def test_constant_model_scores_nothing(constant_model, tokenize, make_batches):
    numbers = list(range(12))
    result = evaluate(constant_model, tokenize, make_batches(numbers), numbers, numbers)
    assert all(value == 0 for name, value in result.items() if "recall" in name)


def test_what_lacks_its_other_half_is_counted(word_model, tokenize, make_batches):
    # image 1 was unreadable, and image 2 has an empty caption alone
    loader = make_batches([1, 2, 3])
    del loader[0]["index"], loader[0]["image"]
    loader[0] = {"image": make_batches([1, 3])[0]["image"], "index": torch.tensor([0, 2])}
    captions, image_of_caption = ["1", "9", "", "3"], [0, 1, 2, 2]
    result = evaluate_retrieval(word_model, tokenize, loader, captions, image_of_caption, device="cpu")
    assert (result["num_images"], result["num_samples"], result["num_skipped"]) == (2, 2, 2)
    assert result["image_to_text_recall@1"] == 1
    # an image without a caption is no candidate
    result = evaluate_retrieval(word_model, tokenize, make_batches([1, 2]), ["1", ""], [0, 1], device="cpu")
    assert (result["num_images"], result["num_samples"], result["num_skipped"]) == (1, 1, 1)


def test_no_pairs(word_model, tokenize):
    with pytest.raises(ValueError, match=r"nothing to evaluate.*2 were skipped"):
        evaluate(word_model, tokenize, [], [1, 2], [0, 1])


def test_each_image_is_read_once(tmp_path):
    rows = ["image,caption"]
    for name in ("a", "b"):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{name}.png")
        rows += [f"{name}.png,an image of {name}", f"./{name}.png,{name} again"]
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    dataset = build_dataset(SourceConfig("pairs", str(tmp_path / "pairs.csv")))
    transform = build_transform(PREPROCESS, None)
    loader, image_of_caption = retrieval_loader(dataset, transform, LoaderConfig(batch_size=1, num_workers=0))
    assert [batch["index"].tolist() for batch in loader] == [[0], [2]]
    assert image_of_caption == [0, 0, 2, 2]


def test_empty_caption_is_an_error_or_skipped(tmp_path, caplog):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    (tmp_path / "pairs.csv").write_text('image,caption\na.png,""\na.png,an image\n')
    dataset = build_dataset(SourceConfig("pairs", str(tmp_path / "pairs.csv")))
    with pytest.raises(BadSample, match=r"a\.png: empty caption"):
        retrieval_loader(dataset, None, LoaderConfig())
    loader, image_of_caption = retrieval_loader(dataset, None, LoaderConfig(on_bad="skip"))
    assert list(loader.indices) == [1]
    assert image_of_caption == [-1, 1]
    assert "a.png is empty" in caplog.text
