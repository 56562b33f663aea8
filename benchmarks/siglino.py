"""SigLino's forward pass with our experts against the same computation with a Python loop over experts, in turn.

`python -m benchmarks.siglino --threads 2`; it prints, and writes no file. The loop is what the project's own code does:
tokens sorted by expert, three matrix multiplications for each expert, the results added to their tokens. Routing,
attention and weights (random) are the same in both, and their outputs are compared first.

Shapes, by suffix: B batch, S tokens of all images, E experts, K choices, A = S·K, D width.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vmoe
from benchmarks.measure import alternate, milliseconds, ratios
from vmoe.models.siglino import SigLino
from vmoe.moe import SparseMoE
from vmoe.utils.allocator import keep_freed_memory


class LoopOverExperts(nn.Module):
    """The experts of a SigLino's layer, one after the other."""

    def __init__(self, layer: SparseMoE) -> None:
        super().__init__()
        self.gate, self.bias, self.K = layer.router.weight, layer.router.expert_bias, layer.num_selected_experts
        self.w1, self.w3 = (each.contiguous() for each in layer.experts.fc1.weight.detach().chunk(2, dim=1))
        self.w2 = layer.experts.fc2.weight

    def forward(self, x_BTD: Tensor, mask_BT: None = None) -> Tensor:
        x_SD = x_BTD.flatten(0, 1)
        score_SE = F.linear(x_SD, self.gate).sigmoid()
        index_SK = (score_SE + self.bias).topk(self.K, dim=-1).indices
        order_A = index_SK.flatten().argsort(stable=True)
        token_A = order_A // self.K
        count_E = index_SK.flatten().bincount(minlength=len(self.w1)).tolist()
        token_AD = token_A[:, None].expand(-1, x_SD.shape[1])
        parts = [
            F.linear(F.silu(F.linear(x_RD, w1)) * F.linear(x_RD, w3), w2)
            for x_RD, w1, w2, w3 in zip(x_SD.gather(0, token_AD).split(count_E), self.w1, self.w2, self.w3, strict=True)
        ]
        y_AD = torch.cat(parts) * score_SE.gather(-1, index_SK).flatten()[order_A, None]
        return torch.zeros_like(x_SD).scatter_add(0, token_AD, y_AD).view_as(x_BTD)


@contextmanager
def replaced(model: SigLino, mlps: Sequence[nn.Module]) -> Iterator[None]:
    """The model with other MLPs in its blocks."""
    own = [block.mlp for block in model.blocks]
    for block, mlp in zip(model.blocks, mlps, strict=True):
        block.mlp = mlp
    try:
        yield
    finally:
        for block, mlp in zip(model.blocks, own, strict=True):
            block.mlp = mlp


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.siglino", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="siglino_moe_0_3b", help="a sparse one (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images (%(default)s)")
    parser.add_argument("--size", type=int, default=256, help="of an image, in pixels (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="times that each way runs (%(default)s)")
    parser.add_argument("--depth", type=int, default=18, help="blocks (%(default)s)")
    parser.add_argument("--threads", type=int, help="of PyTorch; default: its own choice")
    args = parser.parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    keep_freed_memory()
    torch.manual_seed(0)
    model = vmoe.create_model(args.model, depth=args.depth).eval()
    loops = [LoopOverExperts(block.mlp) for block in model.blocks]

    def loop(images: Tensor) -> Tensor:
        with replaced(model, loops):
            return model(images)

    def make_input(number: int) -> Tensor:
        generator = torch.Generator().manual_seed(100 + number)
        return torch.randn(args.batch, 3, args.size, args.size, generator=generator)

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {vars(args)}")
    images = make_input(-100)
    ours, theirs = model(images), loop(images)
    print(f"largest difference of the outputs: {(ours - theirs).abs().max() / theirs.abs().max():.1e} of the largest")
    seconds = alternate({"loop": loop, "ours": model}, make_input, args.rounds, warmup=1)
    for name, own in seconds.items():
        time, ratio = milliseconds(own), ratios(seconds["loop"], own)
        spread = f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"
        print(
            f"{name:5} {time['median']:9.1f} ms ({time['min']:.1f}-{time['max']:.1f}), {spread} x the speed of the loop"
        )


if __name__ == "__main__":
    main()
