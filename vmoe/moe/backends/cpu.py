"""The experts on a CPU, from tokens to tokens in one operation: gather, two linear layers, weigh, add.

Experts with many rows are computed one or a few at a time, so that these and their hidden activations stay in the cache
from one step to the next, in oneDNN with bias and, where nothing is kept, GELU inside the product. Those with few rows
go through one batched product, with rows of weight zero where they have fewer than the others. For the backward pass
the hidden layer is kept, before its activation and after it, and the experts' rows before they are weighed, but no copy
of the tokens.

Shapes, by suffix: S tokens, R rows sorted by expert, P rows with those that fill up, D width, F hidden width (2F in
front of a gated activation), E experts, C experts of a chunk, M rows of an expert in a chunk.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vmoe.moe.backends.onednn import GELU, in_onednn, linear

# The most rows of a chunk of several experts. Starting a product has a price that shows with experts of few rows, so
# many of them go together; beyond this nothing is gained (`python -m benchmarks.choices`).
CHUNK_ROWS = 8192
# A product of one expert more costs about as much as this many rows.
ROWS_PER_PRODUCT = 16
# From this many bytes times multiplications on, a product in oneDNN is quicker than a part of a batched one: 114 rows
# with D = 384 and F = 1536 in float32, twice as many in half precision.
ALONE = 2**28
# oneDNN compiles a product for each number of rows that it has not seen, which takes a quarter of the product's time or
# more. The experts' change with each batch, so they are raised to a multiple of up to this, and by 6% at most.
ROWS_MULTIPLE_OF = 16


@dataclass(frozen=True)
class Chunk:
    """Neighbouring experts that are computed together.

    Attributes:
        experts: slice of the experts.
        rows: slice of the P rows.
        num_rows: M, rows of each of these experts.
    """

    experts: slice
    rows: slice
    num_rows: int

    @property
    def num_experts(self) -> int:
        """C."""
        return self.experts.stop - self.experts.start


def rounded(rows: int) -> int:
    """The number of rows that a product in oneDNN takes for this many."""
    multiple_of = min(ROWS_MULTIPLE_OF, 2 ** max(0, rows.bit_length() - 5))
    return -(-rows // multiple_of) * multiple_of


def make_chunks(count_E: Sequence[int], round_rows: bool = False, alone: float = math.inf) -> list[Chunk]:
    """Experts by chunks; those without rows are in none.

    Args:
        count_E: rows of each expert.
        round_rows: M is `rounded`.
        alone: an expert with this many rows is a chunk of its own.
    """
    chunks: list[Chunk] = []
    start = most = total = 0  # of the chunk that is being made

    def finish(end: int) -> None:
        nonlocal total
        if total:
            first = chunks[-1].rows.stop if chunks else 0
            chunks.append(Chunk(slice(start, end), slice(first, first + most * (end - start)), most))
        total = 0

    for e, count in enumerate(count_E):
        size = e - start + 1
        count = rounded(count) if round_rows else count
        padded = max(most, count) * size
        too_many = padded > CHUNK_ROWS or padded - total - count > ROWS_PER_PRODUCT * size
        if total and (count == 0 or too_many or max(most, count) >= alone):
            finish(e)
        if not total:
            start, most = e, 0
        most, total = max(most, count), total + count
    finish(len(count_E))
    return chunks


def routed_mlp(
    x_SD: Tensor,
    token_R: Tensor | None,
    row_SK: Tensor | None,
    weight_R: Tensor | None,
    count_E: Sequence[int],
    fc1: tuple[Tensor, Tensor | None],
    fc2: tuple[Tensor, Tensor | None],
    activation: Callable[[Tensor], Tensor],
    activation_name: str | None,
    dtype: torch.dtype,
) -> Tensor:
    """y_s = sum of weight_r · (activation(x_s W1ᵀ + b1) W2ᵀ + b2) over the rows r of token s, of their experts.

    Args:
        x_SD: tokens.
        token_R: token of each row, rows sorted by expert. None: the tokens are the rows.
        row_SK: the rows of each token, K at most, -1 for none; None: not known.
        weight_R: weight of each row, differentiable; None: one.
        count_E: rows of each expert.
        fc1: weight (E, F, D) and bias (E, F) or None.
        fc2: weight (E, O, F) and bias (E, O) or None.
        activation: of the hidden layer, (..., F of fc1) -> (..., F of fc2); element by element but for gates, without
            parameters or random numbers, since the backward pass may compute it again.
        activation_name: what `vmoe.moe.backends.activations` calls it; None: it has no name.
        dtype: of the products and the result.

    Returns:
        (S, O), zero for tokens without a row. Where its gradient is to be differentiated again, that is computed by
        plain PyTorch.
    """
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x_SD, weight_R, *fc1, *fc2))
    product = max(1, fc1[0].shape[1] * fc1[0].shape[2])
    # In half precision, GELU inside the product is what a product alone gains.
    alone = in_onednn(dtype) and (dtype == torch.float32 or (not learns and activation_name in GELU))
    chunks = make_chunks(count_E, in_onednn(dtype), ALONE / (dtype.itemsize * product) if alone else math.inf)
    rows = _Rows.of(chunks, token_R, row_SK, weight_R, count_E, x_SD.shape[0], dtype)
    arguments = (x_SD, rows.weight_P, *fc1, *fc2)
    with torch.autocast("cpu", enabled=False):
        if learns:
            return _RoutedMLP.apply(*arguments, rows, activation, activation_name, dtype)
        return _forward(*arguments, rows, activation, activation_name, dtype, None)


@dataclass(frozen=True)
class _Rows:
    """Which tokens the P rows are, and which rows the tokens have.

    Attributes:
        chunks: of the experts.
        token_P: None if the tokens are the rows, in order.
        row_SK: P where there is none; None: not known.
        weight_P: zero for rows that fill up; None: one.
        num_experts: E.
        num_tokens: S.
    """

    chunks: list[Chunk]
    token_P: Tensor | None
    row_SK: Tensor | None
    weight_P: Tensor | None
    num_experts: int
    num_tokens: int

    @property
    def number(self) -> int:
        """P."""
        return self.chunks[-1].rows.stop if self.chunks else 0

    @classmethod
    def of(
        cls,
        chunks: list[Chunk],
        token_R: Tensor | None,
        row_SK: Tensor | None,
        weight_R: Tensor | None,
        count_E: Sequence[int],
        num_tokens: int,
        dtype: torch.dtype,
    ) -> "_Rows":
        P, R = chunks[-1].rows.stop if chunks else 0, sum(count_E)
        if token_R is None and (P > R or num_tokens > R):  # rows beyond are unused
            token_R = torch.arange(R, device="cpu")  # whatever the default device is
        if P > R:
            if weight_R is None:
                weight_R = torch.ones(R, dtype=dtype, device="cpu")
            token_R, weight_R, place_R = _filled_up(chunks, count_E, token_R, weight_R)
            if row_SK is not None:
                row_SK = torch.where(row_SK < 0, -1, place_R[row_SK])
        if row_SK is not None:
            row_SK = torch.where(row_SK < 0, P, row_SK)
        weight_R = None if weight_R is None else weight_R.to(dtype)
        return cls(chunks, token_R, row_SK, weight_R, len(count_E), num_tokens)

    def take(self, x_SD: Tensor, chunk: Chunk) -> Tensor:
        """(C·M, D) the tokens of a chunk."""
        return x_SD[chunk.rows] if self.token_P is None else x_SD.index_select(0, self.token_P[chunk.rows])

    def new(self, like: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """(P + 1, width), the last row zero."""
        y_PO = like.new_empty(self.number + 1, width, dtype=dtype)
        y_PO[-1].zero_()
        return y_PO

    def sum(self, y_PO: Tensor, weight_P: Tensor | None) -> Tensor:
        """The rows of `new`, weighed and added up for each token: (S, O)."""
        P, O = self.number, y_PO.shape[1]
        if self.row_SK is not None:
            K = self.row_SK.shape[1]
            y_SKO = y_PO.index_select(0, self.row_SK.flatten()).view(self.num_tokens, K, O)
            if weight_P is not None:
                weight_P = torch.cat([weight_P, weight_P.new_zeros(1)])
                y_SKO.mul_(weight_P[self.row_SK][..., None])
            return y_SKO[:, 0] if K == 1 else y_SKO.sum(1)
        if weight_P is not None:
            y_PO = y_PO[:P] * weight_P[:, None]
        if self.token_P is None:
            return y_PO[:P]
        return y_PO.new_zeros(self.num_tokens, O).index_add_(0, self.token_P, y_PO[:P])


def _filled_up(
    chunks: list[Chunk], count_E: Sequence[int], token_R: Tensor, weight_R: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(P,) the token of each row, (P,) its weight, and (R,) where each of the R rows has gone.

    Rows that fill up repeat the last of their expert, with weight zero: whatever it holds stays with its token.
    """
    tokens, weights, places = [], [], []
    first, place_P = 0, torch.arange(chunks[-1].rows.stop, device="cpu")
    zero_M = weight_R.new_zeros(max(chunk.num_rows for chunk in chunks))
    for chunk in chunks:
        for number, e in enumerate(range(chunk.experts.start, chunk.experts.stop)):
            end, more = first + count_E[e], chunk.num_rows - count_E[e]
            tokens += [token_R[first:end], token_R[end - 1 : end].expand(more)]
            weights += [weight_R[first:end], zero_M[:more]]
            start = chunk.rows.start + number * chunk.num_rows
            places.append(place_P[start : start + count_E[e]])
            first = end
    return torch.cat(tokens), torch.cat(weights), torch.cat(places)


def _forward(
    x_SD: Tensor,
    weight_P: Tensor | None,
    w1_EFD: Tensor,
    b1_EF: Tensor | None,
    w2_EOF: Tensor,
    b2_EO: Tensor | None,
    rows: _Rows,
    activation: Callable[[Tensor], Tensor],
    activation_name: str | None,
    dtype: torch.dtype,
    kept: tuple[Tensor, Tensor, Tensor] | None,
) -> Tensor:
    """`kept`: buffers for the hidden layer, for its activation, and for the rows before they are weighed."""
    y_PO = rows.new(x_SD, w2_EOF.shape[1], dtype) if kept is None else kept[2]
    for chunk in rows.chunks:
        x_RD = rows.take(x_SD, chunk).to(dtype)
        h_out, a_out = (None, None) if kept is None else (kept[0][chunk.rows], kept[1][chunk.rows])
        alone = chunk.num_experts == 1 and w1_EFD.numel() and in_onednn(dtype)
        if kept is None and alone and activation_name in GELU:
            a_RF = _linear(x_RD, w1_EFD, b1_EF, chunk, activation_name=activation_name)
        else:
            h_RF = _linear(x_RD, w1_EFD, b1_EF, chunk, h_out)
            a_RF = _activated(activation, activation_name, h_RF, h_RF if kept is None else a_out)
        _linear(a_RF, w2_EOF, b2_EO, chunk, y_PO[chunk.rows])
        if kept is None and weight_P is not None:  # while they are in the cache
            y_PO[chunk.rows].mul_(weight_P[chunk.rows, None])
    return rows.sum(y_PO, None if kept is None else weight_P)


def _linear(
    x_RI: Tensor,
    w_EOI: Tensor,
    b_EO: Tensor | None,
    chunk: Chunk,
    out_RO: Tensor | None = None,
    activation_name: str | None = None,
) -> Tensor:
    """A chunk's rows through their experts' linear layers, for one expert in oneDNN with GELU behind it if named."""
    dtype, C, M = x_RI.dtype, chunk.num_experts, chunk.num_rows
    w_COI, b_CO = w_EOI[chunk.experts].to(dtype), None if b_EO is None else b_EO[chunk.experts].to(dtype)
    if C == 1 and w_COI.numel() and in_onednn(dtype):
        y_RO = linear(x_RI, w_COI[0], None if b_CO is None else b_CO[0], activation_name)
        return y_RO if out_RO is None else out_RO.copy_(y_RO)
    if out_RO is not None and out_RO.dtype != dtype:  # the gradient of the tokens under autocast
        return out_RO.copy_(_linear(x_RI, w_EOI, b_EO, chunk))
    if out_RO is None:
        out_RO = x_RI.new_empty(C * M, w_EOI.shape[1])
    x_CMI, out_CMO, w_CIO = x_RI.view(C, M, -1), out_RO.view(C, M, -1), w_COI.transpose(1, 2)
    if b_CO is None:
        torch.bmm(x_CMI, w_CIO, out=out_CMO)
    else:
        torch.baddbmm(b_CO[:, None], x_CMI, w_CIO, out=out_CMO)
    return out_RO


class _RoutedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_SD, weight_P, w1_EFD, b1_EF, w2_EOF, b2_EO, rows, activation, activation_name, dtype):
        h_PF, a_PF = (x_SD.new_empty(rows.number, w, dtype=dtype) for w in (w1_EFD.shape[1], w2_EOF.shape[2]))
        y_PO = rows.new(x_SD, w2_EOF.shape[1], dtype)
        kept = (h_PF, a_PF, y_PO)
        arguments = (x_SD, weight_P, w1_EFD, b1_EF, w2_EOF, b2_EO, rows, activation, activation_name, dtype)
        y_SO = _forward(*arguments, kept)
        if not ctx.needs_input_grad[1]:  # the rows serve the weights' gradient alone
            y_PO = None
        ctx.save_for_backward(x_SD, weight_P, w1_EFD, b1_EF, w2_EOF, b2_EO, h_PF, a_PF, y_PO)
        ctx.rows, ctx.activation, ctx.activation_name, ctx.dtype = rows, activation, activation_name, dtype
        return y_SO.detach()  # no view: views that are made in here can not be changed in place

    @staticmethod
    def backward(ctx, grad_SO):
        if torch.is_grad_enabled():  # create_graph=True
            return *_differentiable_gradients(ctx, grad_SO), *[None] * 4
        x_SD, weight_P, w1_EFD, b1_EF, w2_EOF, b2_EO, h_PF, a_PF, y_PO = ctx.saved_tensors
        rows, dtype = ctx.rows, ctx.dtype
        needs = ctx.needs_input_grad
        grad_x_PD = rows.new(x_SD, x_SD.shape[1], x_SD.dtype) if needs[0] else None
        grad_weight_P = torch.empty_like(weight_P) if needs[1] else None
        # Experts without rows are in no chunk, and their gradient is zero.
        without_rows = sum(chunk.num_experts for chunk in rows.chunks) < rows.num_experts
        new = torch.zeros_like if without_rows else torch.empty_like
        parameters = (w1_EFD, b1_EF, w2_EOF, b2_EO)
        grad_w1, grad_b1, grad_w2, grad_b2 = (new(p) if need else None for p, need in zip(parameters, needs[2:6]))
        with torch.autocast("cpu", enabled=False):
            for chunk in rows.chunks:
                E, P = chunk.experts, chunk.rows
                C, M = chunk.num_experts, chunk.num_rows
                g_RO = rows.take(grad_SO, chunk)
                if needs[1]:
                    torch.sum(g_RO * y_PO[P], 1, out=grad_weight_P[P])
                if weight_P is not None:
                    g_RO = g_RO * weight_P[P, None] if rows.token_P is None else g_RO.mul_(weight_P[P, None])
                g_CMO = g_RO.view(C, M, -1)
                if needs[4]:
                    _product(g_CMO.transpose(1, 2), a_PF[P].view(C, M, -1), grad_w2[E])
                if needs[5]:
                    grad_b2[E] = g_CMO.sum(1)
                if not (needs[0] or needs[2] or needs[3]):
                    continue
                g_RF = _linear(g_RO, w2_EOF.transpose(1, 2), None, chunk)
                g_RF = _through_activation(ctx.activation, ctx.activation_name, h_PF[P], g_RF)
                g_CMF = g_RF.view(C, M, -1)
                if needs[2]:
                    x_CMD = rows.take(x_SD, chunk).to(dtype).view(C, M, -1)
                    _product(g_CMF.transpose(1, 2), x_CMD, grad_w1[E])
                if needs[3]:
                    grad_b1[E] = g_CMF.sum(1)
                if needs[0]:
                    _linear(g_RF, w1_EFD.transpose(1, 2), None, chunk, grad_x_PD[P])
        grad_x_SD = rows.sum(grad_x_PD, None) if needs[0] else None
        return grad_x_SD, grad_weight_P, grad_w1, grad_b1, grad_w2, grad_b2, None, None, None, None


def _differentiable_gradients(ctx, grad_SO: Tensor) -> list[Tensor | None]:
    """The gradients of `_RoutedMLP` by autograd, with a graph: its forward pass once more, in plain PyTorch."""
    inputs, rows, dtype = ctx.saved_tensors[:6], ctx.rows, ctx.dtype
    x_SD, weight_P, w1_EFD, b1_EF, w2_EOF, b2_EO = (None if t is None else t.to(dtype) for t in inputs)
    parts = []
    for chunk in rows.chunks:
        y_CMD = rows.take(x_SD, chunk).unflatten(0, (chunk.num_experts, chunk.num_rows))
        for w_EOI, b_EO in ((w1_EFD, b1_EF), (w2_EOF, b2_EO)):
            y_CMD = y_CMD if w_EOI is w1_EFD else ctx.activation(y_CMD)
            y_CMD = y_CMD @ w_EOI[chunk.experts].transpose(1, 2)
            y_CMD = y_CMD if b_EO is None else y_CMD + b_EO[chunk.experts, None]
        parts.append(y_CMD.flatten(0, 1))
    y_PO = torch.cat(parts) if parts else x_SD.new_zeros(0, w2_EOF.shape[1])
    y_PO = y_PO if weight_P is None else y_PO * weight_P[:, None]
    y_SO = y_PO
    if rows.token_P is not None:
        y_SO = y_PO.new_zeros(rows.num_tokens, y_PO.shape[1]).index_add(0, rows.token_P, y_PO)
    needed = [tensor for tensor, needs in zip(inputs, ctx.needs_input_grad) if needs]
    grads = iter(torch.autograd.grad(y_SO, needed, grad_SO, create_graph=True, materialize_grads=True))
    return [next(grads) if needs else None for needs in ctx.needs_input_grad[:6]]


def _activated(activation: Callable[[Tensor], Tensor], name: str | None, h_RF: Tensor, out_RF: Tensor) -> Tensor:
    """The activation, written into `out_RF` if it keeps the width."""
    if name in GELU:
        return torch.ops.aten.gelu.out(h_RF, approximate=GELU[name], out=out_RF)
    a_RF = activation(h_RF)
    return a_RF if out_RF is h_RF else out_RF.copy_(a_RF)


def _through_activation(activation: Callable[[Tensor], Tensor], name: str | None, h_RF: Tensor, g_RF: Tensor) -> Tensor:
    """The gradient before the activation from the one after it."""
    if name in GELU:  # needs no second forward pass
        return torch.ops.aten.gelu_backward.grad_input(g_RF, h_RF, approximate=GELU[name], grad_input=g_RF)
    h_RF = h_RF.detach().requires_grad_()
    with torch.enable_grad():
        a_RF = activation(h_RF)
    return torch.autograd.grad(a_RF, h_RF, g_RF)[0]


def _product(a_CXY: Tensor, b_CYZ: Tensor, out_CXZ: Tensor) -> None:
    """out = a @ b, in the type of `out`."""
    if out_CXZ.dtype == a_CXY.dtype:
        torch.bmm(a_CXY, b_CYZ, out=out_CXZ)
    else:
        out_CXZ.copy_(torch.bmm(a_CXY, b_CYZ))
