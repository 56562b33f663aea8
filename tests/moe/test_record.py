import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

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
        copy.deepcopy(model)(torch.randn(1, 5, 6))
    assert not record.calls
    assert len(second.calls) == 2


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


@pytest.mark.parametrize(
    "settings", [{"importance_loss": 0.1}, {"router": "expert_choice"}, {"router": "soft"}], ids=str
)
def test_a_dropped_record_frees_its_memory_at_once(settings):
    """A cycle of references would keep every step's routing, and the graph of its losses, until Python collects it."""
    layer = SparseMoE(6, 8, num_experts=4, num_tokens=5, z_loss=0.1, **settings)
    gc.collect()
    gc.disable()
    try:
        with vmoe.record_routing(layer) as record:
            loss = layer(torch.randn(2, 5, 6)).sum() + record.auxiliary_loss()
        loss.backward()
        call = record.layers[""]
        assert call.metrics
        call, gates = weakref.ref(call), weakref.ref(call.gates)
        del record, loss
        assert call() is None
        assert gates() is None
    finally:
        gc.enable()


def test_an_error_inside_ends_the_recording():
    model = two_layers()
    with pytest.raises(ValueError, match="7 channels"), vmoe.record_routing(model) as record:
        model(torch.randn(1, 5, 7))
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


def test_losses_of_no_weight_need_no_gradient():
    layer = SparseMoE(6, 8, num_experts=4, importance_loss=0.0, load_loss=0.0)
    with vmoe.record_routing(layer) as record:
        loss = layer(torch.randn(1, 5, 6)).sum() + record.auxiliary_loss()
    loss.backward()
    only_load = SparseMoE(6, 8, num_experts=4, importance_loss=0.0, noise_std=0.0)  # no noise, so no load loss
    with vmoe.record_routing(only_load) as record:
        (only_load(torch.randn(1, 5, 6)).sum() + record.auxiliary_loss()).backward()


def test_each_layer_without_a_gradient_is_named():
    model = two_layers()
    x = torch.randn(1, 5, 6, requires_grad=True)
    with vmoe.record_routing(model) as record:
        model[2](checkpoint(model[0], x, use_reentrant=True))
    with pytest.raises(RuntimeError, match=r"auxiliary loss of 0 has no gradient.*use_reentrant=False"):
        record.auxiliary_loss()


def test_a_model_that_was_not_heard_is_an_error():
    model = two_layers()
    with vmoe.record_routing(model) as record:
        copy.deepcopy(model)(torch.randn(1, 5, 6))
    with pytest.raises(RuntimeError, match="no sparse layer of the recorded model ran"):
        record.auxiliary_loss()
    dense = nn.Linear(6, 6)
    with vmoe.record_routing(dense) as record:
        dense(torch.randn(1, 6))
    assert record.auxiliary_loss() == 0


def test_metrics_read_in_inference_mode_leave_the_loss_its_gradient():
    model = two_layers()
    with vmoe.record_routing(model) as record:
        model(torch.randn(1, 5, 6))
    with torch.inference_mode():
        assert record.layers["0"].metrics["share_dropped"] >= 0
    record.auxiliary_loss().backward()
    assert model[0].router.weight.grad.abs().sum() > 0


def test_regionally_compiled_layers_keep_their_names():
    torch._dynamo.reset()
    model = two_layers()
    model[2] = torch.compile(model[2], fullgraph=True, backend="eager")
    with vmoe.record_routing(model) as record:
        model(torch.randn(2, 5, 6))
    assert list(record.layers) == ["0", "2"]


def test_a_child_called_module_is_no_wrapper():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.extra = SparseMoE(6, 8), SparseMoE(6, 8)

        def forward(self, x):
            return self.extra(self.module(x))

    model = Pair()
    with vmoe.record_routing(model) as record:
        model(torch.randn(1, 5, 6))
    assert list(record.layers) == ["module", "extra"]


def test_threads_do_not_hear_each_other():
    model, x = two_layers().eval(), torch.randn(1, 5, 6)
    with vmoe.record_routing(model) as record:
        thread = threading.Thread(target=model, args=(x,))
        thread.start()
        thread.join()
        assert not record.calls
        model(x)
    assert len(record.calls) == 2
