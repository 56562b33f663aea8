"""Linear layers and norms with parameters for each expert, applied to rows that are sorted by expert.

`torch.nn.functional.grouped_mm` takes meta and compiled tensors only in bfloat16 (since PyTorch 2.14 also in float16,
on some GPUs). All other types, and a CPU, have operators here: a loop over the experts that compilers, FLOP counters
and the meta device see as one operation.

Shapes, by suffix: E experts, R rows sorted by expert, F width of a norm, I and O a linear layer's widths.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import register_flop_formula

from vmoe.moe.autograd import needs_operators, on_eager_cpu


def local_experts(parameter: Tensor | None) -> Tensor | None:
    """The rows of a stacked parameter that belong to this process: all of them, unless it is a DTensor.

    Rows of all P processes pass through an expert, so its gradient is their sum; divided by P it is the mean, as usual.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    return _ScaleGradient.apply(parameter.to_local(), 1 / parameter.device_mesh.size())


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad * ctx.scale, None


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type of matrix multiplications with `x`: its own, or autocast's (the meta device knows no autocast)."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else x.dtype


class GroupedLinear(nn.Module):
    """E linear layers, each applied to its own run of rows: `weight` (E, O, I), `bias` (E, O) or None."""

    def __init__(
        self, num_experts: int, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights (each expert's own fans, as in the reference), almost-zero biases."""
        for weight_OI in self.weight:
            nn.init.xavier_uniform_(weight_OI)
        if self.bias is not None:
            nn.init.normal_(self.bias, std=1e-6)

    def forward(self, x_RI: Tensor, count_E: Tensor) -> Tensor:
        """(R, I) rows sorted by expert, (E,) rows of each -> (R, O); rows beyond the counts are unused."""
        dtype = compute_dtype(x_RI)
        bias_EO = None if self.bias is None else local_experts(self.bias).to(dtype)
        return grouped_linear(x_RI.to(dtype), local_experts(self.weight).to(dtype), bias_EO, count_E)


class GroupedLayerNorm(nn.Module):
    """A layer norm whose weight and bias, (E, F), are each expert's own; else as `like`, an `nn.LayerNorm`."""

    def __init__(self, num_experts: int, like: nn.Module, device=None, dtype=None) -> None:
        super().__init__()
        if not isinstance(like, nn.LayerNorm) or like.weight is None:
            raise TypeError(f"a norm inside the experts must be an nn.LayerNorm with weights, got {like}")
        self.eps = like.eps
        shape = (num_experts, *like.normalized_shape)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = None if like.bias is None else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Ones and zeros, as `nn.LayerNorm`."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x_RF: Tensor, count_E: Tensor) -> Tensor:
        """Rows sorted by expert -> the same shape."""
        weight_EF, bias_EF = local_experts(self.weight), local_experts(self.bias)
        y_RF = F.layer_norm(x_RF, x_RF.shape[-1:], eps=self.eps)
        expert_R = expert_of_rows(count_E.cumsum(0), x_RF.shape[0]).clamp(max=weight_EF.shape[0] - 1)
        y_RF = y_RF * weight_EF[expert_R]
        return (y_RF if bias_EF is None else y_RF + bias_EF[expert_R]).to(x_RF.dtype)


def grouped_linear(x_RI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, count_E: Tensor) -> Tensor:
    """(R, O): y[r] = W[e] x[r] + b[e], where e is the expert of row r; differentiable, any number of times.

    Rows beyond the sum of `count_E` are unused and reach no gradient. In the result they are copies of the first, so
    that whatever follows is as finite for them as for the others (zero where all are unused).
    """
    end_E = count_E.cumsum(0)
    if on_eager_cpu(x_RI.device) and int(end_E[-1]) == x_RI.shape[0]:
        return _GroupedLinear.apply(x_RI, weight_EOI, bias_EO, end_E)
    used_R1 = torch.arange(x_RI.shape[0], device=x_RI.device)[:, None] < end_E[-1]
    if torch.compiler.is_exporting() or needs_operators():
        y_RO = _by_segments(x_RI, weight_EOI, bias_EO, end_E)
    elif x_RI.dtype == torch.bfloat16 and not on_eager_cpu(x_RI.device):
        y_RO = _by_torch(x_RI, weight_EOI, bias_EO, end_E, used_R1)
    else:
        y_RO = _GroupedLinear.apply(x_RI, weight_EOI, bias_EO, end_E)
    if not y_RO.shape[0]:
        return y_RO
    return torch.where(used_R1, y_RO, torch.where(used_R1[:1], y_RO[:1], 0).detach())


def expert_of_rows(end_E: Tensor, num_rows: int) -> Tensor:
    """(R,) the expert of each row, given the end of each expert's rows; E for unused rows."""
    row_R = torch.arange(num_rows, device=end_E.device)
    if torch.compiler.is_exporting():  # ONNX has no such search
        return (row_R[:, None] >= end_E).sum(1)
    return torch.searchsorted(end_E, row_R, right=True)


def _by_torch(x_RI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, end_E: Tensor, used_R1: Tensor) -> Tensor:
    """By PyTorch's own operator, which leaves unused rows uninitialised, in the result and in the gradient."""
    x_RI = torch.where(used_R1, x_RI, 0)
    # Its kernel wants rows of a multiple of 16 bytes, that is 8 numbers. Zeros change no result.
    E, O, I = weight_EOI.shape
    if I % 8 or O % 8:
        x_RI, weight_EOI = F.pad(x_RI, (0, -I % 8)), F.pad(weight_EOI, (0, -I % 8, 0, -O % 8))
    y_RO = F.grouped_mm(x_RI, weight_EOI.transpose(1, 2), offs=end_E.to(torch.int32))[:, :O]
    return y_RO if bias_EO is None else y_RO + bias_EO[expert_of_rows(end_E, x_RI.shape[0]).clamp(max=E - 1)]


def _by_segments(x_RI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, end_E: Tensor) -> Tensor:
    """By operators that PyTorch and ONNX have, one linear layer per expert: an exported program needs no vmoe."""
    try:
        ends = end_E.tolist()
    except RuntimeError:  # inside vmap, where each entry of the batch has its own
        return _by_all_experts(x_RI, weight_EOI, bias_EO, end_E)
    R, start, sizes = x_RI.shape[0], 0, []
    for end in ends:
        torch._check(end >= start)
        sizes.append(end - start)
        start = end
    torch._check(start <= R)
    *segments, unused_MI = x_RI.split_with_sizes([*sizes, R - start])
    y_RO = [F.linear(x_MI, weight_EOI[e], None if bias_EO is None else bias_EO[e]) for e, x_MI in enumerate(segments)]
    y_RO = torch.cat([*y_RO, unused_MI.new_zeros(R - start, weight_EOI.shape[1])])
    torch._check(y_RO.shape[0] == R)
    return y_RO


def _by_all_experts(x_RI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, end_E: Tensor) -> Tensor:
    """All experts compute all rows, of which each keeps its own."""
    E, O, _ = weight_EOI.shape
    bias = None if bias_EO is None else bias_EO.flatten()
    y_REO = F.linear(x_RI, weight_EOI.flatten(0, 1), bias).unflatten(1, (E, O))
    expert_R = expert_of_rows(end_E, x_RI.shape[0]).clamp(max=E - 1)
    return y_REO.gather(1, expert_R[:, None, None].expand(-1, 1, O)).squeeze(1)


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
    weight_EOI, sum_EO = empty_sums(a_RO, b_RI, end_E, sums)
    start = 0
    for e, end in enumerate(end_E.tolist()):
        torch.mm(a_RO[start:end].t(), b_RI[start:end], out=weight_EOI[e])
        if sums:
            torch.sum(a_RO[start:end], 0, out=sum_EO[e])
        start = end
    return weight_EOI, sum_EO


def empty_sums(a_RO: Tensor, b_RI: Tensor, end_E: Tensor, sums: bool) -> tuple[Tensor, Tensor]:
    """Memory for the results of `_rows_by_rows`."""
    E, O = end_E.shape[0], a_RO.shape[1]
    return a_RO.new_empty(E, O, b_RI.shape[1]), a_RO.new_empty(E if sums else 0, O)


_rows_by_rows.register_fake(empty_sums)


@_rows_by_matrices.register_fake
def _(x_RI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, end_E: Tensor) -> Tensor:
    return x_RI.new_empty(x_RI.shape[0], weight_EOI.shape[1])


# The gradients are made of the same functions, so they can be differentiated again.
class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, end_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_RI, weight_EOI, end_E)
        return _rows_by_matrices(x_RI, weight_EOI, bias_EO, end_E)

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
    def forward(ctx, a_RO: Tensor, b_RI: Tensor, end_E: Tensor, sums: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(a_RO, b_RI, end_E)
        ctx.sums = sums
        return _rows_by_rows(a_RO, b_RI, end_E, sums)

    @staticmethod
    def backward(ctx, grad_EOI: Tensor, grad_EO: Tensor):
        a_RO, b_RI, end_E = ctx.saved_tensors
        grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_a = _GroupedLinear.apply(b_RI, grad_EOI, grad_EO if ctx.sums else None, end_E)
        if ctx.needs_input_grad[1]:
            grad_b = _GroupedLinear.apply(a_RO, grad_EOI.transpose(1, 2), None, end_E)
        return grad_a, grad_b, None, None


@register_flop_formula([torch.ops.vmoe.rows_by_matrices, torch.ops.vmoe.rows_by_rows])
def _flops(rows_shape, other_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * rows_shape[0] * rows_shape[1] * other_shape[1]  # of both: R, one width, the other width
