"""The small decisions inside the layer on a CPU, each beside what else there was: `python -m benchmarks.choices`.

Prints a line for each way: milliseconds (median), and its ratio to the way that the layer takes. What follows from it
is in `benchmarks/NOTES.md`.

Shapes, by suffix: E experts, M rows of each, D width, F hidden width, N tokens, R rows.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import DTYPES, alternate, milliseconds, ratios
from vmoe.allocator import keep_freed_memory
from vmoe.moe.backends.cpu import ALONE, CHUNK_ROWS, ROWS_MULTIPLE_OF
from vmoe.moe.backends.onednn import linear

D, HIDDEN, TOKENS = 384, 1536, 6304


def show(title: str, calls: Mapping[str, Callable[[int], object]], rounds: int) -> None:
    """Measures in turn; the first is what the layer does."""
    seconds = alternate(calls, lambda number: number, rounds)
    chosen = next(iter(calls))
    print(title)
    for name, own in seconds.items():
        ratio = ratios(own, seconds[chosen])
        print(
            f"    {name:44} {milliseconds(own)['median']:8.3f} ms, {ratio['median']:5.2f} x "
            f"({ratio['min']:.2f}-{ratio['max']:.2f})"
        )


def products(dtype: torch.dtype, num_experts: int) -> dict[str, Callable[[int], object]]:
    """The experts' first layer: E products of M rows, together a dense layer's work."""
    E, M = num_experts, TOKENS // num_experts
    x_EMD, w_EFD = torch.randn(E, M, D).to(dtype), torch.randn(E, HIDDEN, D).to(dtype)
    b_EF, out_EMF = torch.randn(E, HIDDEN).to(dtype), torch.empty(E, M, HIDDEN, dtype=dtype)
    end_E = torch.arange(1, E + 1, dtype=torch.int32) * M

    def batched(experts: int) -> None:
        for start in range(0, E, experts):
            part = slice(start, start + experts)
            torch.baddbmm(b_EF[part, None], x_EMD[part], w_EFD[part].transpose(1, 2), out=out_EMF[part])

    def in_onednn(activation_name: str | None) -> None:
        for x_MD, w_FD, b_F in zip(x_EMD, w_EFD, b_EF, strict=True):
            linear(x_MD, w_FD, b_F, activation_name)

    ways = {
        "one expert at a time, oneDNN": lambda _: in_onednn(None),
        f"batched, chunks of at most {CHUNK_ROWS} rows": lambda _: batched(max(1, CHUNK_ROWS // M)),
    }
    if dtype != torch.float32 or M * D * HIDDEN * dtype.itemsize < ALONE:  # the layer takes the second
        ways = dict(reversed(ways.items()))
    return ways | {
        "one expert at a time, oneDNN, with GELU": lambda _: in_onednn("gelu"),
        "one expert at a time": lambda _: batched(1),
        "batched, all experts at once": lambda _: batched(E),
        "grouped_mm": lambda _: F.grouped_mm(x_EMD.view(-1, D), w_EFD.transpose(1, 2), offs=end_E),
        "dense layer": lambda _: F.linear(x_EMD.view(-1, D), w_EFD[0], b_EF[0]),
    }


def row_counts(dtype: torch.dtype) -> dict[str, Callable[[int], object]]:
    """The same products when the experts' numbers of rows are others in each call."""
    w_EFD, x_ND = torch.randn(8, HIDDEN, D).to(dtype), torch.randn(8 * 800, D).to(dtype)
    out_NF = torch.empty(8 * 800, HIDDEN, dtype=dtype)

    def run(counts: list[int]) -> None:
        for w_FD, count in zip(w_EFD, counts, strict=True):
            torch.mm(x_ND[:count], w_FD.T, out=out_NF[:count])

    def drawn(number: int) -> list[int]:
        return random.Random(number).choices(range(700, 785), k=8)

    step = ROWS_MULTIPLE_OF
    return {
        f"raised to multiples of {step}": lambda n: run([-(-count // step) * step for count in drawn(n)]),
        "as they are": lambda n: run(drawn(n)),
        "always 742": lambda _: run([742] * 8),
    }


def small_steps() -> dict[str, dict[str, Callable[[int], object]]]:
    """Steps of routing and dispatch, float32."""
    logits_NE, logits_EN = torch.randn(TOKENS, 8), torch.randn(8, TOKENS)
    gates_NE = torch.rand(TOKENS, 128)
    x_RD = torch.randn(2700, D)
    index_N = torch.full((TOKENS,), -1)
    index_N[torch.randperm(TOKENS)[:2700]] = torch.arange(2700)
    zero_1D = torch.zeros(1, D)

    def two_largest(gates: Tensor) -> Tensor:
        first = gates.max(-1, keepdim=True).indices
        return torch.cat([first, gates.scatter(-1, first, -torch.inf).max(-1, keepdim=True).indices], -1)

    return {
        "softmax over 8 experts": {
            "tokens last in memory": lambda _: logits_EN.softmax(0),
            "experts last in memory": lambda _: logits_NE.softmax(-1),
        },
        "the 2 best of 128 experts, equal ones in order": {
            "a maximum, twice": lambda _: two_largest(gates_NE),
            "stable sort": lambda _: gates_NE.argsort(dim=-1, descending=True, stable=True)[:, :2],
        },
        "rows by index, some of them zero": {
            "a row of zeros at the end": lambda _: torch.cat([x_RD, zero_1D]).index_select(
                0, torch.where(index_N < 0, len(x_RD), index_N)
            ),
            "masked_fill": lambda _: x_RD.index_select(0, index_N.clamp(min=0)).masked_fill(index_N[:, None] < 0, 0),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11, help="times that each way runs (%(default)s)")
    rounds = parser.parse_args().rounds
    keep_freed_memory()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, dtype in DTYPES.items():
        for num_experts in (8, 32, 128):
            title = f"{name}, {num_experts} experts of {TOKENS // num_experts} rows, {D} -> {HIDDEN}"
            show(title, products(dtype, num_experts), rounds)
        show(f"{name}, 8 experts, 700 to 784 rows", row_counts(dtype), rounds)
    for title, calls in small_steps().items():
        show(title, calls, rounds)


if __name__ == "__main__":
    main()
