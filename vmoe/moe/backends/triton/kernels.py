"""The experts on Triton kernels, for CUDA. Never measured on a GPU: only where the backend "triton" is asked for.

A tile is a run of at most BLOCK_M rows of one expert; which rows and whose is looked up in a table on the device
(`tile_table`), so that the grid depends on shapes alone and the host never waits for a count. No kernel adds with
atomics. Each kernel has an operator `vmoe::...` around it, so that `torch.compile` takes it as it is. The order of the
tiles is that of Triton's tutorial on matrix multiplication.

Shapes, by suffix: R rows sorted by expert, E experts, T tiles, I and O widths of a layer's input and output; D, F, O
those of the experts. Inside kernels M, N and K are the blocks of a matrix multiplication.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from vmoe.moe.backends.triton import activation_name
from vmoe.moe.grouped import compute_dtype, empty_sums, local_experts

# Whether Triton interprets its kernels on the CPU (TRITON_INTERPRET=1 when this module was imported).
INTERPRETED = triton.knobs.runtime.interpret

# Blocks of a multiplication (columns, inner) and the launch's options. Usual sizes, not yet tuned on a GPU.
HALF = {"BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}
FULL = {"BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}
MAX_BLOCK_M = 128
# Tiles of rows that go through all columns together, to find their weights in the cache.
GROUP_M = 8


def tile_table(count_E: Tensor, num_rows: int, block_m: int) -> Tensor:
    """Tiles that cover all rows: (T, 3) int32, the expert of each, its first row and the end of its expert's rows.

    T is the most there can be; a tile that is not needed starts at or behind the end. Rows beyond the counts belong to
    an expert E, which gives zeros.
    """
    E = count_E.shape[0]
    count_E1 = torch.cat([count_E, (num_rows - count_E.sum()).view(1)])
    end_E1 = count_E1.cumsum(0)
    tiles_E1 = (count_E1 + block_m - 1) // block_m
    last_E1 = tiles_E1.cumsum(0)
    T = (num_rows + (E + 1) * (block_m - 1)) // block_m
    tile_T = torch.arange(T, device=count_E.device)
    expert_T = torch.searchsorted(last_E1, tile_T, right=True).clamp(max=E)
    number_T = tile_T - (last_E1 - tiles_E1)[expert_T]
    end_T = end_E1[expert_T]
    return torch.stack([expert_T, end_T - count_E1[expert_T] + number_T * block_m, end_T], dim=1).int()


@triton.jit
def _load(ptr, row_M, column_N, row_stride, column_stride, rows_M, columns_N):
    """The block of a matrix at these rows and columns, zero where either is outside."""
    at_MN = row_M[:, None] * row_stride + column_N[None, :] * column_stride
    return tl.load(ptr + at_MN, mask=rows_M[:, None] & columns_N[None, :], other=0.0)


@triton.jit
def _dot(x_MK, w_KN, acc_MN, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:  # the interpreter has no bfloat16; in float32 the products are the same
        x_MK, w_KN = x_MK.to(tl.float32), w_KN.to(tl.float32)
    return tl.dot(x_MK, w_KN, acc_MN, input_precision=PRECISION)


@triton.jit
def _activate(h, ACTIVATION: tl.constexpr):
    """The activation and its derivative, in float32."""
    if ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))
        return h * cdf, cdf + h * 0.3989422804014327 * tl.exp(-0.5 * h * h)
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh u) = sigmoid(2u)
        s = tl.sigmoid(h * (1.5957691216057308 + 0.07135481282553983 * h * h))
        return h * s, s + h * s * (1.0 - s) * (1.5957691216057308 + 0.21406443847661949 * h * h)
    else:
        return h, tl.full(h.shape, 1.0, tl.float32)


@triton.jit
def _linear_kernel(
    x_ptr, w_ptr, b_ptr, slope_of_ptr, tile_ptr, y_ptr, h_ptr,
    num_tiles, E, I, O, x_r, x_i, w_e, w_o, w_i,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # The program's tile: the expert, the rows that it writes, which of them are used, and its block of columns.
    blocks = tl.cdiv(O, BLOCK_N)
    first = tl.program_id(0) // (GROUP_M * blocks) * GROUP_M
    group, within = tl.minimum(num_tiles - first, GROUP_M), tl.program_id(0) % (GROUP_M * blocks)
    tile_ptr += 3 * (first + within % group)
    expert, end = tl.load(tile_ptr), tl.load(tile_ptr + 2)
    r_M = (tl.load(tile_ptr + 1) + tl.arange(0, BLOCK_M)).to(tl.int64)
    real_M, used_M = r_M < end, r_M < tl.where(expert < E, end, 0)
    if tl.max(real_M.to(tl.int32), 0) == 0:
        return
    o_N = within // group * BLOCK_N + tl.arange(0, BLOCK_N)
    y_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first_i in range(0, tl.where(expert < E, I, 0), BLOCK_K):  # unused rows: no multiplication
        i_K = first_i + tl.arange(0, BLOCK_K)
        x_MK = _load(x_ptr, r_M, i_K, x_r, x_i, used_M, i_K < I)
        w_KN = _load(w_ptr + expert.to(tl.int64) * w_e, i_K, o_N, w_i, w_o, i_K < I, o_N < O)
        y_MN = _dot(x_MK, w_KN, y_MN, PRECISION, UPCAST)
    at_MN = r_M[:, None] * O + o_N[None, :]
    inside_MN = real_M[:, None] & (o_N < O)[None, :]
    if slope_of_ptr is not None:
        h_MN = tl.load(slope_of_ptr + at_MN, mask=inside_MN, other=0.0).to(tl.float32)
        h_MN, slope_MN = _activate(h_MN, ACTIVATION)
        y_MN *= slope_MN
    else:
        if b_ptr is not None:
            b_N = tl.load(b_ptr + expert * O + o_N, mask=o_N < tl.where(expert < E, O, 0), other=0.0)
            y_MN += b_N.to(tl.float32)[None, :]
        # The activation sees the hidden value as it is stored, so that the backward pass sees the same.
        h_MN = y_MN.to(y_ptr.dtype.element_ty)
        if ACTIVATION != "none":
            y_MN, _ = _activate(h_MN.to(tl.float32), ACTIVATION)
    if h_ptr is not None:
        tl.store(h_ptr + at_MN, h_MN.to(y_ptr.dtype.element_ty), mask=inside_MN)
    tl.store(y_ptr + at_MN, y_MN.to(y_ptr.dtype.element_ty), mask=inside_MN)


@triton.jit
def _weight_gradient_kernel(
    g_ptr, x_ptr, end_ptr, grad_w_ptr, grad_b_ptr, O, I, g_r, g_o, x_r, x_i,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    expert, blocks = tl.program_id(1), tl.cdiv(O, BLOCK_M)
    block_i = tl.program_id(0) // blocks
    o_M = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    i_N = block_i * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.load(end_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(end_ptr + expert)
    acc_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(start, end, BLOCK_K):
        r_K = (first + tl.arange(0, BLOCK_K)).to(tl.int64)
        g_MK = _load(g_ptr, o_M, r_K, g_o, g_r, o_M < O, r_K < end)
        x_KN = _load(x_ptr, r_K, i_N, x_r, x_i, r_K < end, i_N < I)
        acc_MN = _dot(g_MK, x_KN, acc_MN, PRECISION, UPCAST)
    at_MN = (expert.to(tl.int64) * O + o_M[:, None]) * I + i_N[None, :]
    inside_MN = (o_M < O)[:, None] & (i_N < I)[None, :]
    tl.store(grad_w_ptr + at_MN, acc_MN.to(grad_w_ptr.dtype.element_ty), mask=inside_MN)
    # The bias: the first blocks of columns go over their rows again; that keeps the loop above lean.
    if grad_b_ptr is not None:  # noqa: SIM102  (known to the compiler; the next condition is not)
        if block_i == 0:
            acc_M = tl.zeros((BLOCK_M,), tl.float32)
            for first in range(start, end, BLOCK_K):
                r_K = (first + tl.arange(0, BLOCK_K)).to(tl.int64)
                acc_M += tl.sum(_load(g_ptr, o_M, r_K, g_o, g_r, o_M < O, r_K < end).to(tl.float32), 1)
            tl.store(grad_b_ptr + expert * O + o_M, acc_M.to(grad_b_ptr.dtype.element_ty), mask=o_M < O)


def options(dtype: torch.dtype) -> dict:
    """What the launches share: blocks, precision, warps and stages."""
    # Half types ignore the precision; in float32 it is the user's choice, `torch.set_float32_matmul_precision`.
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    upcast = INTERPRETED and dtype == torch.bfloat16
    return {**(FULL if dtype == torch.float32 else HALF), "PRECISION": precision, "UPCAST": upcast}


@torch.library.custom_op("vmoe::grouped_linear", mutates_args=())
def grouped_linear(
    x_RI: Tensor,
    w_EOI: Tensor,
    b_EO: Tensor | None,
    slope_of_RO: Tensor | None,
    tile_T3: Tensor,
    block_m: int,
    activation: str,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor]:
    """y_r = activation(x_r · w_eᵀ + b_e), e the expert of row r; or back through an activation and the layer after it.

    On the way back `w_EOI` is that layer's, transposed, and `slope_of_RO` what the activation saw: y_r = x_r · w_eᵀ
    times its slope there. Rows and weights may have any strides, all else is contiguous. Returns two (R, O), zero in
    rows beyond the counts: y, and with `keep_hidden` (else (0, O)) the values before the activation; on the way back
    activation(slope_of).
    """
    (E, O, I), R, T = w_EOI.shape, x_RI.shape[0], tile_T3.shape[0]
    y_RO, h_RO = x_RI.new_empty(R, O), x_RI.new_empty(R if keep_hidden else 0, O)
    launch = options(x_RI.dtype)
    with torch.cuda.device_of(x_RI):
        _linear_kernel[(T * triton.cdiv(O, launch["BLOCK_N"]),)](
            x_RI, w_EOI, b_EO, slope_of_RO, tile_T3, y_RO, h_RO if keep_hidden else None,
            T, E, I, O, *x_RI.stride(), *w_EOI.stride(),
            ACTIVATION=activation, BLOCK_M=block_m, GROUP_M=GROUP_M, **launch,
        )  # fmt: skip
    return y_RO, h_RO


@grouped_linear.register_fake
def _(x_RI, w_EOI, b_EO, slope_of_RO, tile_T3, block_m, activation, keep_hidden):
    R, O = x_RI.shape[0], w_EOI.shape[1]
    return x_RI.new_empty(R, O), x_RI.new_empty(R if keep_hidden else 0, O)


@torch.library.custom_op("vmoe::grouped_weight_gradient", mutates_args=())
def grouped_weight_gradient(g_RO: Tensor, x_RI: Tensor, end_E: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """Sums over each expert's rows, which end at `end_E` (int32): of g_r ⊗ x_r, and of g_r, (0, O) without `bias`."""
    grad_w_EOI, grad_b_EO = empty_sums(g_RO, x_RI, end_E, bias)
    E, O, I = grad_w_EOI.shape
    launch = options(g_RO.dtype)
    block = launch["BLOCK_N"]
    with torch.cuda.device_of(g_RO):
        _weight_gradient_kernel[(triton.cdiv(O, block) * triton.cdiv(I, block), E)](
            g_RO, x_RI, end_E, grad_w_EOI, grad_b_EO if bias else None,
            O, I, *g_RO.stride(), *x_RI.stride(), BLOCK_M=block, **launch,
        )  # fmt: skip
    return grad_w_EOI, grad_b_EO


grouped_weight_gradient.register_fake(empty_sums)


class _Experts(torch.autograd.Function):
    """Two layers with an activation between. For the backward pass only the hidden layer before it is kept."""

    @staticmethod
    def forward(ctx, x_RD, w1_EFD, b1_EF, w2_EOF, b2_EO, tile_T3, end_E, block_m, activation):
        a_RF, h_RF = grouped_linear(x_RD, w1_EFD, b1_EF, None, tile_T3, block_m, activation, ctx is not None)
        if ctx is not None:
            ctx.save_for_backward(x_RD, w1_EFD, w2_EOF, tile_T3, end_E, h_RF)
            ctx.block_m, ctx.activation = block_m, activation
        return grouped_linear(a_RF, w2_EOF, b2_EO, None, tile_T3, block_m, "none", False)[0]

    @staticmethod
    def backward(ctx, g_RO):
        if torch.is_grad_enabled():
            raise RuntimeError("the Triton kernels have no second derivatives: take the backend 'reference'")
        x_RD, w1_EFD, w2_EOF, tile_T3, end_E, h_RF = ctx.saved_tensors
        needs_x, needs_w1, needs_b1, needs_w2, needs_b2 = ctx.needs_input_grad[:5]
        grad_x = grad_w1 = grad_b1 = grad_w2 = grad_b2 = None
        w2_EFO = w2_EOF.transpose(1, 2)
        grad_h_RF, a_RF = grouped_linear(g_RO, w2_EFO, None, h_RF, tile_T3, ctx.block_m, ctx.activation, True)
        if needs_w2 or needs_b2:
            grad_w2, grad_b2 = grouped_weight_gradient(g_RO, a_RF, end_E, needs_b2)
        del a_RF
        if needs_w1 or needs_b1:
            grad_w1, grad_b1 = grouped_weight_gradient(grad_h_RF, x_RD, end_E, needs_b1)
        if needs_x:
            w1_EDF = w1_EFD.transpose(1, 2)
            grad_x, _ = grouped_linear(grad_h_RF, w1_EDF, None, None, tile_T3, ctx.block_m, "none", False)
        return grad_x, grad_w1, grad_b1 if needs_b1 else None, grad_w2, grad_b2 if needs_b2 else None, *[None] * 4


def run(experts: nn.Module, x_RD: Tensor, count_E: Tensor) -> Tensor:
    """`Experts` over (R, D) rows sorted by expert, (E,) rows of each -> (R, O), zero in unused rows."""
    dtype = compute_dtype(x_RD)
    parameters = [local_experts(p) for fc in (experts.fc1, experts.fc2) for p in (fc.weight, fc.bias)]
    parameters = [None if p is None else p.to(dtype) for p in parameters]
    # The kernels take the strides of rows and matrices as they are, but not of biases.
    parameters[1::2] = [None if p is None else p.contiguous() for p in parameters[1::2]]
    # About as many rows in a tile as an expert has.
    block_m = triton.next_power_of_2(triton.cdiv(x_RD.shape[0], count_E.shape[0]))
    block_m = min(MAX_BLOCK_M, max(16, block_m))
    tile_T3 = tile_table(count_E, x_RD.shape[0], block_m)
    x_RD = x_RD.to(dtype)
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x_RD, *parameters))
    layers = _Experts.apply if differentiated else partial(_Experts.forward, None)
    return layers(x_RD, *parameters, tile_T3, count_E.cumsum(0).int(), block_m, activation_name(experts.act))
