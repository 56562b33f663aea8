"""Which texts a tokenizer cuts, of all kinds of open_clip's, and how they are counted."""

import logging

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vmoe.data import AugmentationConfig, LoaderConfig, build_transform, eval_loader, train_loader
from vmoe.data.texts import CutTexts, cut_rows

from .conftest import PREPROCESS, Images, tokenize

TRANSFORM = build_transform(PREPROCESS, AugmentationConfig())
CLIP = open_clip.SimpleTokenizer(context_length=6)


@given(st.lists(st.text("ab \u00e9.", max_size=12), min_size=1, max_size=5))
@settings(max_examples=15)
def test_texts_with_more_tokens_than_the_context(texts):
    right = [row for row, text in enumerate(texts) if len(CLIP.encode(text)) + 2 > 6]
    assert cut_rows(CLIP, texts, CLIP(texts)) == right


class T5(torch.nn.Module):
    """As SigLIP's: an end token 1, padding 1, no start token."""

    def __call__(self, texts, context_length=4):
        rows = [[ord(letter) for letter in text][: context_length - 1] for text in texts]
        return torch.tensor([row + [1] * (context_length - len(row)) for row in rows])


def test_other_tokenizers():
    texts = ["ab", "abc", "abcd", "", "abcdefgh"]
    assert cut_rows(T5(), texts, T5()(texts)) == [2, 4]
    assert cut_rows(open_clip.tokenize, ["a " * 80, "a " * 75], open_clip.tokenize(["a " * 80, "a " * 75])) == [0]
    assert cut_rows(tokenize, ["1"], tokenize(["1"])) == []  # takes no context length
    random = open_clip.SimpleTokenizer(context_length=6, reduction_mask="random")
    assert cut_rows(random, ["a b c d e f g"], random(["a b c d e f g"])) == []


def test_counting():
    counting = CutTexts(CLIP)
    assert torch.equal(counting(["a b", "a b c d e"]), CLIP(["a b", "a b c d e"]))
    assert counting.message("texts") == (
        "1 of 2 texts are longer than the model's context and are cut, such as 'a b c d e'"
    )
    counting(["c " * 100])
    assert (counting.num_texts, counting.num_cut, counting.first) == (3, 2, "a b c d e")
    assert CutTexts(CLIP).message("texts") == ""


class Captions(Images):
    """Captions of 4 tokens, and of 5 in every third sample, where 4 fit."""

    def __getitem__(self, index):
        return super().__getitem__(index)._replace(caption="a b c d" + " e" * (index % 3 == 0))


@pytest.mark.parametrize("workers", [0, 1])
def test_training_counts_captions_that_are_cut_and_says_it_once(workers, caplog):
    config = LoaderConfig(batch_size=6, num_workers=workers)
    loader = train_loader(Captions(12), TRANSFORM, CLIP, config, seed=0)
    found = [next(loader)["index"] for _ in range(4)]
    assert loader.num_cut == 8  # 4 of 12, twice
    first = sum(int(index) % 3 == 0 for index in found[0])
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        f"{first} of 6 captions of a batch are longer than the model's context and are cut, such as 'a b c d e'"
    ]


def test_evaluation_counts_captions_that_are_cut(caplog):
    loader = eval_loader(Captions(12), TRANSFORM, CLIP, LoaderConfig(batch_size=5, num_workers=0))
    for _ in range(2):
        assert sum(len(batch["text"]) for batch in loader) == 12
        assert loader.num_cut == 4
    assert "2 of 5 captions of a batch" in caplog.text
    caplog.clear()
    list(eval_loader(Images(12), TRANSFORM, CLIP, LoaderConfig(batch_size=5, num_workers=0)))
    assert not caplog.text
