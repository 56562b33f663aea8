"""Grouped products in Triton, with gathers in front of them and bias, activation and weight behind.

Rows are sorted by expert. A tile is a run of at most BLOCK_M rows of one expert; which rows and whose is looked up in a
table on the device (`tiles.py`), so that the grid depends on shapes alone and the host never waits for a count.
No kernel adds with atomics: equal inputs give equal results.

Each kernel has an operator of the name `vmoe::...` around it, so that `torch.compile` takes it as it is.

Shapes, by suffix: S tokens, M rows of a source (tokens or rows), R rows sorted by expert, K rows of a token, E experts,
T tiles, I and O widths of a product's input and output. Inside kernels M, N and K are the blocks of a product.

Sources: the order of the tiles is that of Triton's tutorial on matrix multiplication; products over rows gathered by an
index are from ScatterMoE (arXiv 2403.08245).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "silu", "relu")

# Whether Triton interprets its kernels on the CPU (TRITON_INTERPRET=1 when this module was imported).
INTERPRETED = triton.knobs.runtime.interpret

# Blocks of a product (rows, columns, inner) and the launch's options. Usual sizes, not yet tuned on a GPU.
HALF = {"BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}
FULL = {"BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}
# Tiles of rows that go through all columns together, to find their weights in the cache.
GROUP_M = 8


@triton.jit
def _dot(x_MK, w_KN, acc_MN, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:  # the interpreter has no product in bfloat16; in float32 the products are the same
        x_MK = x_MK.to(tl.float32)
        w_KN = w_KN.to(tl.float32)
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
    elif ACTIVATION == "silu":
        s = tl.sigmoid(h)
        return h * s, s * (1.0 + h * (1.0 - s))
    elif ACTIVATION == "relu":
        return tl.where(h < 0.0, 0.0, h), tl.where(h > 0.0, 1.0, 0.0)  # as PyTorch's: NaN stays, no slope at zero
    else:
        return h, tl.full(h.shape, 1.0, tl.float32)


@triton.jit
def _tile(tile_ptr, num_tiles, E, O, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """The program's tile: expert, rows, which of them it writes, which of those are used, and its block of columns."""
    columns = tl.cdiv(O, BLOCK_N)
    program = tl.program_id(0)
    first = program // (GROUP_M * columns) * GROUP_M
    group = tl.minimum(num_tiles - first, GROUP_M)
    within = program % (GROUP_M * columns)
    tile = first + within % group
    expert = tl.load(tile_ptr + 3 * tile)
    r_M = tl.load(tile_ptr + 3 * tile + 1) + tl.arange(0, BLOCK_M)
    end = tl.load(tile_ptr + 3 * tile + 2)
    return expert, r_M, r_M < end, r_M < tl.where(expert < E, end, 0), within // group


@triton.jit
def _source_rows(index_ptr, r_M, real_M):
    """Where the rows lie in their source, -1: nowhere."""
    if index_ptr is None:
        return tl.where(real_M, r_M, -1).to(tl.int64)
    else:
        return tl.load(index_ptr + r_M, mask=real_M, other=-1).to(tl.int64)


@triton.jit
def _multiply(
    x_ptr, w_ptr, m_M, o_N, I, O, x_m, x_i, w_o, w_i,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) float32: rows `m_M` of x, zero where that is -1, times columns `o_N` of wᵀ."""
    i_K = tl.arange(0, BLOCK_K)
    x_at_MK = x_ptr + m_M[:, None] * x_m + i_K[None, :] * x_i
    w_at_KN = w_ptr + o_N[None, :] * w_o + i_K[:, None] * w_i
    acc_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, I, BLOCK_K):
        inside_K = first + i_K < I
        x_MK = tl.load(x_at_MK, mask=(m_M >= 0)[:, None] & inside_K[None, :], other=0.0)
        w_KN = tl.load(w_at_KN, mask=(o_N < O)[None, :] & inside_K[:, None], other=0.0)
        acc_MN = _dot(x_MK, w_KN, acc_MN, PRECISION, UPCAST)
        x_at_MK += BLOCK_K * x_i
        w_at_KN += BLOCK_K * w_i
    return acc_MN


@triton.jit
def _linear_kernel(
    x_ptr, index_ptr, w_ptr, b_ptr, weight_ptr, tile_ptr, y_ptr, h_ptr,
    num_tiles, E, I, O, x_m, x_i, w_e, w_o, w_i,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    expert, r_M, real_M, used_M, column = _tile(tile_ptr, num_tiles, E, O, BLOCK_M, BLOCK_N, GROUP_M)
    if tl.max(real_M.to(tl.int32), 0) == 0:
        return
    o_N = column * BLOCK_N + tl.arange(0, BLOCK_N)
    m_M = _source_rows(index_ptr, r_M, used_M)
    inner = tl.where(expert < E, I, 0)  # unused rows: no product
    w_ptr += expert.to(tl.int64) * w_e
    y_MN = _multiply(x_ptr, w_ptr, m_M, o_N, inner, O, x_m, x_i, w_o, w_i, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST)
    if b_ptr is not None:
        b_N = tl.load(b_ptr + expert * O + o_N, mask=o_N < tl.where(expert < E, O, 0), other=0.0)
        y_MN += b_N.to(tl.float32)[None, :]
    at_MN = r_M[:, None].to(tl.int64) * O + o_N[None, :]
    inside_MN = real_M[:, None] & (o_N < O)[None, :]
    # The activation sees the hidden value as it is stored, so that the backward pass sees the same.
    h_MN = y_MN.to(y_ptr.dtype.element_ty)
    if h_ptr is not None:
        tl.store(h_ptr + at_MN, h_MN, mask=inside_MN)
    if ACTIVATION != "none":
        y_MN, _ = _activate(h_MN.to(tl.float32), ACTIVATION)
    if weight_ptr is not None:
        y_MN *= tl.load(weight_ptr + r_M, mask=used_M, other=0.0).to(tl.float32)[:, None]
    tl.store(y_ptr + at_MN, y_MN.to(y_ptr.dtype.element_ty), mask=inside_MN)


@triton.jit
def _activation_gradient_kernel(
    g_ptr, index_ptr, w_ptr, weight_ptr, h_ptr, tile_ptr, grad_h_ptr, a_ptr, dot_ptr,
    num_tiles, E, I, O, g_m, g_i, w_e, w_o, w_i,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    expert, r_M, real_M, used_M, column = _tile(tile_ptr, num_tiles, E, O, BLOCK_M, BLOCK_N, GROUP_M)
    if tl.max(real_M.to(tl.int32), 0) == 0:
        return
    o_N = column * BLOCK_N + tl.arange(0, BLOCK_N)
    m_M = _source_rows(index_ptr, r_M, used_M)
    inner = tl.where(expert < E, I, 0)
    w_ptr += expert.to(tl.int64) * w_e
    g_MN = _multiply(g_ptr, w_ptr, m_M, o_N, inner, O, g_m, g_i, w_o, w_i, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST)
    at_MN = r_M[:, None].to(tl.int64) * O + o_N[None, :]
    inside_MN = real_M[:, None] & (o_N < O)[None, :]
    h_MN = tl.load(h_ptr + at_MN, mask=inside_MN, other=0.0).to(tl.float32)
    a_MN, slope_MN = _activate(h_MN, ACTIVATION)
    if dot_ptr is not None:
        dot_at_M = dot_ptr + r_M.to(tl.int64) * tl.cdiv(O, BLOCK_N) + column
        tl.store(dot_at_M, tl.sum(g_MN * a_MN, 1), mask=real_M)
    g_MN *= slope_MN
    if weight_ptr is not None:
        weight_M1 = tl.load(weight_ptr + r_M, mask=used_M, other=0.0).to(tl.float32)[:, None]
        g_MN *= weight_M1
        a_MN *= weight_M1
    tl.store(grad_h_ptr + at_MN, g_MN.to(grad_h_ptr.dtype.element_ty), mask=inside_MN)
    tl.store(a_ptr + at_MN, a_MN.to(a_ptr.dtype.element_ty), mask=inside_MN)


@triton.jit
def _weight_gradient_kernel(
    g_ptr, g_index_ptr, x_ptr, x_index_ptr, weight_ptr, end_ptr, grad_w_ptr, grad_b_ptr,
    O, I, g_m, g_o, x_m, x_i,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    rows = tl.cdiv(O, BLOCK_M)
    block_o, block_i = tl.program_id(0) % rows, tl.program_id(0) // rows
    o_M = block_o * BLOCK_M + tl.arange(0, BLOCK_M)
    i_N = block_i * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.load(end_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(end_ptr + expert)
    acc_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(start, end, BLOCK_K):
        r_K = first + tl.arange(0, BLOCK_K)
        g_K = _source_rows(g_index_ptr, r_K, r_K < end)
        x_K = _source_rows(x_index_ptr, r_K, r_K < end)
        g_at_MK = g_ptr + g_K[None, :] * g_m + o_M[:, None] * g_o
        x_at_KN = x_ptr + x_K[:, None] * x_m + i_N[None, :] * x_i
        g_MK = tl.load(g_at_MK, mask=(g_K >= 0)[None, :] & (o_M < O)[:, None], other=0.0)
        x_KN = tl.load(x_at_KN, mask=(x_K >= 0)[:, None] & (i_N < I)[None, :], other=0.0)
        acc_MN = _dot(g_MK, x_KN, acc_MN, PRECISION, UPCAST)
    at_MN = (expert.to(tl.int64) * O + o_M[:, None]) * I + i_N[None, :]
    inside_MN = (o_M < O)[:, None] & (i_N < I)[None, :]
    tl.store(grad_w_ptr + at_MN, acc_MN.to(grad_w_ptr.dtype.element_ty), mask=inside_MN)
    # The bias: the first blocks of columns go over their rows again; that keeps the loop above lean.
    if grad_b_ptr is not None:  # noqa: SIM102  (known to the compiler; the next condition is not)
        if block_i == 0:
            acc_M = tl.zeros((BLOCK_M,), tl.float32)
            for first in range(start, end, BLOCK_K):
                r_K = first + tl.arange(0, BLOCK_K)
                g_K = _source_rows(g_index_ptr, r_K, r_K < end)
                g_at_MK = g_ptr + g_K[None, :] * g_m + o_M[:, None] * g_o
                g_MK = tl.load(g_at_MK, mask=(g_K >= 0)[None, :] & (o_M < O)[:, None], other=0.0).to(tl.float32)
                if weight_ptr is not None:
                    g_MK *= tl.load(weight_ptr + r_K, mask=r_K < end, other=0.0).to(tl.float32)[None, :]
                acc_M += tl.sum(g_MK, 1)
            tl.store(grad_b_ptr + expert * O + o_M, acc_M.to(grad_b_ptr.dtype.element_ty), mask=o_M < O)


@triton.jit
def _gather_sum_kernel(y_ptr, row_ptr, out_ptr, S, D, K: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
    s_S = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    d_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc_SD = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    for k in tl.static_range(K):
        row_S = tl.load(row_ptr + s_S.to(tl.int64) * K + k, mask=s_S < S, other=-1)
        inside_SD = (row_S >= 0)[:, None] & (d_D < D)[None, :]
        y_SD = tl.load(y_ptr + row_S[:, None] * D + d_D[None, :], mask=inside_SD, other=0.0)
        acc_SD += y_SD.to(tl.float32)
    at_SD = s_S[:, None].to(tl.int64) * D + d_D[None, :]
    tl.store(out_ptr + at_SD, acc_SD.to(out_ptr.dtype.element_ty), mask=(s_S < S)[:, None] & (d_D < D)[None, :])


def options(dtype: torch.dtype) -> dict:
    """What the products' launches share: blocks, precision, warps and stages."""
    # Half types ignore the precision; in float32 it is the user's choice, `torch.set_float32_matmul_precision`.
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    upcast = INTERPRETED and dtype == torch.bfloat16
    return {**(FULL if dtype == torch.float32 else HALF), "PRECISION": precision, "UPCAST": upcast}


@torch.library.custom_op("vmoe::grouped_linear", mutates_args=())
def grouped_linear(
    x_MI: Tensor,
    index_R: Tensor | None,
    w_EOI: Tensor,
    b_EO: Tensor | None,
    weight_R: Tensor | None,
    tile_T3: Tensor,
    num_rows: int,
    block_m: int,
    activation: str,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor]:
    """y_r = weight_r · activation(x[index_r] · w_eᵀ + b_e), e the expert of row r.

    Args:
        x_MI: the rows' source; it and `w_EOI` may have any strides, all else is contiguous.
        index_R: which of its rows each row is; -1: zeros. None: the rows themselves.
        w_EOI: weights.
        b_EO: biases.
        weight_R: weight of each row; None: one.
        tile_T3: from `tiles.tile_table`, of `num_rows` rows in tiles of `block_m`.
        activation: one of `ACTIVATIONS`.
        keep_hidden: give the values before the activation as well.

    Returns:
        (R, O) and (R, O), or (0, O) without `keep_hidden`; rows beyond the counts are zero.
    """
    E, O, I = w_EOI.shape
    y_RO = x_MI.new_empty(num_rows, O)
    h_RO = x_MI.new_empty(num_rows if keep_hidden else 0, O)
    launch = options(x_MI.dtype)
    T = tile_T3.shape[0]
    with torch.cuda.device_of(x_MI):
        _linear_kernel[(T * triton.cdiv(O, launch["BLOCK_N"]),)](
            x_MI, index_R, w_EOI, b_EO, weight_R, tile_T3, y_RO, h_RO if keep_hidden else None,
            T, E, I, O, *x_MI.stride(), *w_EOI.stride(),
            ACTIVATION=activation, BLOCK_M=block_m, GROUP_M=GROUP_M, **launch,
        )  # fmt: skip
    return y_RO, h_RO


@grouped_linear.register_fake
def _(x_MI, index_R, w_EOI, b_EO, weight_R, tile_T3, num_rows, block_m, activation, keep_hidden):
    O = w_EOI.shape[1]
    return x_MI.new_empty(num_rows, O), x_MI.new_empty(num_rows if keep_hidden else 0, O)


@torch.library.custom_op("vmoe::grouped_activation_gradient", mutates_args=())
def grouped_activation_gradient(
    g_MI: Tensor,
    index_R: Tensor | None,
    w_EOI: Tensor,
    weight_R: Tensor | None,
    h_RO: Tensor,
    tile_T3: Tensor,
    block_m: int,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Back through `weight_r · (activation(h_r) · w_e)`, the second linear layer of the experts.

    Args:
        g_MI: gradient of the result; `index_R` as in `grouped_linear`.
        w_EOI: the layer's weight, transposed: here O is its input's width.
        h_RO: the activation's input.

    Returns:
        gradient of `h`, (R, O); weight · activation(h), (R, O); and (R, C) float32 whose sums over C, the blocks of
        columns, are the gradients of the rows' weights.
    """
    E, O, I = w_EOI.shape
    grad_h_RO, a_RO = torch.empty_like(h_RO), torch.empty_like(h_RO)
    launch = options(g_MI.dtype)
    T, C = tile_T3.shape[0], triton.cdiv(O, launch["BLOCK_N"])
    dot_RC = h_RO.new_empty(h_RO.shape[0] if weight_R is not None else 0, C, dtype=torch.float32)
    with torch.cuda.device_of(g_MI):
        _activation_gradient_kernel[(T * C,)](
            g_MI, index_R, w_EOI, weight_R, h_RO, tile_T3, grad_h_RO, a_RO, None if weight_R is None else dot_RC,
            T, E, I, O, *g_MI.stride(), *w_EOI.stride(),
            ACTIVATION=activation, BLOCK_M=block_m, GROUP_M=GROUP_M, **launch,
        )  # fmt: skip
    return grad_h_RO, a_RO, dot_RC


@grouped_activation_gradient.register_fake
def _(g_MI, index_R, w_EOI, weight_R, h_RO, tile_T3, block_m, activation):
    C = triton.cdiv(w_EOI.shape[1], options(g_MI.dtype)["BLOCK_N"])
    dot_RC = h_RO.new_empty(h_RO.shape[0] if weight_R is not None else 0, C, dtype=torch.float32)
    return torch.empty_like(h_RO), torch.empty_like(h_RO), dot_RC


@torch.library.custom_op("vmoe::grouped_weight_gradient", mutates_args=())
def grouped_weight_gradient(
    g_MO: Tensor,
    g_index_R: Tensor | None,
    x_MI: Tensor,
    x_index_R: Tensor | None,
    weight_R: Tensor | None,
    end_E: Tensor,
    bias: bool,
) -> tuple[Tensor, Tensor]:
    """Sums over each expert's rows: of g_r ⊗ x_r, and of weight_r · g_r.

    Args:
        g_MO, x_MI: sources; `g_index_R`, `x_index_R`: which of their rows each row is, as in `grouped_linear`.
        weight_R: None: one. It concerns the second sum alone.
        end_E: end of each expert's rows.
        bias: make the second sum.

    Returns:
        (E, O, I) and (E, O), or (0, O) without `bias`.
    """
    E, O, I = end_E.shape[0], g_MO.shape[1], x_MI.shape[1]
    grad_w_EOI, grad_b_EO = g_MO.new_empty(E, O, I), g_MO.new_empty(E if bias else 0, O)
    launch = options(g_MO.dtype)
    block = launch["BLOCK_N"]
    with torch.cuda.device_of(g_MO):
        _weight_gradient_kernel[(triton.cdiv(O, block) * triton.cdiv(I, block), E)](
            g_MO, g_index_R, x_MI, x_index_R, weight_R, end_E, grad_w_EOI, grad_b_EO if bias else None,
            O, I, *g_MO.stride(), *x_MI.stride(), BLOCK_M=block, **launch,
        )  # fmt: skip
    return grad_w_EOI, grad_b_EO


@grouped_weight_gradient.register_fake
def _(g_MO, g_index_R, x_MI, x_index_R, weight_R, end_E, bias):
    E, O, I = end_E.shape[0], g_MO.shape[1], x_MI.shape[1]
    return g_MO.new_empty(E, O, I), g_MO.new_empty(E if bias else 0, O)


@torch.library.custom_op("vmoe::gather_sum", mutates_args=())
def gather_sum(y_RD: Tensor, row_SK: Tensor) -> Tensor:
    """(S, D): the sum of each token's rows; -1: none. Summed in float32, in the order of K."""
    (S, K), D = row_SK.shape, y_RD.shape[1]
    out_SD = y_RD.new_empty(S, D)
    with torch.cuda.device_of(y_RD):
        _gather_sum_kernel[(triton.cdiv(S, 16), triton.cdiv(D, 256))](
            y_RD.contiguous(), row_SK.contiguous(), out_SD, S, D, K, BLOCK_S=16, BLOCK_D=256, num_warps=4
        )
    return out_SD


@gather_sum.register_fake
def _(y_RD, row_SK):
    return y_RD.new_empty(row_SK.shape[0], y_RD.shape[1])
