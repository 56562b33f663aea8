import copy

import torch
from torch import nn

import vmoe
from vmoe.moe import SparseMoE


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(SparseMoE(6, 8, num_experts=4), nn.GELU(), SparseMoE(6, 8, num_experts=4))


def snapshot(model):
    return [dict(module.__dict__, _parameters=None, _modules=None) for module in model.modules()]


def test_layers_in_model_order_and_the_sum_of_their_losses():
    model = two_layers()
    with vmoe.record_routing(model) as record:
        model(torch.randn(2, 5, 6))
    assert list(record.layers) == ["0", "2"]
    total = sum(routing.auxiliary_loss for routing in record.layers.values())
    torch.testing.assert_close(record.auxiliary_loss(), total)
    routing = record.layers["0"]
    assert routing.gates.shape == (1, 10, 4)
    assert routing.batch_shape == (2, 5)
    torch.testing.assert_close(routing.gates.sum(-1), torch.ones(1, 10))


def test_nothing_is_recorded_outside_the_block_or_kept_on_modules():
    model = two_layers()
    before = snapshot(model)
    x = torch.randn(2, 5, 6)
    with vmoe.record_routing(model) as record:
        model(x)
    model(x)
    assert len(record.calls) == 2
    assert snapshot(model) == before


def test_a_record_hears_only_its_own_model():
    model, other = two_layers(), two_layers()
    with vmoe.record_routing(model) as record, vmoe.record_routing(other) as second:
        other(torch.randn(1, 5, 6))
    assert not record.calls
    assert len(second.calls) == 2
    assert record.auxiliary_loss() == 0


def test_several_calls_add_up():
    model = two_layers().eval()
    x = torch.randn(1, 5, 6)
    with vmoe.record_routing(model) as once:
        model(x)
    with vmoe.record_routing(model) as twice:
        model(x)
        model(x)
    torch.testing.assert_close(twice.auxiliary_loss(), 2 * once.auxiliary_loss())
    assert list(twice.layers) == ["0", "2"]


def test_an_error_inside_ends_the_recording():
    model = two_layers()
    try:
        with vmoe.record_routing(model) as record:
            model(torch.randn(1, 5, 7))
    except RuntimeError:
        pass
    model(torch.randn(1, 5, 6))
    assert not record.calls


def test_wrapped_models_keep_their_layer_names():
    model = two_layers()
    wrapped = nn.DataParallel(model)  # on a CPU it just calls the module
    with vmoe.record_routing(wrapped) as record:
        wrapped(torch.randn(1, 5, 6))
    assert list(record.layers) == ["0", "2"]


def test_no_grad_needs_no_gradient():
    model = two_layers()
    with torch.no_grad(), vmoe.record_routing(model) as record:
        model(torch.randn(1, 5, 6))
        assert record.auxiliary_loss() > 0


def test_a_copy_is_another_model():
    model = two_layers()
    clone = copy.deepcopy(model)
    with vmoe.record_routing(model) as record:
        clone(torch.randn(1, 5, 6))
    assert not record.calls
