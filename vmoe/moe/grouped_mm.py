"""Linear layers of rows that are sorted by expert, each row with the matrix and bias of its expert.

`torch.nn.functional.grouped_mm` takes meta and compiled tensors only in bfloat16 (since PyTorch 2.14 also in float16,
on some GPUs). All other types, and a CPU, have operators here: a loop over the experts that compilers, FLOP counters
and the meta device see as one operation.

Shapes, by suffix: R rows sorted by expert, E experts, I and O widths.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def grouped_linear(x_RI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, count_E: Tensor) -> Tensor:
    """(R, O): y[r] = W[e] x[r] + b[e], where e is the expert of row r. Rows beyond the sum of `count_E` are unused.

    Unused rows of the result are copies of the first, so whatever follows is as finite for them as for the others (zero
    where all are unused). Differentiable, any number of times; what unused rows hold reaches no gradient.
    """
    end_E = count_E.cumsum(0)
    on_cpu = x_RI.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and int(end_E[-1]) == x_RI.shape[0]:
        return _GroupedLinear.apply(x_RI, weight_EOI, bias_EO, end_E)
    used_R1 = torch.arange(x_RI.shape[0], device=x_RI.device)[:, None] < end_E[-1]
    if x_RI.dtype == torch.bfloat16 and not on_cpu:
        y_RO = _by_torch(x_RI, weight_EOI, bias_EO, end_E, used_R1)
    else:
        y_RO = _GroupedLinear.apply(x_RI, weight_EOI, bias_EO, end_E)
    if not y_RO.shape[0]:
        return y_RO
    return torch.where(used_R1, y_RO, torch.where(used_R1[:1], y_RO[:1], 0).detach())


def expert_of_rows(end_E: Tensor, num_rows: int) -> Tensor:
    """(R,) the expert of each row, given the end of each expert's rows; E for unused rows."""
    return torch.searchsorted(end_E, torch.arange(num_rows, device=end_E.device), right=True)


def _by_torch(x_RI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, end_E: Tensor, used_R1: Tensor) -> Tensor:
    """By PyTorch's own operator, which leaves unused rows uninitialised, in the result and in the gradient."""
    x_RI = torch.where(used_R1, x_RI, 0)
    # Its kernel wants rows of a multiple of 16 bytes, that is 8 numbers. Zeros change no result.
    E, O, I = weight_EOI.shape
    if I % 8 or O % 8:
        x_RI, weight_EOI = F.pad(x_RI, (0, -I % 8)), F.pad(weight_EOI, (0, -I % 8, 0, -O % 8))
    y_RO = F.grouped_mm(x_RI, weight_EOI.transpose(1, 2), offs=end_E.to(torch.int32))[:, :O]
    return y_RO if bias_EO is None else y_RO + bias_EO[expert_of_rows(end_E, x_RI.shape[0]).clamp(max=E - 1)]


@torch.library.custom_op("vmoe::rows_by_matrices", mutates_args=())
def _rows_by_matrices(x_RI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, end_E: Tensor) -> Tensor:
    """y[r] = W[e] x[r] + b[e], where e is the expert of row r; zero in unused rows."""
    y_RO = x_RI.new_empty(x_RI.shape[0], weight_EOI.shape[1])
    start = 0
    for e, end in enumerate(end_E.tolist()):
        x_MI, w_IO, y_MO = x_RI[start:end], weight_EOI[e].t(), y_RO[start:end]
        if bias_EO is None:
            torch.mm(x_MI, w_IO, out=y_MO)
        else:
            torch.addmm(bias_EO[e], x_MI, w_IO, out=y_MO)
        start = end
    y_RO[start:].zero_()
    return y_RO


@torch.library.custom_op("vmoe::rows_by_rows", mutates_args=())
def _rows_by_rows(a_RO: Tensor, b_RI: Tensor, end_E: Tensor, sums: bool) -> tuple[Tensor, Tensor]:
    """Over the rows r of expert e: W[e] = the sum of a[r] b[r]ᵀ, and s[e] = that of a[r]; (0, O) without `sums`."""
    weight_EOI, sum_EO = _empty_sums(a_RO, b_RI, end_E, sums)
    start = 0
    for e, end in enumerate(end_E.tolist()):
        torch.mm(a_RO[start:end].t(), b_RI[start:end], out=weight_EOI[e])
        if sums:
            torch.sum(a_RO[start:end], 0, out=sum_EO[e])
        start = end
    return weight_EOI, sum_EO


def _empty_sums(a_RO: Tensor, b_RI: Tensor, end_E: Tensor, sums: bool) -> tuple[Tensor, Tensor]:
    E, O = end_E.shape[0], a_RO.shape[1]
    return a_RO.new_empty(E, O, b_RI.shape[1]), a_RO.new_empty(E if sums else 0, O)


_rows_by_rows.register_fake(_empty_sums)


@_rows_by_matrices.register_fake
def _(x_RI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, end_E: Tensor) -> Tensor:
    return x_RI.new_empty(x_RI.shape[0], weight_EOI.shape[1])


# Autograd functions on top, not `register_autograd`, which torch.func cannot differentiate. The gradients are made of
# the same functions, so they can be differentiated again.
class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(x_RI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, end_E: Tensor) -> Tensor:
        return _rows_by_matrices(x_RI, weight_EOI, bias_EO, end_E)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x_RI, weight_EOI, _, end_E = inputs
        ctx.save_for_backward(x_RI, weight_EOI, end_E)

    @staticmethod
    def backward(ctx, grad_RO: Tensor):
        x_RI, weight_EOI, end_E = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if needs_x:
            grad_x = _GroupedLinear.apply(grad_RO, weight_EOI.transpose(1, 2), None, end_E)
        if needs_weight or needs_bias:
            grad_weight, grad_bias = _RowsByRows.apply(grad_RO, x_RI, end_E, needs_bias)
        return grad_x, grad_weight if needs_weight else None, grad_bias if needs_bias else None, None


class _RowsByRows(torch.autograd.Function):
    @staticmethod
    def forward(a_RO: Tensor, b_RI: Tensor, end_E: Tensor, sums: bool) -> tuple[Tensor, Tensor]:
        return _rows_by_rows(a_RO, b_RI, end_E, sums)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        a_RO, b_RI, end_E, ctx.sums = inputs
        ctx.save_for_backward(a_RO, b_RI, end_E)

    @staticmethod
    def backward(ctx, grad_EOI: Tensor, grad_EO: Tensor):
        a_RO, b_RI, end_E = ctx.saved_tensors
        grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_a = _GroupedLinear.apply(b_RI, grad_EOI, grad_EO if ctx.sums else None, end_E)
        if ctx.needs_input_grad[1]:
            grad_b = _GroupedLinear.apply(a_RO, grad_EOI.transpose(1, 2), None, end_E)
        return grad_a, grad_b, None, None


@register_flop_formula(torch.ops.vmoe.rows_by_matrices)
def _rows_by_matrices_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * x_shape[0] * weight_shape[1] * weight_shape[2]


@register_flop_formula(torch.ops.vmoe.rows_by_rows)
def _rows_by_rows_flops(a_shape, b_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]
