"""Attention over many sequences at once: PyTorch's, and on a CPU a quicker way for short ones and for half precision.

Shapes, by suffix: B batch, T tokens, H heads, d width of a head, D = H·d, S = B·H sequences of one head.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

# In float32 and float64, PyTorch's own kernel is the quicker one for longer sequences.
MAX_TOKENS_FULL_PRECISION = 64


def attention(qkv_BT3D: Tensor, bias_B11T: Tensor | None, num_heads: int) -> Tensor:
    """softmax(q kᵀ / sqrt(d) + bias) v of each head.

    On a CPU, PyTorch's kernels are not made for short sequences and for half precision: plain products with a softmax
    in float32 take half of their time (benchmarks/NOTES.md).

    Args:
        qkv_BT3D: queries, keys and values of all heads.
        bias_B11T: added to the scores; None: nothing.
        num_heads: H.

    Returns:
        (B, T, D). On a CPU the gradient can not be differentiated again.
    """
    T, dtype = qkv_BT3D.shape[1], qkv_BT3D.dtype
    in_torch = (
        qkv_BT3D.device.type != "cpu"
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or (dtype.itemsize >= 4 and T > MAX_TOKENS_FULL_PRECISION)
    )
    if in_torch:
        q_BHTd, k_BHTd, v_BHTd = rearrange(qkv_BT3D, "b t (three h d) -> three b h t d", three=3, h=num_heads)
        bias_B11T = None if bias_B11T is None else bias_B11T.to(dtype)
        y_BHTd = F.scaled_dot_product_attention(q_BHTd, k_BHTd, v_BHTd, attn_mask=bias_B11T)
        return rearrange(y_BHTd, "b h t d -> b t (h d)")
    with torch.autocast("cpu", enabled=False):
        return _Attention.apply(qkv_BT3D, bias_B11T, num_heads)


class _Attention(torch.autograd.Function):
    """The plain products on heads that lie one after the other, so that no product copies them once more."""

    @staticmethod
    def forward(ctx, qkv_BT3D, bias_B11T, num_heads):
        (B, T, _), H, dtype = qkv_BT3D.shape, num_heads, qkv_BT3D.dtype
        heads_3STd = _rows_to_heads(qkv_BT3D, 3, H)
        q_STd, k_STd, v_STd = heads_3STd
        scale = q_STd.shape[-1] ** -0.5
        score_STT = _scaled_product(scale, q_STd, k_STd.transpose(1, 2))
        score_STT = score_STT.to(torch.promote_types(dtype, torch.float32))
        if bias_B11T is not None:
            score_STT.view(B, H, T, T).add_(bias_B11T)
        share_STT = score_STT.softmax(-1)
        ctx.save_for_backward(heads_3STd, share_STT)
        ctx.num_heads = H
        return _heads_to_rows(torch.bmm(share_STT.to(dtype), v_STd)[None], H)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_BTD):
        heads_3STd, share_STT = ctx.saved_tensors
        q_STd, k_STd, v_STd = heads_3STd
        grad_STd = _rows_to_heads(grad_BTD, 1, ctx.num_heads)[0]
        grad_3STd = torch.empty_like(heads_3STd)
        torch.bmm(share_STT.to(grad_STd.dtype).transpose(1, 2), grad_STd, out=grad_3STd[2])
        grad_share_STT = torch.bmm(grad_STd, v_STd.transpose(1, 2)).to(share_STT.dtype)
        grad_score_STT = torch._softmax_backward_data(grad_share_STT, share_STT, -1, share_STT.dtype).to(grad_STd.dtype)
        scale = q_STd.shape[-1] ** -0.5
        _scaled_product(scale, grad_score_STT, k_STd, grad_3STd[0])
        _scaled_product(scale, grad_score_STT.transpose(1, 2), q_STd, grad_3STd[1])
        return _heads_to_rows(grad_3STd, ctx.num_heads), None, None


def _scaled_product(scale: float, a_SXY: Tensor, b_SYZ: Tensor, out_SXZ: Tensor | None = None) -> Tensor:
    """scale · a b, scaled before it is rounded: float16 has little room."""
    if out_SXZ is None:
        out_SXZ = a_SXY.new_empty(*a_SXY.shape[:2], b_SYZ.shape[2])
    return torch.baddbmm(out_SXZ, a_SXY, b_SYZ, beta=0, alpha=scale, out=out_SXZ)


def _rows_to_heads(x_BTND: Tensor, number: int, num_heads: int) -> Tensor:
    """(B, T, N·D) -> (N, S, T, d), contiguous and new."""
    B, T, width = x_BTND.shape
    d = width // (number * num_heads)
    heads = x_BTND.new_empty(number, B * num_heads, T, d)
    heads.view(number, B, num_heads, T, d).copy_(x_BTND.unflatten(2, (number, num_heads, d)).permute(2, 0, 3, 1, 4))
    return heads


def _heads_to_rows(x_NSTd: Tensor, num_heads: int) -> Tensor:
    """`_rows_to_heads` undone."""
    number, S, T, d = x_NSTd.shape
    rows = x_NSTd.unflatten(1, (S // num_heads, num_heads)).permute(1, 3, 0, 2, 4)
    return rows.reshape(S // num_heads, T, number * num_heads * d)
