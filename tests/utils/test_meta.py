"""Building on the meta device skips what fills tensors, and nothing else."""

import timm
import torch
from torch import nn

from vmoe.utils.meta import meta_device


def test_shapes_and_names_are_those_of_the_model():
    made = timm.create_model("vit_tiny_patch16_224", depth=1)
    with meta_device():
        empty = timm.create_model("vit_tiny_patch16_224", depth=1)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (made, empty)]
    assert shapes[0] == shapes[1]


def test_no_random_number_is_drawn_and_real_tensors_are_filled():
    state = torch.get_rng_state()
    with meta_device():
        nn.Linear(3, 4)
        nn.init.trunc_normal_(tensor=nn.Linear(3, 4).weight)
        real = torch.zeros(3, device="cpu").fill_(2.0).mul_(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert real.tolist() == [6.0, 6.0, 6.0]
    assert torch.ones(2).device.type == "cpu"
