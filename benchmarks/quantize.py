"""Experts kept in int8 or bfloat16 against plain ones: the products of one layer in turn, and what else there is.

`python -m benchmarks.quantize --experts 8 --rows 196`; it prints, and writes no file. The other ways to compute with
int8 weights are `torch._weight_int8pack_mm` and torchao's `Int8Tensor`, one expert at a time, which is all they can.

Shapes, by suffix: E experts, R rows sorted by expert, M rows of one expert, I and O a linear layer's widths.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import DTYPES, alternate, milliseconds, ratios
from vmoe.moe import GroupedLinear
from vmoe.moe.quantize import WeightOnlyLinear
from vmoe.utils.allocator import keep_freed_memory


def ways(plain: GroupedLinear) -> dict[str, Callable[[tuple[Tensor, Tensor]], Tensor]]:
    """{name: rows and counts -> rows}; "plain" first."""
    kept = {kind: WeightOnlyLinear(plain, kind).eval() for kind in ("int8", "bfloat16")}
    scale_EO = kept["int8"].scale.to(plain.weight.dtype)

    def packed(x_MI: Tensor, e: int) -> Tensor:
        return torch._weight_int8pack_mm(x_MI, kept["int8"].stored[e], scale_EO[e]) + plain.bias[e]

    def per_expert(product: Callable[[Tensor, int], Tensor], given: tuple[Tensor, Tensor]) -> Tensor:
        x_RI, count_E = given
        parts = enumerate(x_RI.split(count_E.tolist()))
        return torch.cat([product(x_MI, e) for e, x_MI in parts if len(x_MI)])

    found = {"plain": lambda given: plain(*given), **{k: lambda given, m=m: m(*given) for k, m in kept.items()}}
    found["_weight_int8pack_mm"] = partial(per_expert, packed)
    try:
        from torchao.quantization import Int8Tensor, PerRow
    except ImportError:
        print("torchao's Int8Tensor: not installed")
        return found
    stack = Int8Tensor.from_hp(plain.weight.detach(), PerRow())
    found["torchao"] = partial(per_expert, lambda x_MI, e: F.linear(x_MI, stack[e], plain.bias[e]))
    return found


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantize", description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=8, help="E (%(default)s)")
    parser.add_argument("--rows", type=int, default=196, help="of all experts together (%(default)s)")
    parser.add_argument("--width", type=int, default=384, help="I (%(default)s)")
    parser.add_argument("--hidden", type=int, default=1536, help="O (%(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="times that each way runs (%(default)s)")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES), help="types, in turn")
    parser.add_argument("--threads", type=int, help="of PyTorch; default: its own choice")
    args = parser.parse_args(argv)
    for name in ("experts", "rows", "width", "hidden", "rounds", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    keep_freed_memory()
    torch.manual_seed(0)
    linear = GroupedLinear(args.experts, args.width, args.hidden)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {vars(args)}")

    def make_input(number: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        torch.manual_seed(number + 100)
        expert_R = torch.randint(args.experts, (args.rows,))
        return torch.randn(args.rows, args.width, dtype=dtype), expert_R.bincount(minlength=args.experts)

    for name in args.dtype:
        plain = copy.deepcopy(linear).to(DTYPES[name])
        calls = ways(plain)
        given = make_input(0, DTYPES[name])
        exact = linear(given[0].float(), given[1])
        seconds = alternate(calls, partial(make_input, dtype=DTYPES[name]), args.rounds)
        for way, call in calls.items():
            error = (call(given).float() - exact).norm() / exact.norm()
            time, ratio = milliseconds(seconds[way]), ratios(seconds[way], seconds["plain"])
            spread = f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"
            print(f"{name:9} {way:20} {time['median']:9.2f} ms, {spread:22} x plain, error {error:.4f}", flush=True)


if __name__ == "__main__":
    main()
