"""Small models and loaders whose right answers are known."""

import pytest
import torch
from torch import nn


class WordModel(nn.Module):
    """Contrastive model that looks at the first pixel and the first token: equal numbers match."""

    context_length = 4

    def __init__(self, num_words=250, dim=64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(num_words, dim, generator=generator))
        self.logit_scale = nn.Parameter(torch.tensor(3.0))

    def encode_image(self, image, normalize=False):
        features = self.table[image[:, 0, 0, 0].round().long()]
        return nn.functional.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text, normalize=False):
        features = self.table[text[:, 0]]
        return nn.functional.normalize(features, dim=-1) if normalize else features


class ConstantModel(WordModel):
    """Gives every image and text the same features."""

    def __init__(self):
        super().__init__()
        with torch.no_grad():
            self.table[:] = self.table[0].clone()


def _tokenize(texts):
    """The number in a text ("a photo of 7") as its first token."""
    numbers = [int("".join(c for c in text if c.isdigit())) for text in texts]
    return torch.tensor([[number, 0, 0, 0] for number in numbers])


class Batches(list):
    """Batches of numbered images, as an evaluation loader gives them."""

    num_skipped = 0

    def __init__(self, numbers, labels=None, texts=None, batch_size=4):
        rows = range(len(numbers))
        for start in range(0, len(numbers), batch_size):
            index = torch.tensor(rows[start : start + batch_size])
            images = torch.tensor(numbers)[index].float()[:, None, None, None].expand(-1, 3, 2, 2)
            batch = {"image": images, "index": index}
            if labels is not None:
                batch["label"] = torch.tensor(labels)[index]
            if texts is not None:
                batch["text"] = torch.tensor([[t, 0, 0, 0] for t in texts])[index]
            self.append(batch)


@pytest.fixture
def word_model():
    return WordModel()


@pytest.fixture
def constant_model():
    return ConstantModel()


@pytest.fixture
def make_batches():
    return Batches


@pytest.fixture
def tokenize():
    return _tokenize
