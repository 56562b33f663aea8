"""How the tokens of a call lie in groups that are routed together, and which of them are real.

Shapes, by suffix: G groups, N tokens in a group, M modalities, D width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def _sizes(S: int, size: int) -> tuple[int, int, int]:
    """(groups, tokens in a group, tokens missing in the last) of S tokens in groups of at most `size`."""
    if isinstance(S, int):
        N = max(1, min(size, S))  # an empty batch is no group
        G = (S + N - 1) // N
        return G, N, G * N - S
    # An exported program: S is a symbol for any number, and so is `size` if all tokens are one group.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    if not isinstance(size, int):
        return 1, size, 0
    if statically_known_true(S % size == 0):
        return S // size, size, 0
    G = (S + size - 1) // size + 1  # the last one is all padding: a single group would be a case of its own
    return G, size, G * size - S


def _pad(tensor_S: Tensor, missing: int) -> Tensor:
    """Zeros behind the tokens. Not by `F.pad`, which fixes the size of an exported batch."""
    if isinstance(missing, int) and missing == 0:
        return tensor_S
    return torch.cat([tensor_S, tensor_S.new_zeros(missing, *tensor_S.shape[1:])])


@dataclass(frozen=True)
class TokenGroups:
    """The groups of one call of a sparse layer.

    Attributes:
        mask_GN: True where the token is real; None: all are.
        modality_GN: index of each token's modality in `modalities`; None: all are of the first.
        leading: shape of the layer's input without its last axis; its tokens lie row by row in (G, N), padding last.
    """

    mask_GN: Tensor | None
    modality_GN: Tensor | None
    modalities: tuple[str, ...]
    leading: torch.Size

    @classmethod
    def cut(
        cls, x: Tensor, mask: Tensor | None, modality: Tensor | None, size: int, modalities: tuple[str, ...]
    ) -> tuple[Tensor, "TokenGroups"]:
        """Cuts (..., D) tokens into groups of at most `size`: (G, N, D), zero where there is padding, and their groups.

        ValueError: mask (bool) or modality (integers) have another shape than the tokens, or another type.
        """
        leading = x.shape[:-1]
        for name, tensor, is_bool in (("mask", mask, True), ("modality", modality, False)):
            if tensor is not None and tensor.shape != leading:
                raise ValueError(f"the {name} must have the tokens' shape {tuple(leading)}, got {tuple(tensor.shape)}")
            if tensor is not None and (tensor.dtype == torch.bool) != is_bool:
                raise ValueError(f"the {name} must be a tensor of {'bool' if is_bool else 'int'}, got {tensor.dtype}")
        S, D = math.prod(leading), x.shape[-1]
        G, N, missing = _sizes(S, size)
        x_SD = _pad(x.reshape(S, D), missing)
        if not isinstance(missing, int) or missing:
            mask = torch.ones(S, dtype=torch.bool, device=x.device) if mask is None else mask
        mask_GN, modality_GN = (
            None if tensor is None else _pad(tensor.reshape(S), missing).view(G, N) for tensor in (mask, modality)
        )
        groups = cls(mask_GN, modality_GN, modalities, leading)
        # Padding may hold anything, NaN too; as zeros it reaches neither the gate's gradient nor the output.
        return groups.real(x_SD.view(G, N, D)), groups

    @property
    def members(self) -> dict[str, Tensor | None]:
        """{modality: (G, N) its real tokens}; None for all tokens."""
        if self.modality_GN is None:
            return {self.modalities[0]: self.mask_GN}
        own = {name: self.modality_GN == index for index, name in enumerate(self.modalities)}
        return own if self.mask_GN is None else {name: own_GN & self.mask_GN for name, own_GN in own.items()}

    @property
    def members_GMN(self) -> Tensor | None:
        """Bool, the real tokens of each modality; None: all tokens, and of one modality."""
        own = list(self.members.values())
        return None if own[0] is None else torch.stack(own, dim=1)

    def real(self, y_GND: Tensor) -> Tensor:
        """(G, N, D) with padding set to zero."""
        return y_GND if self.mask_GN is None else torch.where(self.mask_GN[..., None], y_GND, 0)

    def ungroup(self, y_GND: Tensor) -> Tensor:
        """(G, N, ...) -> (..., ...), the leading shape of the layer's input."""
        y_SD, S = y_GND.flatten(0, 1), math.prod(self.leading)
        # A slice would fix the size of an exported batch.
        y_SD = y_SD[:S] if isinstance(S, int) else y_SD.index_select(0, torch.arange(S, device=y_SD.device))
        return y_SD.view(*self.leading, *y_GND.shape[2:])
