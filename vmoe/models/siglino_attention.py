"""SigLino's attention (arXiv 2512.20157): rotated by positions in two dimensions, with a learned sink in each head.

Shapes, by suffix: B batch, P patches, T tokens, H heads, F frequencies of a head, d width of a head, D width.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def golden_frequencies(num_heads: int, count: int, min_frequency: float, max_frequency: float) -> Tensor:
    """(H, F, 2) frequencies of each head, down and across: their lengths grow geometrically within a head.

    Their directions are a low-discrepancy sequence, multiples of 1/g and 1/g² modulo 1 with g³ = g + 1 (the golden
    ratio's relative for two dimensions), taken through the inverse of the normal distribution.
    """
    ratio = 2.0
    for _ in range(10):  # the released frequencies were made with the value after ten steps
        ratio = (1 + ratio) ** (1 / 3)
    number_N1 = torch.arange(1, num_heads * count + 1, dtype=torch.float64)[:, None]
    point_N2 = (number_N1 * torch.tensor([1 / ratio, 1 / ratio**2], dtype=torch.float64)) % 1
    direction_N2 = F.normalize(torch.erfinv(2 * point_N2 - 1), dim=-1)
    length_F = min_frequency * (max_frequency / min_frequency) ** torch.linspace(0, 1, count)
    return direction_N2.float().view(num_heads, count, 2) * length_F[:, None]


def patch_positions(shape_B2: Tensor, num_patches: int) -> Tensor:
    """(B, P, 2) positions, down and across, of patches that lie row by row in grids of (rows, columns) `shape_B2`.

    A grid of H rows and W columns reaches from -sqrt(H/W) to sqrt(H/W) down and from -sqrt(W/H) to sqrt(W/H) across.
    """
    index_P = torch.arange(num_patches, device=shape_B2.device)
    columns_B1 = shape_B2[:, 1:]
    cell_BP2 = torch.stack([index_P // columns_B1, index_P % columns_B1], dim=-1)
    size_B12 = shape_B2[:, None]
    reach_B12 = (size_B12 / size_B12.flip(-1)).sqrt()
    return reach_B12 * (2 * cell_BP2 / (size_B12 - 1).clamp(min=1) - 1)


def rotation(position_BT2: Tensor, frequency_HF2: Tensor) -> Tensor:
    """(B, H, T, 4F) sines and cosines for timm's `apply_rot_embed_cat`; a token at (0, 0) is not rotated."""
    # Not by a matrix multiplication, which autocast would compute in half precision.
    angle_BHTF = (position_BT2[:, None, :, None] * frequency_HF2[:, None]).sum(-1)
    return torch.cat([each.repeat_interleave(2, -1) for each in (angle_BHTF.sin(), angle_BHTF.cos())], dim=-1)


class SinkAttention(nn.Module):
    """Self-attention without biases; each head may attend to a sink, which has a learned score and the value zero.

    So the output of a head is softmax attention times sigmoid(logsumexp(scores) - sink). Queries and keys are
    normalised (`qk_norm`, RMS without weights), and the second half of each is rotated. `num_kv_heads`: of keys and
    values, each serves several heads.
    """

    def __init__(self, dim: int, num_heads: int, head_dim: int, num_kv_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.num_kv_heads = num_heads, head_dim, num_kv_heads
        self.fused_attn = True
        self.qkv = nn.Linear(dim, (num_heads + 2 * num_kv_heads) * head_dim, bias=False)
        self.q_norm = nn.RMSNorm(head_dim, elementwise_affine=False) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim, elementwise_affine=False) if qk_norm else nn.Identity()
        self.sinks = nn.Parameter(torch.zeros(num_heads))
        self.proj = nn.Linear(num_heads * head_dim, dim, bias=False)

    def forward(self, x_BTD: Tensor, rotation_BHTr: Tensor, bias_B11T: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D); `bias_B11T` is -inf for tokens that are masked, or None."""
        heads_BhTd = rearrange(self.qkv(x_BTD), "b t (h d) -> b h t d", d=self.head_dim)
        sizes = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        q_BHTd, k_BhTd, v_BhTd = heads_BhTd.split(sizes, dim=1)
        q_BHTd, k_BhTd = self.q_norm(q_BHTd), self.k_norm(k_BhTd)
        if (served := self.num_heads // self.num_kv_heads) > 1:  # each head rotates the keys by its own frequencies
            k_BhTd, v_BhTd = (each.repeat_interleave(served, dim=1) for each in (k_BhTd, v_BhTd))
        q_BHTd, k_BHTd = _rotate(q_BHTd, rotation_BHTr), _rotate(k_BhTd, rotation_BHTr)
        # The sink is one more key: its score is the bias, since the key is zero, and so is its value.
        k_BHSd, v_BHSd = F.pad(k_BHTd, (0, 0, 0, 1)), F.pad(v_BhTd, (0, 0, 0, 1))
        sink_1H11 = self.sinks.to(q_BHTd.dtype).view(1, -1, 1, 1)
        if bias_B11T is None:
            bias_B11T = sink_1H11.new_zeros(1, 1, 1, x_BTD.shape[1])
        B, H = bias_B11T.shape[0], self.num_heads
        bias_BH1S = torch.cat([bias_B11T.expand(-1, H, -1, -1), sink_1H11.expand(B, -1, -1, -1)], dim=-1)
        with nullcontext() if self.fused_attn else sdpa_kernel(SDPBackend.MATH):
            y_BHTd = F.scaled_dot_product_attention(q_BHTd, k_BHSd, v_BHSd, attn_mask=bias_BH1S)
        return self.proj(rearrange(y_BHTd, "b h t d -> b t (h d)"))


def _rotate(x_BHTd: Tensor, rotation_BHTr: Tensor) -> Tensor:
    """Pairs of neighbours in the second half of each head are rotated; the first half would be for time."""
    still, turned = x_BHTd.chunk(2, dim=-1)
    return torch.cat([still, apply_rot_embed_cat(turned, rotation_BHTr)], dim=-1)
