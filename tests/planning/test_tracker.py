import pytest
import torch
from torch import nn

from vmoe.planning.hardware import Hardware
from vmoe.planning.simulate import Tracker

# A byte and an operation take a second each, so that seconds are counts.
COUNTING = Hardware(1, 1e-12, 1e-12, 1e-9, 1, 1, matmul_efficiency=1.0, memory_efficiency=1.0, launch=0.0)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_what_lives_and_the_most_that_did(device):
    tracker = Tracker(COUNTING)
    x = torch.zeros(4, 8, device=device)
    with tracker:
        y = x + 1
        with tracker.labelled("loss"):
            z = (y * 2).sum()
        assert tracker.live == {"activations": 128, "loss": 4}
        y.t()  # a view takes nothing
        del y
        assert tracker.live["activations"] == 0
    assert tracker.cut() == {"activations": 128, "loss": 128 + 4}
    assert tracker.cut() == {"activations": 0, "loss": 4}
    del z
    assert sum(tracker.live.values()) == 0


def test_owned_storages_change_their_label():
    tracker = Tracker(COUNTING)
    with tracker:
        x = torch.empty(10, device="meta")
    tracker.own([x, x.view(2, 5)], "gradients")
    assert tracker.live["gradients"] == 40
    assert tracker.live["activations"] == 0


def test_flops_of_a_linear_layer():
    layer = nn.Linear(8, 16, device="meta")
    tracker = Tracker(COUNTING)
    with tracker:
        layer(torch.empty(4, 8, device="meta", requires_grad=True)).sum().backward()
    assert tracker.flops == 3 * 2 * 4 * 8 * 16  # forward, and the gradients of input and weight
    assert tracker.seconds["matmul"] >= tracker.flops * 2 / 3  # those bound by matmul, not by bytes


def test_work_on_experts_weights_is_kept_apart():
    weight = torch.empty(2, 4, 8, device="meta")
    tracker = Tracker(COUNTING, [weight.numel()])
    with tracker:
        copy = weight.to(torch.bfloat16)
        torch.empty(64, device="meta") + 1  # of as many elements, but no stack of matrices
    assert tracker.live["expert_weights"] == copy.numel() * 2
    assert tracker.expert_bytes == 64 * 4 + 64 * 2
    assert tracker.seconds["memory"] == 3 * 64 * 4  # made, read and written, without experts
