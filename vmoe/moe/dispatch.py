"""Which token goes to which expert, in what order, and which are dropped: one stable sort of the assignments.

Shapes, by suffix: G groups, N tokens in a group, E experts, K choices per token, A = G*N*K assignments (a token and one
of its choices), R rows handed to the experts, M any number of rows, D width.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vmoe.moe.autograd import apply, on_eager_cpu


def expert_capacity(
    num_tokens: int | Tensor,
    num_experts: int,
    num_selected_experts: int,
    capacity_factor: float,
    rounding: str = "ceil",
    multiple_of: int = 4,
) -> int | Tensor:
    """Rows that each expert takes from one group: S·K·C/E, raised to a multiple (V-MoE, arXiv 2106.05974, eq. 4).

    `num_tokens`: S, tokens in the group, or a tensor of such numbers. `capacity_factor`: C; 1.0 is just enough if the
    tokens are distributed evenly. `rounding`: "ceil", "round", or "tutel" for K·floor(C·ceil(S/E)) (arXiv
    2206.03382). ValueError: the factor is not positive or rounds to a capacity of 0, or `rounding` is unknown.
    """
    if not capacity_factor > 0:
        raise ValueError(f"capacity_factor must be > 0 (or None for no limit), got {capacity_factor}")
    if rounding not in ("ceil", "round", "tutel"):
        raise ValueError(f"rounding must be 'ceil', 'round' or 'tutel', got {rounding!r}")
    several = isinstance(num_tokens, Tensor)
    S = num_tokens.double() if several else num_tokens
    ceil, floor = (torch.ceil, torch.floor) if several else (math.ceil, math.floor)
    if rounding == "tutel":
        exact = num_selected_experts * floor(capacity_factor * ceil(S / num_experts))
    else:
        exact = S * num_selected_experts * capacity_factor / num_experts
    if several:
        capacity_G = exact.round() if rounding == "round" else exact.ceil()
        return (torch.ceil(capacity_G / multiple_of) * multiple_of).long()
    capacity = round(exact) if rounding == "round" else math.ceil(exact)
    if capacity < 1 and num_tokens > 0:
        raise ValueError(
            f"capacity_factor={capacity_factor} gives no capacity: {num_tokens} tokens for {num_experts} experts round "
            "to 0; use a larger factor, capacity_rounding='ceil', or num_slots for router='soft'"
        )
    return math.ceil(capacity / multiple_of) * multiple_of


class Capacity(NamedTuple):
    """How many rows an expert takes from a group: a fixed number, or what `expert_capacity` gives for a factor."""

    fixed: int | None = None
    factor: float | None = None
    rounding: str = "ceil"
    multiple_of: int = 4

    def rows(
        self, num_tokens: int, num_experts: int, num_selected_experts: int, mask: Tensor | None, ensemble_size: int = 1
    ) -> tuple[int | Tensor | None, int | None]:
        """(a number, or one per group of the mask (its leading axes); the most it can be). None: no limit. In
        an ensemble E counts the experts of all members, and a group the tokens of one.

        Padding adds no capacity: else the length of other captions in the batch would change what is kept of this one.
        """
        if self.fixed is not None or self.factor is None:
            return self.fixed, self.fixed
        given = (num_experts, num_selected_experts, self.factor, self.rounding, self.multiple_of)
        # Unknown if the number of tokens is symbolic.
        most = expert_capacity(ensemble_size * num_tokens, *given) if isinstance(num_tokens, int) else None
        return most if mask is None else expert_capacity(ensemble_size * mask.sum(dim=-1), *given), most


@dataclass(frozen=True)
class DispatchPlan:
    """Where every assignment goes. Rows are sorted by expert, then by group, then by priority.

    Attributes:
        assignment_R: flat index into (G, N, K) of the assignment that fills each row; -1 for an unused row. Unused rows
            come last, and only where the number of rows must not depend on the data (not `on_eager_cpu`).
        row_A: row of each assignment, -1 if it was dropped or its token is padding.
        count_E: kept rows of each expert.
        position_GNK: index of each assignment in its expert's queue (0 first), kept or not; meaningless for padding.
        may_drop: `row_A` may hold a -1.
        may_pad: `assignment_R` may hold a -1.
        shape: (G, N, K).
    """

    assignment_R: Tensor
    row_A: Tensor
    count_E: Tensor
    position_GNK: Tensor
    may_drop: bool
    may_pad: bool
    shape: tuple[int, int, int]

    @property
    def token_R(self) -> Tensor:
        """Flat index into (G, N) of each row's token; -1 for an unused row."""
        K = self.shape[2]
        return self.assignment_R if K == 1 else self.assignment_R.div(K, rounding_mode="floor")  # -1 stays -1

    @property
    def kept_GNK(self) -> Tensor:
        """(G, N, K) bool: the expert kept this token and choice."""
        return (self.row_A >= 0).view(self.shape)


def plan_dispatch(
    expert_index_GNK: Tensor,
    num_experts: int,
    capacity: int | Tensor | None = None,
    priority_GN: Tensor | None = None,
    mask_GN: Tensor | None = None,
    max_capacity: int | None = None,
    chosen_GNK: Tensor | None = None,
    ensemble_size: int = 1,
) -> DispatchPlan:
    """Queue the assignments before their experts and cut each queue at its capacity.

    All first choices go before all second choices. Within a choice tokens go in their order or, given priorities, the
    larger one first, ties in token order (V-MoE, algorithms 1 and 2).

    Args:
        expert_index_GNK: chosen experts, best first.
        capacity: rows that an expert takes from each group: a number, a (G,) tensor, or None for no limit.
        priority_GN: for batch-prioritized routing, the gate of each token's first choice. None: token order.
        mask_GN: True where the token is real; padding takes no capacity.
        max_capacity: upper bound of `capacity` where that is a tensor; bounds the number of rows.
        chosen_GNK: False for a choice that the router itself dropped; it takes no capacity.
        ensemble_size: members, each with its own experts; a group chooses among those of one. It bounds the number of
            rows.
    """
    (G, N, K), E, device = expert_index_GNK.shape, num_experts, expert_index_GNK.device
    A = G * N * K
    order_A, queue_A = _queues(expert_index_GNK, E, priority_GN, mask_GN, chosen_GNK)
    length_Q = torch.zeros(E * G + 1, dtype=torch.long, device=device)
    length_Q = length_Q.scatter_add(0, queue_A, torch.ones_like(queue_A))
    served_A = torch.arange(A, device=device) - (length_Q.cumsum(0) - length_Q)[queue_A]
    position_GNK = torch.empty_like(served_A).scatter_(0, order_A, served_A).view(G, N, K)
    length_EG = length_Q[: E * G].view(E, G)
    may_drop = capacity is not None or mask_GN is not None or chosen_GNK is not None
    may_pad = may_drop and not on_eager_cpu(device)
    if not may_drop:
        assignment_R, row_A = order_A, torch.empty_like(order_A).scatter_(0, order_A, torch.arange(A, device=device))
    else:
        kept_A = queue_A < E * G
        if capacity is not None:
            limit_A = capacity.repeat(E + 1)[queue_A] if isinstance(capacity, Tensor) else capacity
            kept_A = kept_A & (served_A < limit_A)
            length_EG = length_EG.clamp(max=capacity)
        bound = max_capacity if isinstance(capacity, Tensor) else capacity
        max_rows = A if bound is None or not isinstance(A, int) else min(A, G // ensemble_size * E * bound)
        assignment_R, row_A = _close_gaps(order_A, kept_A, max_rows if may_pad else None)
    return DispatchPlan(assignment_R, row_A, length_EG.sum(1), position_GNK, may_drop, may_pad, (G, N, K))


def _close_gaps(order_A: Tensor, kept_A: Tensor, num_rows: int | None) -> tuple[Tensor, Tensor]:
    """The assignment of each row, and the row of each assignment or -1. `num_rows`: R; None: ask the device for it."""
    # Kept assignments are already sorted by expert, so a running count does.
    row_of_kept_A = torch.where(kept_A, kept_A.cumsum(0) - 1, -1)
    row_A = torch.empty_like(row_of_kept_A).scatter_(0, order_A, row_of_kept_A)
    if num_rows is None:
        return order_A[kept_A], row_A
    buffer = torch.full((num_rows + 1,), -1, dtype=torch.long, device=order_A.device)
    return buffer.scatter(0, torch.where(kept_A, row_of_kept_A, num_rows), order_A)[:num_rows], row_A


def _queues(
    expert_index_GNK: Tensor, E: int, priority_GN: Tensor | None, mask_GN: Tensor | None, chosen_GNK: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The assignments in the order in which they are served, and the queue of each: expert * G + group, or E * G."""
    (G, _, K), device = expert_index_GNK.shape, expert_index_GNK.device
    # One queue per expert and group; experts outermost, so that an expert's rows lie together. Padding queues last.
    queue_GNK = expert_index_GNK
    if not isinstance(G, int) or G > 1:
        queue_GNK = queue_GNK * G + torch.arange(G, device=device)[:, None, None]
    if mask_GN is not None:
        queue_GNK = queue_GNK.masked_fill(~mask_GN[..., None], E * G)
    if chosen_GNK is not None:
        queue_GNK = queue_GNK.masked_fill(~chosen_GNK, E * G)
    # The one sort, by a single number: queue, choice, priority. It is stable, so what is equal stays in token order.
    key_GNK = queue_GNK
    if K > 1:
        key_GNK = key_GNK * K + torch.arange(K, device=device)
    if priority_GN is not None:
        key_GNK = key_GNK * 2**32 + _descending(priority_GN.detach())[..., None]
    order_A = key_GNK.flatten().sort(stable=True).indices
    return order_A, queue_GNK.flatten()[order_A]


def _descending(priority_GN: Tensor) -> Tensor:
    """A sort key: integers from 0 to 2^32 - 1, the smaller the larger the priority, equal where it is equal."""
    # More than 32 bits, or an export (ONNX has no bits of floats): the ranks do.
    if priority_GN.dtype == torch.float64 or torch.compiler.is_exporting():
        sorted_GN, order_GN = priority_GN.sort(dim=1, descending=True, stable=True)
        # Not by slices, which an export would fix to a size: there may be a single item.
        before_N = (torch.arange(sorted_GN.shape[1], device=sorted_GN.device) - 1).clamp(min=0)
        is_new_GN = sorted_GN != sorted_GN.index_select(1, before_N)
        return torch.empty_like(order_GN).scatter_(1, order_GN, is_new_GN.long().cumsum(1))
    # The bits of a float32 are in the order of its value, except for the sign. Adding zero makes one of the two zeros.
    bits_GN = (priority_GN.float() + 0.0).view(torch.int32)
    rising_GN = bits_GN ^ ((bits_GN >> 31) & 0x7FFFFFFF)
    return 0x7FFFFFFF - rising_GN.long()


class _GatherRows(torch.autograd.Function):
    """Rows of `x` by index: (R, D), zero where the index is -1.

    `inverse_MK` is the index seen from `x`: its rows in the result. `index_holes`, `inverse_holes`: there may be a -1.
    So the backward pass gathers too, in a fixed order. That of plain indexing adds rows with atomics on a GPU.
    """

    @staticmethod
    def forward(x_MD: Tensor, index_R: Tensor, inverse_MK: Tensor, index_holes: bool, inverse_holes: bool) -> Tensor:
        return _take(x_MD, index_R, index_holes)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, _, inverse_MK, ctx.index_holes, ctx.inverse_holes = inputs
        ctx.save_for_backward(inverse_MK)

    @staticmethod
    def backward(ctx, grad_RD: Tensor):
        (inverse_MK,) = ctx.saved_tensors
        M, K = inverse_MK.shape
        grad_MKD = _take(grad_RD, inverse_MK.flatten(), ctx.inverse_holes).view(M, K, grad_RD.shape[-1])
        return grad_MKD[:, 0] if K == 1 else grad_MKD.sum(1), None, None, None, None


gather_rows = partial(apply, _GatherRows)


def _take(x_MD: Tensor, index_R: Tensor, holes: bool) -> Tensor:
    """x[index], zero where the index is -1 (`holes`: such entries may occur)."""
    if not holes:
        return x_MD.index_select(0, index_R)
    if x_MD.shape[0] == 0:
        return x_MD.new_zeros(index_R.shape[0], x_MD.shape[1])
    if on_eager_cpu(x_MD.device):
        # A row of zeros at the end: on a CPU, filling rows of the result by a mask takes ten times as long.
        M, D = x_MD.shape
        return torch.cat([x_MD, x_MD.new_zeros(1, D)]).index_select(0, torch.where(index_R < 0, M, index_R))
    return x_MD.index_select(0, index_R.clamp(min=0)).masked_fill(index_R[:, None] < 0, 0)


def dispatch(x_GND: Tensor, plan: DispatchPlan) -> Tensor:
    """Each token copied to the rows of its experts: (R, D), sorted by expert; unused rows are zero."""
    G, N, K = plan.shape
    x_SD = x_GND.reshape(G * N, x_GND.shape[2])
    return gather_rows(x_SD, plan.token_R, plan.row_A.view(G * N, K), plan.may_pad, plan.may_drop)


def combine(y_RD: Tensor, combine_weights_GNK: Tensor, plan: DispatchPlan) -> Tensor:
    """The rows brought back to their tokens, in their type: y_n = sum_k w_nk · expert_k(x_n), (G, N, D)."""
    G, N, K = plan.shape
    weight_SK = combine_weights_GNK.reshape(G * N, K).to(y_RD.dtype)
    index = (plan.row_A.view(G * N, K), plan.assignment_R, plan.may_drop, plan.may_pad)
    y_SD = apply(_WeightedSum, y_RD, weight_SK, *index)
    return y_SD.view(G, N, y_RD.shape[1])


class _WeightedSum(torch.autograd.Function):
    """y_s = sum_k w_sk · y[row_sk]: (R, D), (S, K), (S, K) -> (S, D). A row of -1 is zero."""

    @staticmethod
    def forward(
        y_RD: Tensor, weight_SK: Tensor, row_SK: Tensor, assignment_R: Tensor, may_drop: bool, may_pad: bool
    ) -> Tensor:
        if on_eager_cpu(y_RD.device):
            return _sum_of_bags(y_RD, weight_SK, row_SK, may_drop)
        y_SKD = _take(y_RD, row_SK.flatten(), may_drop).view(*row_SK.shape, y_RD.shape[1])
        if y_RD.element_size() < 4:  # `sum` adds in float32; one by one, each addition would be rounded
            return (y_SKD * weight_SK[..., None]).sum(1)
        sum_SD = y_SKD[:, 0] * weight_SK[:, :1]
        for k in range(1, y_SKD.shape[1]):
            sum_SD = sum_SD.addcmul(y_SKD[:, k], weight_SK[:, k, None])  # vmap may refuse addcmul_
        return sum_SD

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *tensors, ctx.may_drop, ctx.may_pad = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad_SD: Tensor):
        # By plain indexing: on a GPU a second derivative adds in any order.
        y_RD, weight_SK, row_SK, assignment_R = ctx.saved_tensors
        K = row_SK.shape[1]
        token_R = assignment_R if K == 1 else assignment_R.div(K, rounding_mode="floor")  # -1 stays -1
        grad_RD = _take(grad_SD, token_R, ctx.may_pad)
        weight_R1 = _take(weight_SK.reshape(-1, 1), assignment_R, ctx.may_pad)
        grad_weight_R1 = (grad_RD * y_RD).sum(-1, keepdim=True)
        grad_weight_A1 = _take(grad_weight_R1, row_SK.flatten(), ctx.may_drop)
        return grad_RD * weight_R1, grad_weight_A1.view_as(weight_SK), None, None, None, None


def _sum_of_bags(y_RD: Tensor, weight_SK: Tensor, row_SK: Tensor, may_drop: bool) -> Tensor:
    """In one pass over the rows, which on a CPU is faster than to gather them first."""
    if not may_drop:
        return F.embedding_bag(row_SK, y_RD, mode="sum", per_sample_weights=weight_SK)
    kept_SK = row_SK >= 0
    end_S = kept_SK.sum(1).cumsum(0)
    start_S = F.pad(end_S, (1, 0))[:-1]
    return F.embedding_bag(row_SK[kept_SK], y_RD, start_S, mode="sum", per_sample_weights=weight_SK[kept_SK])
