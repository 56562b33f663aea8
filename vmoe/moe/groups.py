"""Tokens as the routers see them: flattened and cut into groups that are routed together.

Shapes, by suffix: G groups, N tokens in a group, M modalities, D width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class TokenGroups:
    """The tokens of one call of a sparse layer, zero where there is padding.

    Attributes:
        mask_GN: True where the token is real; None: all are.
        modality_GN: index of each token's modality; None: all are of the first.
        leading: the shape of the layer's input without its last axis. Its tokens lie row by row in (G, N).
    """

    x_GND: Tensor
    mask_GN: Tensor | None
    modality_GN: Tensor | None
    num_modalities: int
    leading: torch.Size

    @classmethod
    def of(
        cls, x: Tensor, mask: Tensor | None, modality: Tensor | None, group_size: int, num_modalities: int
    ) -> "TokenGroups":
        """Flattens (..., D) tokens and cuts them into groups of `group_size`, or fewer; the last group is padded.

        ValueError: mask (bool) or modality (integers) have another shape than the tokens, or another type.
        """
        leading = x.shape[:-1]
        for name, tensor, is_bool in (("mask", mask, True), ("modality", modality, False)):
            if tensor is not None and tensor.shape != leading:
                raise ValueError(f"the {name} must have the tokens' shape {tuple(leading)}, got {tuple(tensor.shape)}")
            if tensor is not None and (tensor.dtype == torch.bool) != is_bool:
                raise ValueError(f"the {name} must be a tensor of {'bool' if is_bool else 'int'}, got {tensor.dtype}")
        S, D = leading.numel(), x.shape[-1]
        N = max(1, min(group_size, S))  # an empty batch is no group
        G, missing = -(-S // N), -S % N
        x_SD = x.reshape(S, D)
        if missing:
            x_SD = F.pad(x_SD, (0, 0, 0, missing))
            mask = torch.ones(S, dtype=torch.bool, device=x.device) if mask is None else mask
        mask_GN, modality_GN = (
            None if tensor is None else F.pad(tensor.reshape(S), (0, missing)).view(G, N) for tensor in (mask, modality)
        )
        x_GND = x_SD.view(G, N, D)
        if mask_GN is not None:
            # Padding may hold anything, NaN too; as zeros it reaches neither the gate's gradient nor the output.
            x_GND = torch.where(mask_GN[..., None], x_GND, 0)
        return cls(x_GND, mask_GN, modality_GN, num_modalities, leading)

    @property
    def members_GMN(self) -> Tensor | None:
        """Bool, the real tokens of each modality; None: all tokens, and of one modality."""
        if self.modality_GN is None:
            return None if self.mask_GN is None else self.mask_GN[:, None]
        index_M1 = torch.arange(self.num_modalities, device=self.modality_GN.device)[:, None]
        members_GMN = self.modality_GN[:, None] == index_M1
        return members_GMN if self.mask_GN is None else members_GMN & self.mask_GN[:, None]

    def real(self, y_GND: Tensor) -> Tensor:
        """(G, N, ...) with padding set to zero."""
        return y_GND if self.mask_GN is None else torch.where(self.mask_GN[..., None], y_GND, torch.zeros_like(y_GND))

    def ungroup(self, y_GND: Tensor) -> Tensor:
        """(G, N, O) -> (..., O), the shape of the layer's input."""
        return y_GND.flatten(0, 1)[: self.leading.numel()].view(*self.leading, y_GND.shape[-1])
