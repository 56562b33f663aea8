"""How the patches and words of a batch lie in memory while they go through a tower.

On a GPU and in compiled code each picture and its caption are a row of P + L tokens, and short captions are filled up:
shapes must not depend on the data. On a CPU nearly nothing is computed for what only fills up: all patches, then all
real words, one after the other; captions are mostly short, so this is a third less work. Attention sees rows in both
forms, and the sparse layers route as if they did.

Shapes, by suffix: B batch, P patches, L words (text length), T = P + L, S tokens, W words that are kept, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vmoe.moe import SparseMoE
from vmoe.moe.dispatch import gather_rows

# The number of packed tokens is a multiple of this, as far as there is padding to keep. For each number of rows that it
# has not seen, oneDNN makes new products in half precision, and the allocator looks for memory of another size.
NUM_TOKENS_MULTIPLE_OF = 64


@dataclass(frozen=True)
class RowTokens:
    """Tokens as rows, (B, T, D): the patches of a picture, then the words of its caption.

    Attributes:
        num_patches: P; 0 without pictures.
        mask_BT: True for patches and real words.
        modality_BT: 0 for patches, 1 for words.
        bias_B11L: hides from attention what fills up the captions; None without words.
    """

    num_patches: int
    mask_BT: Tensor
    modality_BT: Tensor
    bias_B11L: Tensor | None

    def sequences(self, x_BTD: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """What attends to itself: [((B, P, D) patches, None), ((B, L, D) words, bias)], as far as they are there."""
        P = self.num_patches
        parts = [(x_BTD[:, :P], None)] if P else []
        return parts if self.bias_B11L is None else [*parts, (x_BTD[:, P:], self.bias_B11L)]

    def join(self, parts: list[Tensor]) -> Tensor:
        """`sequences` undone."""
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def through_experts(self, layer: SparseMoE, x_BTD: Tensor) -> Tensor:
        """Tokens through a sparse layer: (B, T, D) -> (B, T, D)."""
        return layer(x_BTD, self.mask_BT, self.modality_BT)


@dataclass(frozen=True)
class PackedTokens:
    """The patches of all pictures, the real words of all captions, and a little padding: (S, D) with S = B·P + W.

    Attributes:
        rows: the same tokens as rows.
        place_W: flat index into (B, L) of each word that is kept.
        word_BL: flat, the kept word at each place; -1 where there is none.
        place_S: flat index into (B, T) of each token.
        token_BT: flat, the token at each place; -1 where there is none.
    """

    rows: RowTokens
    place_W: Tensor
    word_BL: Tensor
    place_S: Tensor
    token_BT: Tensor

    @classmethod
    def of(cls, rows: RowTokens) -> "PackedTokens":
        """Where the tokens of `rows` go."""
        P = rows.num_patches
        place_BT = torch.arange(rows.mask_BT.numel(), device=rows.mask_BT.device).view(rows.mask_BT.shape)
        place_BP, place_BL = place_BT[:, :P].flatten(), place_BT[:, P:].flatten()
        mask_BL = rows.mask_BT[:, P:].flatten()
        place_W, padding = mask_BL.nonzero()[:, 0], mask_BL.logical_not().nonzero()[:, 0]
        place_W = torch.cat([place_W, padding[: -(len(place_BP) + len(place_W)) % NUM_TOKENS_MULTIPLE_OF]])
        place_S = torch.cat([place_BP, place_BL[place_W]])
        return cls(rows, place_W, _inverse(place_W, mask_BL.numel()), place_S, _inverse(place_S, place_BT.numel()))

    def pack(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (S, D)."""
        return gather_rows(x_BTD.flatten(0, 1), self.place_S, self.token_BT[:, None], False, True)

    def unpack(self, x_SD: Tensor) -> Tensor:
        """(S, D) -> (B, T, D), zero where there is no token."""
        x_BTD = gather_rows(x_SD, self.token_BT, self.place_S[:, None], True, False)
        return x_BTD.view(*self.rows.mask_BT.shape, x_SD.shape[1])

    def sequences(self, x_SD: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """As of `RowTokens`."""
        (B, T), P, D = self.rows.mask_BT.shape, self.rows.num_patches, x_SD.shape[1]
        patches, words = x_SD.split([B * P, x_SD.shape[0] - B * P])
        x_BLD = gather_rows(words, self.word_BL, self.place_W[:, None], True, False).view(B, T - P, D)
        parts = [(patches.view(B, P, D), None)] if P else []
        return [*parts, (x_BLD, self.rows.bias_B11L)]

    def join(self, parts: list[Tensor]) -> Tensor:
        """`sequences` undone."""
        x_WD = gather_rows(parts[-1].flatten(0, 1), self.place_W, self.word_BL[:, None], False, True)
        return torch.cat([*(part.flatten(0, 1) for part in parts[:-1]), x_WD])

    def through_experts(self, layer: SparseMoE, x_SD: Tensor) -> Tensor:
        """Tokens through a sparse layer: (S, D) -> (S, D). One that cannot take them so sees them as rows."""
        if layer.takes_packed():
            return layer(x_SD, self.rows.mask_BT, self.rows.modality_BT, self.place_S)
        return self.pack(self.rows.through_experts(layer, self.unpack(x_SD)))


def _inverse(place_S: Tensor, number: int) -> Tensor:
    """(number,) the index of each place in `place_S`; -1 for those that are not in it."""
    inverse = place_S.new_full((number,), -1)
    return inverse.index_copy_(0, place_S, torch.arange(len(place_S), device=place_S.device))
