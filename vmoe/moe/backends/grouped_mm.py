"""Matrix multiplication of rows that are sorted by expert, each row with the matrix of its expert.

`torch.nn.functional.grouped_mm` does this. But on meta and compiled tensors it takes only bfloat16 (up to PyTorch 2.13;
since 2.14 float16 too, on some GPUs). For all other types this module has operators of its own: a loop over the experts
that compilers, FLOP counters and the meta device see as one operation.

Shapes, by suffix: R rows sorted by expert, E experts, I and O widths.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def grouped_mm(x_RI: Tensor, weight_EOI: Tensor, end_E: Tensor) -> Tensor:
    """y[r] = W[e] x[r], where e is the expert of row r.

    Args:
        x_RI: rows sorted by expert.
        weight_EOI: a matrix for each expert, laid out as `nn.Linear.weight`.
        end_E: (E,) int64, the index after the last row of each expert. Rows from `end_E[-1]` on are unused.

    Returns:
        (R, O), zero in unused rows. Differentiable in rows and weights; what unused rows hold reaches no gradient.
    """
    if x_RI.dtype != torch.bfloat16:
        return _RowsByMatrices.apply(x_RI, weight_EOI, end_E)
    # PyTorch leaves unused rows uninitialised, both in the result and in the gradient of the rows.
    used_R1 = torch.arange(x_RI.shape[0], device=x_RI.device)[:, None] < end_E[-1]
    x_RI = torch.where(used_R1, x_RI, 0)
    # Its kernel wants rows of whole 16 bytes, that is 8 numbers. Zeros change no product.
    _, O, I = weight_EOI.shape
    if I % 8 or O % 8:
        x_RI, weight_EOI = F.pad(x_RI, (0, -I % 8)), F.pad(weight_EOI, (0, -I % 8, 0, -O % 8))
    y_RO = F.grouped_mm(x_RI, weight_EOI.transpose(1, 2), offs=end_E.to(torch.int32))[:, :O]
    return torch.where(used_R1, y_RO, 0)


@torch.library.custom_op("vmoe::rows_by_matrices", mutates_args=())
def _rows_by_matrices(x_RI: Tensor, weight_EOI: Tensor, end_E: Tensor) -> Tensor:
    """y[r] = W[e] x[r], where e is the expert of row r; zero in unused rows."""
    y_RO = x_RI.new_zeros(x_RI.shape[0], weight_EOI.shape[1])
    start = 0
    for weight_OI, end in zip(weight_EOI, end_E.tolist(), strict=True):
        torch.mm(x_RI[start:end], weight_OI.t(), out=y_RO[start:end])
        start = end
    return y_RO


@torch.library.custom_op("vmoe::rows_by_rows", mutates_args=())
def _rows_by_rows(a_RO: Tensor, b_RI: Tensor, end_E: Tensor) -> Tensor:
    """W[e] = the sum of a[r] b[r]ᵀ over the rows r of expert e."""
    weight_EOI = a_RO.new_empty(end_E.shape[0], a_RO.shape[1], b_RI.shape[1])
    start = 0
    for weight_OI, end in zip(weight_EOI, end_E.tolist(), strict=True):
        torch.mm(a_RO[start:end].t(), b_RI[start:end], out=weight_OI)
        start = end
    return weight_EOI


@_rows_by_matrices.register_fake
def _(x_RI: Tensor, weight_EOI: Tensor, end_E: Tensor) -> Tensor:
    return x_RI.new_empty(x_RI.shape[0], weight_EOI.shape[1])


@_rows_by_rows.register_fake
def _(a_RO: Tensor, b_RI: Tensor, end_E: Tensor) -> Tensor:
    return a_RO.new_empty(end_E.shape[0], a_RO.shape[1], b_RI.shape[1])


# Autograd functions on top, not `register_autograd`, which torch.func cannot differentiate. Each one's gradient is made
# of both, so they can be differentiated any number of times.
class _RowsByMatrices(torch.autograd.Function):
    @staticmethod
    def forward(x_RI: Tensor, weight_EOI: Tensor, end_E: Tensor) -> Tensor:
        return _rows_by_matrices(x_RI, weight_EOI, end_E)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad_RO: Tensor):
        x_RI, weight_EOI, end_E = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _RowsByMatrices.apply(grad_RO, weight_EOI.transpose(1, 2), end_E)
        if ctx.needs_input_grad[1]:
            grad_weight = _RowsByRows.apply(grad_RO, x_RI, end_E)
        return grad_x, grad_weight, None


class _RowsByRows(torch.autograd.Function):
    @staticmethod
    def forward(a_RO: Tensor, b_RI: Tensor, end_E: Tensor) -> Tensor:
        return _rows_by_rows(a_RO, b_RI, end_E)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad_EOI: Tensor):
        a_RO, b_RI, end_E = ctx.saved_tensors
        grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_a = _RowsByMatrices.apply(b_RI, grad_EOI, end_E)
        if ctx.needs_input_grad[1]:
            grad_b = _RowsByMatrices.apply(a_RO, grad_EOI.transpose(1, 2), end_E)
        return grad_a, grad_b, None


@register_flop_formula(torch.ops.vmoe.rows_by_matrices)
def _rows_by_matrices_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * x_shape[0] * weight_shape[1] * weight_shape[2]


@register_flop_formula(torch.ops.vmoe.rows_by_rows)
def _rows_by_rows_flops(a_shape, b_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]
