"""The sparse layer against the dense MLP of the same active compute: `python -m benchmarks.layer --help`.

Both run in turn in one process (A B A B ...), so that a drifting machine slows both. On Linux the allocator decides
much on a CPU; the training command keeps freed memory (`vmoe.training.cli.keep_freed_memory`), and so does this.
"""

import argparse
import statistics
import time

import torch
from timm.layers import Mlp

from vmoe.moe import SparseMoE
from vmoe.training.cli import keep_freed_memory


def seconds(module: torch.nn.Module, x: torch.Tensor, backward: bool) -> float:
    """Of one call of `module`, with the backward pass or without gradients."""
    x = x.clone().requires_grad_(backward)
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        y = module(x)
    if backward:
        y.backward(torch.ones_like(y))
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=6304, help="tokens of a call")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--selected", type=int, default=1)
    parser.add_argument("--capacity", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    keep_freed_memory()

    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    sparse = SparseMoE(
        args.width,
        args.hidden,
        num_experts=args.experts,
        num_selected_experts=args.selected,
        capacity_factor=args.capacity,
        batch_priority=True,
    )
    # The dense layer of the same active compute: K experts' worth of hidden units.
    dense = Mlp(args.width, args.hidden * args.selected)
    sparse, dense = sparse.to(args.device, dtype), dense.to(args.device, dtype)
    x = torch.randn(1, args.tokens, args.width, device=args.device, dtype=dtype)
    with torch.no_grad():
        dropped = (sparse(x) == 0).all(-1).float().mean().item()

    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads, {vars(args)}")
    print(f"tokens that no expert had room for: {dropped:.1%}")
    for backward, name in ((False, "forward"), (True, "forward + backward")):
        for module in (sparse, dense):
            seconds(module, x, backward)
        pairs = [(seconds(sparse, x, backward), seconds(dense, x, backward)) for _ in range(args.rounds)]
        ratios = sorted(a / b for a, b in pairs)
        times = [1e3 * statistics.median(side) for side in zip(*pairs)]
        print(
            f"{name:18} sparse {times[0]:7.1f} ms, dense {times[1]:7.1f} ms, "
            f"ratio {statistics.median(ratios):.2f} (min {ratios[0]:.2f}, max {ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    main()
