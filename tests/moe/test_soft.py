import pytest
import torch

import vmoe
from vmoe.moe import SparseMoE


def test_slots_come_from_the_capacity():
    for tokens, experts, factor, slots in [(16, 4, 1.0, 4), (16, 4, 0.5, 2), (49, 8, 1.0, 6), (197, 128, 1.0, 2)]:
        layer = SparseMoE(4, 4, router="soft", num_experts=experts, capacity_factor=factor, num_tokens=tokens)
        assert layer.router.slots.shape == (experts, slots, 4)
    assert SparseMoE(4, 4, router="soft", group_size=16, num_experts=4).router.slots.shape[1] == 4
    with pytest.raises(ValueError, match="gives no capacity"):
        SparseMoE(4, 4, router="soft", num_experts=64, num_tokens=16)


def test_weights_are_distributions_and_nothing_is_dropped():
    torch.manual_seed(0)
    layer = SparseMoE(8, 8, router="soft", num_experts=4, num_slots=3).eval()
    x = torch.randn(2, 10, 8)
    mask = torch.rand(2, 10) < 0.7
    soft = layer.router(*layer._group(x, mask, None), layer._capacity(), False)
    assert soft.combine_GNS.sum(-1).allclose(torch.ones(2, 10))
    assert soft.dispatch_GMNS.sum(2).allclose(torch.ones(2, 1, 12))
    assert (soft.dispatch_GMNS.squeeze(1)[~mask] == 0).all()
    with vmoe.record_routing(layer) as record:
        layer(x, mask)
    assert record.layers[""].metrics["share_dropped"] == 0


def test_any_length_and_noise_in_training_only():
    torch.manual_seed(0)
    layer = SparseMoE(8, 8, router="soft", num_experts=4, num_slots=3, noise_std=1.0)
    x = torch.randn(2, 7, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert layer(torch.randn(1, 31, 8)).shape == (1, 31, 8)
