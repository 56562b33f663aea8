"""The Triton kernels on the CPU, in Triton's interpreter. Run by `test_triton.py` in a process of its own:
TRITON_INTERPRET=1 must be set before anything imports Triton.

Shapes, by suffix: R rows sorted by expert, D, H and O widths, E experts.
"""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vmoe
from vmoe.moe import Experts, SparseMoE, use_backend

LOADED_BY_IMPORT = "vmoe.moe.backends.triton.kernels" in sys.modules

from vmoe.moe.backends.triton import kernels  # noqa: E402  (what `import vmoe` loads comes first)

ACTIVATIONS = {"gelu": nn.GELU, "gelu_tanh": lambda: nn.GELU("tanh")}
D, H, O, E = 20, 36, 18, 4


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several tiles in every direction at sizes that the interpreter can bear."""
    for name in ("HALF", "FULL"):
        monkeypatch.setattr(kernels, name, {**getattr(kernels, name), "BLOCK_N": 32, "BLOCK_K": 32})
    monkeypatch.setattr(kernels, "MAX_BLOCK_M", 16)
    monkeypatch.setattr(kernels, "GROUP_M", 2)


def check(counts, unused, dtype, tolerance, **kwargs):
    """Result and all gradients against the reference in float64, relative to each tensor's largest entry."""
    torch.manual_seed(0)
    experts = Experts(len(counts), D, H, out_features=O, **kwargs).to(dtype)
    for name, parameter in experts.named_parameters():
        nn.init.normal_(parameter, std=0.5)
        if name == "fc1.bias":  # as users may have it
            experts.fc1.bias = nn.Parameter(parameter.detach().t().contiguous().t())
    exact = Experts(len(counts), D, H, out_features=O, **kwargs).double()
    exact.load_state_dict(experts.state_dict())
    x = torch.randn(sum(counts) + unused, D).to(dtype).requires_grad_()
    x_exact = x.detach().double().requires_grad_()
    with use_backend("triton"):
        y = experts(x, torch.tensor(counts))
    with use_backend("reference"):
        z = exact(x_exact, torch.tensor(counts))
    grad = torch.randn(z.shape).to(dtype)
    y.backward(grad)
    z.backward(grad.double())
    assert y.dtype == dtype
    used = sum(counts)
    pairs = [(y[:used], z[:used]), (x.grad, x_exact.grad)]
    pairs += [(a.grad, b.grad) for a, b in zip(experts.parameters(), exact.parameters(), strict=True)]
    for a, b in pairs:
        assert a.numel() == 0 or (a.double() - b).abs().max() <= tolerance * b.abs().max()
    with use_backend("triton"), torch.no_grad():
        assert torch.equal(experts(x, torch.tensor(counts)), y)


# An empty expert, unused rows, no count that is a multiple of the block; one expert with all rows; none with any.
# The interpreter cuts bfloat16 off instead of rounding it, so that is wider than a GPU needs.
@pytest.mark.parametrize(
    ("counts", "dtype", "tolerance", "act", "bias"),
    [
        ([19, 0, 9, 1], torch.float32, 2e-6, "gelu_tanh", True),
        ([19, 0, 9, 1], torch.bfloat16, 3e-2, "gelu", False),
        ([0, 33, 0, 0], torch.float16, 3e-3, "gelu", True),
        ([0, 0, 0, 0], torch.float32, 2e-6, "gelu", True),
    ],
)
def test_forward_and_backward_are_the_reference(counts, dtype, tolerance, act, bias):
    check(counts, 3, dtype, tolerance, act_layer=ACTIVATIONS[act], bias=bias)


@pytest.mark.parametrize("counts", [[5, 0, 40, 16], [0, 0, 0, 0], [61, 0, 0, 0], [1, 1, 1, 1]])
def test_tiles_cover_every_row_once(counts):
    num_rows, block = 61, 16
    table = kernels.tile_table(torch.tensor(counts), num_rows, block).tolist()
    assert len(table) == (num_rows + 5 * 15) // 16  # whatever the counts
    owner = [e for e, count in enumerate([*counts, num_rows - sum(counts)]) for _ in range(count)]
    seen = [(row, expert) for expert, start, end in table for row in range(start, min(start + block, end))]
    assert sorted(seen) == list(enumerate(owner))


def test_what_is_not_needed_is_not_computed_or_kept(monkeypatch):
    experts = Experts(E, D, H).requires_grad_(False)
    x = torch.randn(19, D, requires_grad=True)
    monkeypatch.setattr(kernels, "grouped_weight_gradient", None)  # an error if it is called
    kept, own = [], [x, *experts.parameters()]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), use_backend("triton"):
        y = experts(x, torch.tensor([8, 0, 9, 2]))
    made = [t.shape for t in kept if t.is_floating_point() and not any(t is a for a in own)]
    assert made == [(19, H)]  # the hidden layer, and no activation
    y.sum().backward()
    assert x.grad is not None


def run_layer(backend, compiled=False, autocast=False):
    """Result and gradients of a layer, and the backend that ran."""
    torch.manual_seed(0)
    layer = SparseMoE(D, H, num_experts=E, num_selected_experts=2, capacity_factor=0.8, batch_priority=True)
    layer.experts.backend = backend
    x = torch.randn(2, 9, D, requires_grad=True)
    mask = torch.arange(18).view(2, 9) < 14
    forward = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), vmoe.record_routing(layer) as record:
        y = forward(x, mask)
    (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return [y, x.grad, *(p.grad for p in layer.parameters())], record.layers[""].backend


@pytest.mark.parametrize(("how", "tolerance"), [({"autocast": True}, 3e-2), ({"compiled": True}, 2e-6)])
def test_the_layer_gives_what_it_gives_without_them(how, tolerance):
    expected, _ = run_layer("reference", **{**how, "compiled": False})
    found, backend = run_layer("triton", **how)
    assert backend == "triton"
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def test_second_derivatives_are_refused():
    layer = SparseMoE(D, H, num_experts=E, backend="triton")
    x = torch.randn(3, D, requires_grad=True)
    with pytest.raises(RuntimeError, match="take the backend 'reference'"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("name", ["none", *ACTIVATIONS])
def test_a_layer_with_an_activation_behind_it(name):
    """The operator by itself, and the way back through it."""
    x, w = torch.randn(5, D), torch.randn(1, H, D)
    table = kernels.tile_table(torch.tensor([5]), 5, 16)
    y, h = kernels.grouped_linear(x, w, None, None, table, 16, name, True)
    expected = F.linear(x, w[0])
    torch.testing.assert_close(h, expected, rtol=1e-4, atol=1e-4)
    act = nn.Identity() if name == "none" else ACTIVATIONS[name]()
    torch.testing.assert_close(y, act(expected), rtol=1e-4, atol=1e-4)
    seen = torch.randn(5, H, requires_grad=True)
    (slope,) = torch.autograd.grad(act(seen).sum(), seen)
    y, again = kernels.grouped_linear(x, w, None, seen.detach(), table, 16, name, True)
    torch.testing.assert_close(again, act(seen), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y, expected * slope, rtol=1e-4, atol=1e-4)


def test_importing_the_package_loads_no_kernels():
    assert not LOADED_BY_IMPORT
