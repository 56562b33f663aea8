"""The Triton kernels on the CPU, in Triton's interpreter. Run by `test_triton.py` in a process of its own:
TRITON_INTERPRET=1 must be set before anything imports Triton.

Shapes, by suffix: S tokens, R rows sorted by expert, K rows of a token, D, F and O widths, E experts.
"""

import sys

import pytest
import timm
import torch
import torch.nn.functional as F

import vmoe
from vmoe.moe import SparseMoE
from vmoe.moe.backends import triton as kernels

LOADED_BY_IMPORT = "vmoe.moe.backends.triton.products" in sys.modules

from vmoe.moe.backends.triton import mlp, products, tiles  # noqa: E402  (what `import vmoe` loads comes first)

ACTIVATIONS = {
    "none": lambda h: h,
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}
S, D, H, O, E, K = 19, 20, 36, 18, 4, 2


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several tiles in every direction at sizes that the interpreter can bear."""
    for name in ("HALF", "FULL"):
        monkeypatch.setattr(products, name, {**getattr(products, name), "BLOCK_N": 32, "BLOCK_K": 32})
    monkeypatch.setattr(tiles, "MAX_BLOCK_M", 16)
    monkeypatch.setattr(products, "GROUP_M", 2)


def rows(counts, unused=0):
    """Random rows for the counts: token_R, row_SK."""
    used = sum(counts)
    assignment = torch.randperm(S * K, generator=torch.Generator().manual_seed(0))[:used]
    row = torch.full((S * K,), -1)
    row[assignment] = torch.arange(used)
    return torch.cat([assignment // K, torch.full((unused,), -1)]), row.view(S, K)


def arguments(num_rows, dtype=torch.float32):
    """x, weights of rows, W1, b1, W2, b2."""
    generator = torch.Generator().manual_seed(1)
    shapes = (S, D), (num_rows,), (E, H, D), (E, H), (E, O, H), (E, O)
    tensors = (torch.randn(shape, generator=generator, dtype=torch.float64) / 2 for shape in shapes)
    return [t.to(dtype).requires_grad_() for t in tensors]


def reference(x, weight, w1, b1, w2, b2, token, counts, activation):
    """The definition: expert by expert."""
    y = x.new_zeros(x.shape[0], O)
    start = 0
    for e, count in enumerate(counts):
        r = torch.arange(start, start + count)
        start += count
        out = F.linear(ACTIVATIONS[activation](F.linear(x[token[r]], w1[e], b1[e])), w2[e], b2[e])
        y = y.index_add(0, token[r], weight[r, None] * out)
    return y


def check(counts, unused, activation, dtype, tolerance):
    """Result and all gradients against float64, relative to each tensor's largest entry."""
    token, row = rows(counts, unused)
    ours = arguments(len(token), dtype)
    exact = [t.detach().double().requires_grad_() for t in ours]
    x, weight, w1, b1, w2, b2 = ours
    # As users may have them: a column of weights, and biases that are not contiguous.
    column, across = weight[:, None].expand(-1, 2).contiguous()[:, 0], b1.t().contiguous().t()
    y = mlp.routed_mlp(x, token, row, column, torch.tensor(counts), (w1, across), (w2, b2), activation)
    z = reference(*exact, token, counts, activation)
    grad = torch.randn(z.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    y.backward(grad)
    z.backward(grad.double())
    assert y.dtype == dtype
    pairs = [(y, z), *((a.grad, b.grad) for a, b in zip(ours, exact, strict=True))]
    for name, (a, b) in zip(("y", "x", "weight", "w1", "b1", "w2", "b2"), pairs, strict=True):
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max(), name


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_and_backward_are_the_definition(activation):
    """An empty expert, unused rows, and no count that is a multiple of the block."""
    check([19, 0, 9, 1], 3, activation, torch.float32, 2e-6)


# The interpreter cuts bfloat16 off instead of rounding it, so this is wider than a GPU needs.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 3e-3)])
def test_half_types(dtype, tolerance):
    check([19, 0, 9, 1], 3, "gelu", dtype, tolerance)


@pytest.mark.parametrize("counts", [[0, 33, 0, 0], [0, 0, 0, 0]])
def test_one_expert_has_all_rows_or_none_has_any(counts):
    check(counts, 2, "gelu", torch.float32, 2e-6)


def test_rows_that_are_the_tokens_without_weights_or_biases():
    x, _, w1, _, w2, _ = arguments(0)
    counts = torch.tensor([3, 0, 11, 2])  # three rows are unused
    y = mlp.routed_mlp(x, None, None, None, counts, (w1, None), (w2, None), "gelu")
    y.sum().backward()
    grads = [t.grad for t in (x, w1, w2)]
    expert = torch.arange(E).repeat_interleave(counts)
    exact = [t.detach().double().requires_grad_() for t in (x, w1, w2)]
    x, w1, w2 = exact
    h = torch.einsum("rd,rhd->rh", x[:16], w1[expert])
    z = torch.einsum("rh,roh->ro", F.gelu(h), w2[expert])
    z.sum().backward()
    torch.testing.assert_close(y.double(), F.pad(z, (0, 0, 0, 3)), atol=1e-5, rtol=1e-5)
    for a, b in zip(grads, exact, strict=True):
        torch.testing.assert_close(a.double(), b.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("counts", [[5, 0, 40, 16], [0, 0, 0, 0], [61, 0, 0, 0], [1, 1, 1, 1]])
def test_tiles_cover_every_row_once(counts):
    num_rows, block = 61, 16
    table = tiles.tile_table(torch.tensor(counts), num_rows, block).tolist()
    assert len(table) == (num_rows + 5 * 15) // 16  # whatever the counts
    owner = [e for e, count in enumerate([*counts, num_rows - sum(counts)]) for _ in range(count)]
    seen = [(row, expert) for expert, start, end in table for row in range(start, min(start + block, end))]
    assert sorted(seen) == list(enumerate(owner))


def test_what_is_not_asked_for_is_not_computed_or_kept(monkeypatch):
    token, row = rows([8, 0, 9, 2])
    args = arguments(len(token))
    for frozen in args[2:]:
        frozen.requires_grad_(False)
    x, weight, w1, b1, w2, b2 = args
    monkeypatch.setattr(mlp, "grouped_weight_gradient", None)  # an error if it is called
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = mlp.routed_mlp(x, token, row, weight, torch.tensor([8, 0, 9, 2]), (w1, b1), (w2, b2), "gelu")
    made = [t.shape for t in kept if t.is_floating_point() and not any(t is a for a in args)]
    assert made == [(len(token), H)]  # the hidden layer; no gathered tokens, no activations
    y.sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert w1.grad is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "tanh"}, "must be one of none, gelu"),
        ({"row_SK": None}, "give both or neither"),
        ({"x_SD": torch.zeros(S, D, dtype=torch.float64)}, "torch.float32, torch.float64"),
    ],
)
def test_bad_input_is_named(change, message):
    token, row = rows([8, 0, 9, 2])
    x, weight, w1, b1, w2, b2 = arguments(len(token))
    good = {"x_SD": x, "token_R": token, "row_SK": row, "weight_R": weight, "count_E": torch.tensor([8, 0, 9, 2])}
    with pytest.raises(ValueError, match=message):
        mlp.routed_mlp(**{**good, "fc1": (w1, b1), "fc2": (w2, b2), "activation": "gelu", **change})


def run_layer(on, monkeypatch, compiled=False, autocast=False):
    """(result and gradients, times the kernels ran)."""
    calls = []
    routed_mlp = mlp.routed_mlp
    monkeypatch.setattr(mlp, "routed_mlp", lambda *args: calls.append(1) or routed_mlp(*args))
    kernels.enable(on)
    try:
        torch.manual_seed(0)
        layer = SparseMoE(D, H, num_experts=E, num_selected_experts=K, capacity_factor=0.8, batch_priority=True)
        x = torch.randn(2, 9, D, requires_grad=True)
        mask = torch.arange(18).view(2, 9) < 14
        forward = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = forward(x, mask)
        (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    finally:
        kernels.enable(False)
        monkeypatch.setattr(mlp, "routed_mlp", routed_mlp)
    return [y, x.grad, *(p.grad for p in layer.parameters())], len(calls)


@pytest.mark.parametrize(("how", "tolerance"), [({}, 2e-6), ({"autocast": True}, 3e-2), ({"compiled": True}, 2e-6)])
def test_the_layer_gives_what_it_gives_without_them(how, tolerance, monkeypatch):
    plain, without = run_layer(False, monkeypatch, **{**how, "compiled": False})
    fused, calls = run_layer(True, monkeypatch, **how)
    assert without == 0
    assert calls > 0
    for a, b in zip(fused, plain, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def test_experts_that_the_kernels_do_not_know_go_the_plain_way():
    def can_run(dtype=torch.float32, prepare=lambda layer: None, **kwargs):
        layer = SparseMoE(D, H, num_experts=E, dtype=dtype, **kwargs)
        prepare(layer)
        return kernels.can_run(layer.experts, torch.zeros(S, D, dtype=dtype))

    kernels.enable()
    try:
        assert can_run()
        assert can_run(act_layer=torch.nn.SiLU)
        assert not can_run(torch.float64)
        assert not can_run(act_layer=torch.nn.Tanh)
        assert not can_run(norm_layer=torch.nn.LayerNorm)
        assert not can_run(drop=0.5)
        assert not can_run(expert_mlp="swiglu")
        assert not can_run(prepare=lambda layer: layer.experts.fc1.register_forward_hook(print))
        assert not can_run(prepare=lambda layer: layer.experts.register_forward_hook(print))
    finally:
        kernels.enable(False)
    assert not can_run()


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (torch.nn.GELU(), "gelu"),
        (torch.nn.GELU(approximate="tanh"), "gelu_tanh"),
        (timm.layers.GELU(), "gelu"),
        (timm.layers.GELUTanh(), "gelu_tanh"),
        (torch.nn.SiLU(), "silu"),
        (torch.nn.ReLU(), "relu"),
        (torch.nn.Identity(), "none"),
    ],
)
def test_an_activation_by_its_name_is_the_same_function(act, name):
    x = torch.linspace(-3, 3, 50)
    assert kernels.activation_name(act) == name
    assert torch.equal(act(x), ACTIVATIONS[name](x))


def test_importing_the_package_loads_no_kernels():
    assert vmoe is not None
    assert not LOADED_BY_IMPORT
