"""Which rows a program of a grouped product computes, and whose: a table on the device, made from the experts' counts.

Shapes, by suffix: E experts, T tiles.
"""

import torch
from torch import Tensor

# Usual, not yet tuned on a GPU.
MAX_BLOCK_M = 128


def block_rows(num_rows: int, num_experts: int) -> int:
    """BLOCK_M: rows of a tile, about as many as an expert has, between 16 and `MAX_BLOCK_M`."""
    block = 16
    while block < MAX_BLOCK_M and block * num_experts < num_rows:
        block *= 2
    return block


def tile_table(count_E: Tensor, num_rows: int, block_m: int) -> Tensor:
    """Tiles that cover all rows: (T, 3) int32, the expert of each, its first row and the end of its expert's rows.

    T is the most there can be. Rows beyond the counts belong to an expert E, which gives zeros; a tile that is not
    needed starts at the end of the rows or behind it.
    """
    E = count_E.shape[0]
    count_E1 = torch.cat([count_E, (num_rows - count_E.sum()).view(1)])
    end_E1 = count_E1.cumsum(0)
    tiles_E1 = (count_E1 + block_m - 1) // block_m
    last_E1 = tiles_E1.cumsum(0)
    T = (num_rows + (E + 1) * (block_m - 1)) // block_m
    tile_T = torch.arange(T, device=count_E.device)
    expert_T = torch.searchsorted(last_E1, tile_T, right=True).clamp(max=E)
    place_T = tile_T - (last_E1 - tiles_E1)[expert_T]
    end_T = end_E1[expert_T]
    return torch.stack([expert_T, end_T - count_E1[expert_T] + place_T * block_m, end_T], dim=1).int()
