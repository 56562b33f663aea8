"""tanh-GELU with its slope against float64 and PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

from vmoe.moe import gelu
from vmoe.moe.gelu import TanhGELU, activation_and_slope, scratch

TYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 4e-7), (torch.bfloat16, 4.1e-3), (torch.float16, 5.1e-4)]
)


@pytest.fixture(autouse=True)
def few_elements_too(monkeypatch):
    monkeypatch.setattr(gelu, "LEAST", 1)


def exact(h):
    """The activation and its slope in float64."""
    h = h.detach().double().requires_grad_()
    a = F.gelu(h, approximate="tanh")
    return a.detach(), torch.autograd.grad(a.sum(), h)[0]


@TYPES
def test_it_is_exact_to_the_last_digits(dtype, tolerance):
    """Relative to the larger of the value and what the slope can be, so that both count near zero."""
    h = torch.cat([torch.linspace(-12, 12, 20_001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 300.0, -300.0])]).to(dtype)
    a, slope = torch.empty_like(h), torch.empty_like(h)
    activation_and_slope(h, a, slope, scratch(h, h.numel()))
    for ours, true, more in zip((a, slope), exact(h), (1, 8), strict=True):
        error = (ours.double() - true).abs() / true.abs().clamp(min=0.1)
        assert error.max() <= tolerance * (more if dtype == torch.float32 else 1)


def test_large_numbers_saturate():
    h = torch.tensor([1e4, -1e4, 1e12, -1e12])
    a, slope = torch.empty_like(h), torch.empty_like(h)
    activation_and_slope(h, a, slope, scratch(h, 4))
    assert a.tolist() == [h[0], 0, h[2], 0]
    assert slope.tolist() == [1, 0, 1, 0]


@given(st.integers(0, 40), st.integers(1, 17), st.sampled_from(["new", "activation", "slope"]))
@settings(max_examples=60)
def test_chunks_of_any_size_and_results_in_place(numel, chunk, in_place):
    h = torch.linspace(-3, 3, numel)
    expected = [true.float() for true in exact(h)]
    a, slope = (h if in_place == name else torch.empty_like(h) for name in ("activation", "slope"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gelu, "CHUNK", chunk)
        activation_and_slope(h, a, slope, scratch(h, numel))
    torch.testing.assert_close([a, slope], expected)


@TYPES
@pytest.mark.parametrize("view", [lambda h: h, lambda h: h.T, lambda h: h[:, ::2], lambda h: h[:0]])
def test_the_module_is_pytorchs(dtype, tolerance, view):
    h = torch.randn(6, 10).to(dtype)
    weight = torch.linspace(-1, 1, view(h).numel()).view(view(h).shape).to(dtype)
    results = []
    for act in (TanhGELU(), torch.nn.GELU("tanh")):
        own = h.clone().requires_grad_()
        a = act(view(own))
        (a * weight).sum().backward()
        results.append((a.detach(), own.grad))
    torch.testing.assert_close(*results, rtol=2 * tolerance, atol=2 * tolerance)


def test_it_keeps_one_tensor_for_the_backward_pass():
    h, kept = torch.randn(4, 5, requires_grad=True), []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor):
        TanhGELU()(h)
    assert kept == [20]


@pytest.fixture
def own_calls(monkeypatch):
    calls, function = [], gelu.activation_and_slope
    monkeypatch.setattr(gelu, "activation_and_slope", lambda *args: calls.append(args) or function(*args))
    return calls


def test_pytorchs_own_where_somebody_looks_or_nothing_learns(own_calls):
    act, h = TanhGELU(), torch.randn(3, 4, requires_grad=True)
    expected, slope = exact(h)
    with torch.no_grad():
        torch.testing.assert_close(act(h), expected.float())
    torch.testing.assert_close(act(h.detach()), expected.float())
    assert torch.autograd.gradgradcheck(act, h.detach().double().requires_grad_())
    torch.testing.assert_close(torch.func.grad(lambda h: act(h).sum())(h), slope.float())
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(act(forward_ad.make_dual(h, torch.ones_like(h)))).tangent
    torch.testing.assert_close(tangent, slope.float())
    assert torch.jit.trace(act, h).graph is not None
    assert act(h.to("meta")).is_meta
    assert not own_calls
    act(h).sum().backward()
    assert len(own_calls) == 1
    torch.testing.assert_close(h.grad, slope.float())


def test_pytorchs_own_for_few_elements(own_calls, monkeypatch):
    monkeypatch.setattr(gelu, "LEAST", 13)
    TanhGELU()(torch.randn(3, 4, requires_grad=True))
    assert not own_calls
    TanhGELU()(torch.randn(13, requires_grad=True))
    assert len(own_calls) == 1


def test_a_second_derivative_is_an_error_not_a_zero():
    h = torch.randn(3, requires_grad=True)
    (slope,) = torch.autograd.grad(TanhGELU()(h).square().sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()
