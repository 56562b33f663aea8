"""Linear layers of rows that are sorted by expert, each row with the matrix and bias of its expert.

`torch.nn.functional.grouped_mm` multiplies so, but on meta and compiled tensors only in bfloat16 (up to PyTorch 2.13;
since 2.14 float16 too, on some GPUs). All other types, and a CPU, have operators of their own here: a loop over the
experts that writes each one's rows and gradients where they belong, and that compilers, FLOP counters and the meta
device see as one operation.

Shapes, by suffix: R rows sorted by expert, E experts, I and O widths.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def grouped_linear(x_RI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, count_E: Tensor) -> Tensor:
    """y[r] = W[e] x[r] + b[e], where e is the expert of row r.

    Args:
        x_RI: rows sorted by expert.
        weight_EOI: a matrix for each expert, laid out as `nn.Linear.weight`.
        bias_EO: a bias for each expert, or None.
        count_E: int64, rows of each expert. Rows beyond their sum are unused.

    Returns:
        (R, O); unused rows are copies of the first, so whatever follows is as finite for them as for the others (zero
        where all are unused). Differentiable, any number of times; what unused rows hold reaches no gradient.
    """
    end_E = count_E.cumsum(0)
    if torch.compiler.is_compiling():
        function, in_torch = _GroupedLinear, x_RI.dtype == torch.bfloat16
    else:
        function, in_torch = _GroupedLinearAndTangents, x_RI.dtype == torch.bfloat16 and x_RI.device.type != "cpu"
        if x_RI.device.type == "cpu" and int(end_E[-1]) == x_RI.shape[0]:
            return function.apply(x_RI, weight_EOI, bias_EO, end_E)
    used_R1 = torch.arange(x_RI.shape[0], device=x_RI.device)[:, None] < end_E[-1]
    if in_torch:
        y_RO = _by_torch(x_RI, weight_EOI, bias_EO, end_E, used_R1)
    else:
        y_RO = function.apply(x_RI, weight_EOI, bias_EO, end_E)
    if not y_RO.shape[0]:
        return y_RO
    return torch.where(used_R1, y_RO, torch.where(used_R1[:1], y_RO[:1], 0).detach())


def _by_torch(x_RI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, end_E: Tensor, used_R1: Tensor) -> Tensor:
    """By PyTorch's own operator, which leaves unused rows uninitialised, in the result and in the gradient."""
    x_RI = torch.where(used_R1, x_RI, 0)
    # Its kernel wants rows of a multiple of 16 bytes, that is 8 numbers. Zeros change no result.
    E, O, I = weight_EOI.shape
    if I % 8 or O % 8:
        x_RI, weight_EOI = F.pad(x_RI, (0, -I % 8)), F.pad(weight_EOI, (0, -I % 8, 0, -O % 8))
    y_RO = F.grouped_mm(x_RI, weight_EOI.transpose(1, 2), offs=end_E.to(torch.int32))[:, :O]
    if bias_EO is None:
        return y_RO
    row_R = torch.arange(x_RI.shape[0], device=x_RI.device)
    return y_RO + bias_EO[torch.searchsorted(end_E, row_R, right=True).clamp(max=E - 1)]


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
def _rows_by_rows(a_RO: Tensor, b_RI: Tensor, end_E: Tensor) -> Tensor:
    """W[e] = the sum of a[r] b[r]ᵀ over the rows r of expert e."""
    weight_EOI = a_RO.new_empty(end_E.shape[0], a_RO.shape[1], b_RI.shape[1])
    start = 0
    for weight_OI, end in zip(weight_EOI, end_E.tolist(), strict=True):
        torch.mm(a_RO[start:end].t(), b_RI[start:end], out=weight_OI)
        start = end
    return weight_EOI


@torch.library.custom_op("vmoe::sums_of_rows", mutates_args=())
def _sums_of_rows(x_RO: Tensor, end_E: Tensor) -> Tensor:
    """s[e] = the sum of x[r] over the rows r of expert e."""
    sum_EO = x_RO.new_empty(end_E.shape[0], x_RO.shape[1])
    start = 0
    for sum_O, end in zip(sum_EO, end_E.tolist(), strict=True):
        torch.sum(x_RO[start:end], 0, out=sum_O)
        start = end
    return sum_EO


@_rows_by_matrices.register_fake
def _(x_RI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, end_E: Tensor) -> Tensor:
    return x_RI.new_empty(x_RI.shape[0], weight_EOI.shape[1])


@_rows_by_rows.register_fake
def _(a_RO: Tensor, b_RI: Tensor, end_E: Tensor) -> Tensor:
    return a_RO.new_empty(end_E.shape[0], a_RO.shape[1], b_RI.shape[1])


@_sums_of_rows.register_fake
def _(x_RO: Tensor, end_E: Tensor) -> Tensor:
    return x_RO.new_empty(end_E.shape[0], x_RO.shape[1])


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
        ctx.save_for_forward(x_RI, weight_EOI, end_E)

    @staticmethod
    def backward(ctx, grad_RO: Tensor):
        x_RI, weight_EOI, end_E = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _GroupedLinear.apply(grad_RO, weight_EOI.transpose(1, 2), None, end_E)
        if ctx.needs_input_grad[1]:
            grad_weight = _RowsByRows.apply(grad_RO, x_RI, end_E)
        if ctx.needs_input_grad[2]:
            grad_bias = _SumsOfRows.apply(grad_RO, end_E)
        return grad_x, grad_weight, grad_bias, None


class _GroupedLinearAndTangents(_GroupedLinear):
    """The same with forward-mode derivatives; compilers take no function that has them."""

    @staticmethod
    def jvp(ctx, x_RI: Tensor | None, weight_EOI: Tensor | None, bias_EO: Tensor | None, _) -> Tensor:
        own_x_RI, own_weight_EOI, end_E = ctx.saved_tensors
        parts = []
        if x_RI is not None or bias_EO is not None:
            x_RI = torch.zeros_like(own_x_RI) if x_RI is None else x_RI
            parts.append(_GroupedLinearAndTangents.apply(x_RI, own_weight_EOI, bias_EO, end_E))
        if weight_EOI is not None:
            parts.append(_GroupedLinearAndTangents.apply(own_x_RI, weight_EOI, None, end_E))
        return sum(parts)


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
            grad_a = _GroupedLinear.apply(b_RI, grad_EOI, None, end_E)
        if ctx.needs_input_grad[1]:
            grad_b = _GroupedLinear.apply(a_RO, grad_EOI.transpose(1, 2), None, end_E)
        return grad_a, grad_b, None


class _SumsOfRows(torch.autograd.Function):
    @staticmethod
    def forward(x_RO: Tensor, end_E: Tensor) -> Tensor:
        return _sums_of_rows(x_RO, end_E)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x_RO, end_E = inputs
        ctx.save_for_backward(end_E)
        ctx.num_rows = x_RO.shape[0]

    @staticmethod
    def backward(ctx, grad_EO: Tensor):
        (end_E,) = ctx.saved_tensors
        row_R = torch.arange(ctx.num_rows, device=grad_EO.device)
        expert_R = torch.searchsorted(end_E, row_R, right=True)
        zero_1O = torch.zeros_like(grad_EO[:1])  # of unused rows
        return torch.cat([grad_EO, zero_1O])[expert_R], None


@register_flop_formula(torch.ops.vmoe.rows_by_matrices)
def _rows_by_matrices_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * x_shape[0] * weight_shape[1] * weight_shape[2]


@register_flop_formula(torch.ops.vmoe.rows_by_rows)
def _rows_by_rows_flops(a_shape, b_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]
