"""Expert parallelism: each process holds some experts, and rows are sent to the process of their expert and back.

Process p of P holds the experts p·E/P ... (p+1)·E/P - 1, so the rows for one process are contiguous among rows that are
sorted by expert. With a capacity the rows are sent in padded buffers of a fixed size: no host synchronisation, and
compiled code knows the size. Else (no capacity, or evaluation, where batches differ in size) the counts are sent first.

Shapes, by suffix: P processes, E experts of all, L = E/P experts of one, R rows sorted by expert, C rows of a buffer
per expert and process, D width, S rows that this process receives.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single, wait_tensor

from vmoe.moe.dispatch import gather_rows
from vmoe.moe.experts import RunExperts
from vmoe.moe.grouped import expert_of_rows


class ExpertExchange:
    """Runs rows through experts that are sharded over a group; the value of `Experts.exchange`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.num_processes = dist.get_world_size(group)

    def __call__(self, run: RunExperts, x_RD: Tensor, count_E: Tensor, max_count: int | None) -> Tensor:
        """`Experts.forward`; `run` computes the experts of this process."""
        if max_count is None:
            return self._counts_first(run, x_RD, count_E)
        if torch.compiler.is_compiling():  # compiled code knows one batch size
            count_E = _check_equal(count_E, max_count, self.group.group_name)
        else:
            max_count = _extremes(max_count, self.group)[1]
        return self._fixed_buffers(run, x_RD, count_E, max_count)

    def _fixed_buffers(self, run: RunExperts, x_RD: Tensor, count_E: Tensor, C: int) -> Tensor:
        P, E, R = self.num_processes, len(count_E), x_RD.shape[0]
        L = E // P
        device = x_RD.device
        end_E = count_E.cumsum(0)
        start_E = end_E - count_E
        slot_C = torch.arange(C, device=device)
        row_EC = torch.where(slot_C < count_E[:, None], start_E[:, None] + slot_C, -1)
        expert_R = expert_of_rows(end_E, R)
        first_R = start_E[expert_R.clamp(max=E - 1)]
        buffer_R = torch.where(expert_R < E, expert_R * C + torch.arange(R, device=device) - first_R, -1)

        # Unused rows of the buffers are copies of the first row: the experts are as finite for them as for that one.
        send = gather_rows(x_RD, row_EC.flatten().clamp(min=0), buffer_R[:, None], True, True)
        mine = _AllToAll.apply(send, None, None, self.group)
        mine = mine.view(P, L, C, -1).transpose(0, 1).reshape(L * P * C, -1)
        y = run(mine, torch.full((L,), P * C, dtype=count_E.dtype, device=device))
        y = y.view(L, P, C, -1).transpose(0, 1).reshape(E * C, -1)
        y = _AllToAll.apply(y, None, None, self.group)
        return gather_rows(y, buffer_R, row_EC.flatten()[:, None], True, True)

    def _counts_first(self, run: RunExperts, x_RD: Tensor, count_E: Tensor) -> Tensor:
        P, R = self.num_processes, x_RD.shape[0]
        count_PL = count_E.view(P, -1)
        arriving_PL = torch.empty_like(count_PL)
        dist.all_to_all_single(arriving_PL, count_PL.contiguous(), group=self.group)
        # The one host synchronisation: the sizes of what is sent and received.
        sent_P, received_P = torch.stack([count_PL.sum(1), arriving_PL.sum(1)]).tolist()
        used = sum(sent_P)

        mine = _AllToAll.apply(x_RD[:used], received_P, sent_P, self.group)
        # They arrive process by process, and the experts want them expert by expert.
        expert_PL = torch.arange(count_PL.shape[1], device=x_RD.device).expand_as(arriving_PL)
        expert_S = expert_PL.flatten().repeat_interleave(arriving_PL.flatten(), output_size=sum(received_P))
        order_S = expert_S.argsort(stable=True)
        back_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S), device=order_S.device))
        y = run(gather_rows(mine, order_S, back_S[:, None], False, False), arriving_PL.sum(0))
        y = gather_rows(y, back_S, order_S[:, None], False, False)
        y = _AllToAll.apply(y, sent_P, received_P, self.group)
        return y if used == R else torch.cat([y, y.new_zeros(R - used, y.shape[1])])


def _extremes(number: int, group: dist.ProcessGroup) -> tuple[int, int]:
    """The smallest and the largest number of all processes."""
    # On the CPU, without a host synchronisation, where the group has a backend for it.
    on_cpu = torch.device("cpu") in group._device_types
    extremes = torch.tensor([-number, number], device=None if on_cpu else group._device_types[0])
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
    smallest, largest = extremes.tolist()
    return -smallest, largest


@torch.library.custom_op("vmoe::check_equal", mutates_args=())
def _check_equal(count_E: Tensor, number: int, group_name: str) -> Tensor:
    """A copy of the counts, if all processes have the same number; else an error before they exchange rows."""
    smallest, largest = _extremes(number, dist.distributed_c10d._resolve_process_group(group_name))
    if smallest != largest:
        raise RuntimeError(
            f"compiled experts exchange buffers of one size, and the processes have {smallest} to {largest} rows an "
            "expert: give all processes batches of the same size, or do not compile the model"
        )
    return count_E.clone()


@_check_equal.register_fake
def _(count_E: Tensor, number: int, group_name: str) -> Tensor:
    return torch.empty_like(count_E)


class _AllToAll(torch.autograd.Function):
    """Sends rows to the other processes; gradients go the opposite way, and so on for any derivative."""

    @staticmethod
    def forward(
        ctx, rows: Tensor, received_P: list[int] | None, sent_P: list[int] | None, group: dist.ProcessGroup
    ) -> Tensor:
        ctx.received_P, ctx.sent_P, ctx.group = received_P, sent_P, group
        return wait_tensor(all_to_all_single(rows.contiguous(), received_P, sent_P, group))

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _AllToAll.apply(grad, ctx.sent_P, ctx.received_P, ctx.group), None, None, None
