"""GELU in its form with tanh, in training on a CPU: the activation and its slope in one go.

PyTorch computes the slow part, tanh, in the forward pass and again in the backward pass. Here the slope is computed
with the activation and kept in place of the hidden layer, so the backward pass is one multiplication. Without a
gradient PyTorch's kernel computes the activation, whose last digits differ.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmoe.moe.onednn import is_observed

# Elements that take all steps together: enough for several cores, few enough for their caches.
CHUNK = 2**19
# For fewer elements the calls take longer than the tanh.
LEAST = 2**16
_ROOT = math.sqrt(2 / math.pi)
_CUBE = 0.044715


def scratch(like: Tensor, numel: int) -> Tensor:
    """What `activation_and_slope` needs for up to that many elements."""
    return like.new_empty(4, min(CHUNK, numel), dtype=torch.float32)


def activation_and_slope(h: Tensor, a: Tensor, slope: Tensor, buffers: Tensor) -> None:
    """Writes GELU(h) to `a` and its derivative to `slope`, both computed in float32.

    With u = x + 0.044715 x³ and c = 2 sqrt(2 / π): GELU(x) = x σ(c u), GELU'(x) = σ + σ (1 - σ) c (3 u - 2 x). The
    derivative is not a number for |x| > 7e12, whose cube is infinite (PyTorch's: for |x| > 1e19).

    Args:
        h: of float32 or half precision; contiguous, as the others.
        a: may be `h`, and so may `slope`.
        buffers: of `scratch`.

    Source: GELU (arXiv 1606.08415), section 2; tanh(z) = 2 σ(2 z) - 1.
    """
    h, a, slope = (tensor.view(-1) for tensor in (h, a, slope))
    for start in range(0, h.numel(), CHUNK):
        own = slice(start, start + CHUNK)
        x, u, s, t = buffers[:, : h[own].numel()]
        x.copy_(h[own])
        torch.addcmul(x, torch.mul(x, x, out=u), x, value=_CUBE, out=u)
        torch.sigmoid(u.mul_(2 * _ROOT), out=s)  # u is c u from here on
        a[own].copy_(torch.mul(x, s, out=t))
        torch.sub(u, x, alpha=4 * _ROOT / 3, out=u)
        torch.ops.aten.sigmoid_backward.grad_input(u, s, grad_input=t)  # u s (1 - s)
        slope[own].copy_(torch.add(s, t, alpha=3, out=t))


def keeps_slope(dtype: torch.dtype, numel: int) -> bool:
    """`activation_and_slope` is as exact as the type, and quicker than PyTorch for that many elements."""
    return dtype.is_floating_point and dtype.itemsize <= 4 and numel >= LEAST


class _TanhGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        h = h.contiguous()
        a, slope = torch.empty_like(h), torch.empty_like(h)
        activation_and_slope(h, a, slope, scratch(h, h.numel()))
        ctx.save_for_backward(slope)
        return a

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        return grad * slope


class TanhGELU(nn.GELU):
    """`nn.GELU(approximate="tanh")`; on a CPU its gradient can not be differentiated again."""

    def __init__(self) -> None:
        super().__init__("tanh")

    def forward(self, h: Tensor) -> Tensor:
        """(...) -> (...), element by element."""
        learns = torch.is_grad_enabled() and h.requires_grad
        plain = type(h) is Tensor and h.device.type == "cpu"
        if learns and plain and keeps_slope(h.dtype, h.numel()) and not is_observed():
            return _TanhGELU.apply(h)
        return F.gelu(h, approximate="tanh")
