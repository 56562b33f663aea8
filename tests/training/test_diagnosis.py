import pytest
import torch
from torch import nn

from vmoe.training.diagnosis import find_non_finite


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.blocks(self.first(x)))


def find(model, x=None, loss=lambda y: y.mean()):
    x = torch.ones(2, 4) if x is None else x
    return find_non_finite(model, lambda: loss(model(x)), {"image": x})


def test_finite_steps_give_none():
    assert find(Model()) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_innermost_first_layer_is_named(value):
    class Broken(nn.Module):
        def forward(self, x):
            return x + value

    model = Model()
    model.blocks[1].insert(1, Broken())
    assert find(model) == "the output of the layer blocks.1.1 (Broken)"


def test_overflow_names_the_layer_where_it_happens():
    model = Model()
    with torch.no_grad():
        model.blocks[0].weight.fill_(3e38)
        model.first.weight.fill_(1.0)
        model.first.bias.fill_(1.0)
    assert "blocks.0 (Linear)" in find(model)


def test_weights_input_loss_and_gradient_are_told_apart():
    model = Model()
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    assert find(model) == "the weights head.bias"
    assert find(Model(), torch.full((2, 4), float("nan"))) == "the input (image)"
    assert "the loss itself" in find(Model(), loss=lambda y: (y * 0).log().mean())
    assert "the gradient of head.bias" in find(Model(), loss=lambda y: (y * 0).abs().sqrt().sum())
