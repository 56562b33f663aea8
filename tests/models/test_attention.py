import math

import pytest
import torch
import torch.nn.functional as F

from vmoe.models import attention as module
from vmoe.models.attention import attention

H, d = 3, 4


def by_torch(qkv_BT3D, bias):
    q, k, v = qkv_BT3D.unflatten(2, (3, H, d)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


def inputs(T, dtype=torch.float64, masked=True, B=2):
    torch.manual_seed(0)
    bias = torch.zeros(B, 1, 1, T)
    bias[:1, ..., T // 2 :] = -math.inf
    return torch.randn(B, T, 3 * H * d).to(dtype).requires_grad_(), bias if masked else None


@pytest.fixture
def own_calls(monkeypatch):
    """How often the products are our own."""
    calls, apply = [], module._Attention.apply
    monkeypatch.setattr(module._Attention, "apply", lambda *args: calls.append(args) or apply(*args))
    return calls


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("dtype", "T", "tolerance", "own"),
    [
        (torch.float64, 9, 1e-12, True),
        (torch.float64, 70, 1e-12, False),
        (torch.float32, 9, 1e-5, True),
        (torch.float32, 70, 1e-5, False),
        (torch.bfloat16, 9, 3e-2, True),
        (torch.bfloat16, 70, 3e-2, True),
        (torch.float16, 9, 3e-3, True),
    ],
)
def test_it_is_pytorchs(dtype, T, tolerance, own, masked, own_calls):
    qkv, bias = inputs(T, dtype, masked)
    exact = qkv.detach().double().requires_grad_()
    y = attention(qkv, bias, H)
    expected = by_torch(exact, None if bias is None else bias.double())
    assert y.dtype == dtype
    assert len(own_calls) == own
    torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=tolerance)
    weight = torch.randn_like(expected)
    gradient = torch.autograd.grad((y * weight.to(dtype)).sum(), qkv)[0]
    exact_gradient = torch.autograd.grad((expected * weight).sum(), exact)[0]
    torch.testing.assert_close(gradient.double(), exact_gradient, atol=tolerance, rtol=tolerance)


def test_its_gradient():
    qkv, bias = inputs(3)
    assert torch.autograd.gradcheck(lambda qkv: attention(qkv, bias.double(), H), qkv)


def test_a_part_of_the_tokens(own_calls):
    """The patches of rows that go on with words: not contiguous."""
    qkv, _ = inputs(9)
    torch.testing.assert_close(attention(qkv[:, 2:7], None, H), by_torch(qkv[:, 2:7], None))
    assert len(own_calls) == 1


def test_scores_beyond_float16():
    """A query times its key is 4 · 150², more than float16 can hold; half of that, which the softmax sees, is not."""
    qkv = torch.full((1, 2, 3 * H * d), 150.0, dtype=torch.float16)
    y = attention(qkv, None, H)
    assert torch.equal(y, torch.full_like(y, 150.0))


def test_the_input_is_left_as_it_was():
    qkv, bias = inputs(5)
    before, bias_before = qkv.detach().clone(), bias.clone()
    attention(qkv, bias, H).sum().backward()
    assert torch.equal(qkv, before)
    assert torch.equal(bias, bias_before)


def test_an_empty_batch():
    qkv, _ = inputs(5, B=0, masked=False)
    y = attention(qkv, None, H)
    assert y.shape == (0, 5, H * d)
    y.sum().backward()
    assert qkv.grad.shape == qkv.shape


def test_under_autocast_the_type_is_that_of_the_input(own_calls):
    qkv, bias = inputs(5, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = attention(qkv, bias, H)
    assert y.dtype == torch.float32
    assert len(own_calls) == 1
    y.sum().backward()
    torch.testing.assert_close(y, by_torch(qkv, bias))


def test_function_transforms_take_pytorchs_way(own_calls):
    qkv, _ = inputs(5, masked=False)
    stacked = torch.stack([qkv.detach(), 2 * qkv.detach()])
    y = torch.func.vmap(lambda one: attention(one, None, H))(stacked)
    torch.testing.assert_close(y[1], by_torch(stacked[1], None))
    assert not own_calls


def test_a_traced_model_can_be_saved(tmp_path):
    qkv, _ = inputs(5, masked=False)
    traced = torch.jit.trace(lambda qkv: attention(qkv, None, H), qkv.detach())
    torch.jit.save(traced, str(tmp_path / "attention.pt"))
    torch.testing.assert_close(torch.jit.load(str(tmp_path / "attention.pt"))(qkv), attention(qkv, None, H))
