"""The contrastive loss of several batches as of one, in the memory of one: GradCache (arXiv 2101.06983), `--accum-freq`
of open_clip.

The features of all batches are computed without a graph. Their loss gives a gradient to each feature, which a second
forward pass of every batch, with the same random numbers, brings to the weights.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class LargeBatch:
    """The outputs of all batches of a step, and the gradients of their common loss with respect to them.

    Args:
        outputs: by batch, {name: features (B, C) or a scalar, which is equal in all}, without a graph.
        compare: the loss of such outputs. It may gather those of other processes.
    """

    def __init__(self, outputs: list[dict[str, Tensor]], compare: Callable[[dict[str, Tensor]], Tensor]) -> None:
        leaves = [{name: each.detach().requires_grad_() for name, each in batch.items()} for batch in outputs]
        together = {name: [batch[name] for batch in leaves] for name in leaves[0]}
        loss = compare({name: torch.cat(v) if v[0].ndim else torch.stack(v).mean() for name, v in together.items()})
        gradients = iter(torch.autograd.grad(loss, [each for batch in leaves for each in batch.values()]))
        self.value = loss.detach()
        self.gradients = [{name: next(gradients) for name in batch} for batch in leaves]

    def loss(self, part: int, outputs: dict[str, Tensor]) -> Tensor:
        """The common loss, given a batch's outputs with their graph; the mean over the batches has its gradient."""
        linear = torch.stack([(outputs[name] * gradient).sum() for name, gradient in self.gradients[part].items()])
        share = len(self.gradients) * linear.sum()
        return self.value + (share - share.detach())
