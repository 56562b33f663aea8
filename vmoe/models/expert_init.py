"""How the experts of an upcycled layer come to differ: noise, and hidden units drawn again."""

import torch
from torch import Tensor

from vmoe.moe.experts import Experts


@torch.no_grad()
def redraw_units(experts: Experts, share: float) -> None:
    """Draws a share of the hidden units again, different ones for each expert."""
    fc1, fc2 = experts.fc1, experts.fc2
    F = fc2.weight.shape[2]
    for expert in range(len(fc2.weight) if share > 0 else 0):
        units = torch.randperm(F, device=fc2.weight.device)[: round(share * F)]
        for rows in (units, units + F) if experts.gated else (units,):
            _redraw(fc1.weight[expert], rows, 0)
            if fc1.bias is not None:
                _redraw(fc1.bias[expert], rows, 0)
        _redraw(fc2.weight[expert], units, 1)


@torch.no_grad()
def add_noise(experts: Experts, share: float) -> None:
    """Adds normal noise, with this share of the standard deviation of each expert's weights."""
    for weight in (experts.fc1.weight, experts.fc2.weight) if share > 0 else ():
        std_E11 = weight.float().flatten(1).std(dim=1)[:, None, None].to(weight.dtype)
        weight.add_(torch.randn_like(weight) * std_E11 * share)


def _redraw(tensor: Tensor, index: Tensor, dim: int) -> None:
    """Replaces some rows (dim 0) or columns (dim 1) by normal numbers of the same mean and standard deviation."""
    old = tensor.index_select(dim, index).float()
    if old.numel() > 1:
        tensor.index_copy_(dim, index, (torch.randn_like(old) * old.std() + old.mean()).to(tensor.dtype))
