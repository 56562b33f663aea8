"""A layer that trains without its auxiliary losses says so, once, and no other layer does."""

import threading
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import vmoe
from vmoe.moe import SparseMoE, record

LOST = "trains without its auxiliary losses"


@pytest.fixture
def said(monkeypatch):
    """The warnings of a process that has said nothing yet."""
    monkeypatch.setattr(record, "_WARNED", False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [each for each in caught if LOST in str(each.message)]


def make(**settings):
    torch.manual_seed(0)
    return SparseMoE(6, 8, num_experts=4, **settings)


def test_it_says_so_once_and_names_both_ways(said):
    for layer in (make(), make()):
        for _ in range(2):
            layer(torch.randn(2, 5, 6)).sum().backward()
    (one,) = said()
    assert one.filename == __file__  # where the model is called
    assert "vmoe.record_routing" in str(one.message)
    assert "auxiliary_loss='attach'" in str(one.message)


@pytest.mark.parametrize(
    "settings",
    [
        {"router_preset": "expert_choice", "importance_loss": 0.1},
        {"router": "soft", "num_slots": 2, "z_loss": 0.1},
        {"router_preset": "noisy_topk"},
        {"importance_loss": 0.0, "load_loss": 0.1, "noise_std": 1.0},
    ],
)
def test_every_router_says_so(said, settings):
    make(**settings)(torch.randn(2, 5, 6))
    assert len(said()) == 1


def recorded(layer, x):
    with vmoe.record_routing(torch.nn.Sequential(torch.nn.Identity(), layer)) as outer:
        layer(x).sum().backward()
    assert outer.calls


def checkpointed(layer, x):
    with vmoe.record_routing(layer) as record:
        loss = checkpoint(layer, x.requires_grad_(), use_reentrant=False).sum() + record.auxiliary_loss()
    loss.backward()  # the layer runs again, when the record is long closed


def frozen(layer, x):
    layer.router.requires_grad_(False)
    layer(x).sum().backward()


def without_gradients(layer, x):
    with torch.no_grad():
        layer(x)
    with torch.inference_mode():
        layer(x)


FINE = {
    "recorded with an outer model": (recorded, {}),
    "attached": (lambda layer, x: layer(x).sum().backward(), {"auxiliary_loss": "attach"}),
    "evaluation": (lambda layer, x: layer.eval()(x).sum().backward(), {}),
    "without gradients": (without_gradients, {}),
    "checkpointed": (checkpointed, {}),
    "a frozen gate": (frozen, {}),
    "no weights": (lambda layer, x: layer(x).sum().backward(), {"importance_loss": 0.0, "load_loss": 0.0}),
    "no noise for the load loss": (
        lambda layer, x: layer(x).sum().backward(),
        {"importance_loss": 0.0, "load_loss": 1.0, "noise_std": 0.0},
    ),
    "exported": (lambda layer, x: torch.export.export(layer, (x,)), {}),
}


@pytest.mark.parametrize("name", FINE)
def test_no_false_alarm(said, name):
    use, settings = FINE[name]
    use(make(**settings), torch.randn(2, 5, 6))
    assert said() == []


def test_records_of_another_thread_or_model_are_no_excuse(said):
    layer, x = make(), torch.randn(2, 5, 6)
    with vmoe.record_routing(make()):
        thread = threading.Thread(target=layer, args=(x,))
        thread.start()
        thread.join()
    assert len(said()) == 1


def test_compiled_code_says_so_in_one_graph_and_is_not_compiled_again(said):
    torch._dynamo.reset()
    layer, graphs = make(noise_std=0.0), []
    compiled = torch.compile(layer, fullgraph=True, backend=lambda graph, _inputs: graphs.append(graph) or graph)
    for _ in range(3):
        compiled(torch.randn(2, 5, 6)).sum().backward()
    assert (len(graphs), [each.filename for each in said()]) == (1, [__file__])
    assert not any("warn" in str(node.target) for node in graphs[0].graph.nodes)
