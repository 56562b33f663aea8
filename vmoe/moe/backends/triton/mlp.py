"""The whole MLP of the experts, from tokens to tokens, on the kernels of `products.py`, forward and backward.

Shapes, by suffix: S tokens, R rows sorted by expert, K rows of a token, D model width, F hidden width, O the result's
width, E experts, T tiles, C blocks of columns.
"""

import torch
from torch import Tensor

from vmoe.moe.backends.triton.products import (
    ACTIVATIONS,
    gather_sum,
    grouped_activation_gradient,
    grouped_linear,
    grouped_weight_gradient,
)
from vmoe.moe.backends.triton.tiles import block_rows, tile_table


def routed_mlp(
    x_SD: Tensor,
    token_R: Tensor | None,
    row_SK: Tensor | None,
    weight_R: Tensor | None,
    count_E: Tensor,
    fc1: tuple[Tensor, Tensor | None],
    fc2: tuple[Tensor, Tensor | None],
    activation: str,
) -> Tensor:
    """y_s = sum of weight_r · (activation(x_s W1ᵀ + b1) W2ᵀ + b2) over the rows r of token s, of their experts.

    Neither the gathered tokens nor the activations are kept for the backward pass, only the hidden layer before its
    activation; the rows before they are weighed exist nowhere.

    Args:
        x_SD: tokens, in float32, bfloat16 or float16.
        token_R: token of each row, rows sorted by expert; -1: unused, which come last. None: the tokens are the rows.
        row_SK: the same seen from the tokens: the rows of each, -1: none. None with `token_R`.
        weight_R: weight of each row, differentiable; None: one.
        count_E: rows of each expert, on the device.
        fc1: weight (E, F, D) and bias (E, F) or None, in the tokens' dtype.
        fc2: weight (E, O, F) and bias (E, O) or None, in the tokens' dtype.
        activation: "none", "gelu", "gelu_tanh", "silu" or "relu".

    Returns:
        (S, O) in the tokens' dtype, zero for tokens without a row and, without `token_R`, for rows beyond the counts.
        The gradient can not be differentiated again.

    Raises:
        ValueError: for an unknown activation, dtypes that differ or have no kernel, or one index without the other.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"the activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if (token_R is None) != (row_SK is None):
        raise ValueError("token_R and row_SK are two sides of one index: give both or neither")
    dtypes = {t.dtype for t in (x_SD, *fc1, *fc2) if t is not None}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.bfloat16, torch.float16}:
        names = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(f"tokens, weights and biases must all be float32, bfloat16 or float16, got {names}")
    R, E = x_SD.shape[0] if token_R is None else token_R.shape[0], count_E.shape[0]
    block_m = block_rows(R, E)
    tile_T3, end_E = tile_table(count_E, R, block_m), count_E.cumsum(0).int()
    (w1_EFD, b1_EF), (w2_EOF, b2_EO) = fc1, fc2
    # The kernels take the strides of the tokens and of the matrices as they are.
    differentiable = (x_SD, _contiguous(weight_R), w1_EFD, _contiguous(b1_EF), w2_EOF, _contiguous(b2_EO))
    indices = (_contiguous(token_R), _contiguous(row_SK), tile_T3, end_E)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable):
        return _RoutedMLP.apply(*differentiable, *indices, block_m, activation)
    return _forward(*differentiable, *indices, block_m, activation, keep_hidden=False)[0]


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _forward(
    x_SD, weight_R, w1_EFD, b1_EF, w2_EOF, b2_EO, token_R, row_SK, tile_T3, end_E, block_m, activation, keep_hidden
) -> tuple[Tensor, Tensor]:
    R = x_SD.shape[0] if token_R is None else token_R.shape[0]
    a_RF, h_RF = grouped_linear(
        x_SD, token_R, w1_EFD, b1_EF, None, tile_T3, R, block_m, activation, keep_hidden=keep_hidden
    )
    y_RO, _ = grouped_linear(a_RF, None, w2_EOF, b2_EO, weight_R, tile_T3, R, block_m, "none", keep_hidden=False)
    return (y_RO if row_SK is None else gather_sum(y_RO, row_SK)), h_RF


class _RoutedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x_SD, weight_R, w1_EFD, b1_EF, w2_EOF, b2_EO, token_R, row_SK, tile_T3, end_E, block_m, activation
    ):
        inputs = (x_SD, weight_R, w1_EFD, b1_EF, w2_EOF, b2_EO, token_R, row_SK, tile_T3, end_E)
        y_SO, h_RF = _forward(*inputs, block_m, activation, keep_hidden=True)
        ctx.save_for_backward(*inputs, h_RF)
        ctx.block_m, ctx.activation = block_m, activation
        return y_SO

    @staticmethod
    def backward(ctx, g_SO):
        if torch.is_grad_enabled():
            raise RuntimeError("the Triton kernels have no second derivatives: leave VMOE_TRITON out")
        x_SD, weight_R, w1_EFD, _, w2_EOF, b2_EO, token_R, row_SK, tile_T3, end_E, h_RF = ctx.saved_tensors
        needs_x, needs_weight, needs_w1, needs_b1, needs_w2, needs_b2 = ctx.needs_input_grad[:6]
        grad_x = grad_weight = grad_w1 = grad_b1 = grad_w2 = grad_b2 = None
        R = h_RF.shape[0]
        grad_h_RF, a_RF, dot_RC = grouped_activation_gradient(
            g_SO, token_R, w2_EOF.transpose(1, 2), weight_R, h_RF, tile_T3, ctx.block_m, ctx.activation
        )
        if needs_weight:
            grad_weight = dot_RC.sum(1)
            if b2_EO is not None:
                # g · b2, by one small product instead of a gathered copy of g.
                row_R = torch.arange(R, dtype=end_E.dtype, device=h_RF.device)
                expert_R = torch.searchsorted(end_E, row_R, right=True)
                real_R = expert_R < end_E.shape[0]
                source_R = row_R if token_R is None else token_R
                g_SE = (g_SO @ b2_EO.t()).float()
                g_R = g_SE[source_R.clamp(min=0), expert_R.clamp(max=end_E.shape[0] - 1)]
                grad_weight = torch.where(real_R & (source_R >= 0), grad_weight + g_R, 0)
            grad_weight = grad_weight.to(weight_R.dtype)
        if needs_w2 or needs_b2:
            grad_w2, grad_b2 = grouped_weight_gradient(g_SO, token_R, a_RF, None, weight_R, end_E, bias=needs_b2)
        del a_RF
        if needs_w1 or needs_b1:
            grad_w1, grad_b1 = grouped_weight_gradient(grad_h_RF, None, x_SD, token_R, None, end_E, bias=needs_b1)
        if needs_x:
            grad_x, _ = grouped_linear(
                grad_h_RF,
                None,
                w1_EFD.transpose(1, 2),
                None,
                None,
                tile_T3,
                R,
                ctx.block_m,
                "none",
                keep_hidden=False,
            )
            if row_SK is not None:
                grad_x = gather_sum(grad_x, row_SK)
        gradients = (grad_x, grad_weight, grad_w1, grad_b1, grad_w2, grad_b2)
        return *(g if need else None for g, need in zip(gradients, ctx.needs_input_grad[:6])), *[None] * 6
