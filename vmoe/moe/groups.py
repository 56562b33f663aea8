"""How the tokens of a call lie in groups that are routed together, and which of them are real.

An ensemble (E3, arXiv 2110.03360) has `ensemble_size` members, each with experts of its own. The batch holds as many
copies of each image, one for each member, and a group holds tokens of one member.

Shapes, by suffix: G groups, N tokens in a group, I images in a group, T tokens of an image, M modalities, D width,
C members of an ensemble, S tokens of a member.
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


def _pad(tensor_CS: Tensor, missing: int) -> Tensor:
    """Zeros behind the tokens. Not by `F.pad`, which fixes the size of an exported batch."""
    if isinstance(missing, int) and missing == 0:
        return tensor_CS
    return torch.cat([tensor_CS, tensor_CS.new_zeros(len(tensor_CS), missing, *tensor_CS.shape[2:])], dim=1)


def _first(y: Tensor, S: int, dim: int) -> Tensor:
    """The first S along a dimension; of an exported batch S is a symbol, which a slice would fix."""
    return y.narrow(dim, 0, S) if isinstance(S, int) else y.index_select(dim, torch.arange(S, device=y.device))


@dataclass(frozen=True)
class TokenGroups:
    """The groups of one call of a sparse layer.

    Attributes:
        mask_GN: True where the token is real; None: all are.
        modality_GN: index of each token's modality in `modalities`; None: all are of the first.
        leading: shape of the layer's input without its last axis; its tokens lie row by row in (G, N), padding last.
        ensemble_size: C. The copies of an image lie next to each other in the input, and the groups of the first member
            come first.
    """

    mask_GN: Tensor | None
    modality_GN: Tensor | None
    modalities: tuple[str, ...]
    leading: torch.Size
    ensemble_size: int = 1

    @classmethod
    def cut(
        cls,
        x: Tensor,
        mask: Tensor | None,
        modality: Tensor | None,
        size: int | None,
        modalities: tuple[str, ...],
        ensemble_size: int = 1,
    ) -> tuple[Tensor, "TokenGroups"]:
        """Cuts (..., D) tokens into groups of at most `size` of a member (None: one group): (G, N, D), zero where there
        is padding, and their groups.

        ValueError: mask (bool) or modality (integers) have another shape than the tokens, or another type, or the batch
        is no multiple of `ensemble_size`.
        """
        leading = x.shape[:-1]
        for name, tensor, is_bool in (("mask", mask, True), ("modality", modality, False)):
            if tensor is not None and tensor.shape != leading:
                raise ValueError(f"the {name} must have the tokens' shape {tuple(leading)}, got {tuple(tensor.shape)}")
            if tensor is not None and (tensor.dtype == torch.bool) != is_bool:
                raise ValueError(f"the {name} must be a tensor of {'bool' if is_bool else 'int'}, got {tensor.dtype}")
        C = ensemble_size
        if C > 1 and (not leading or leading[0] % C):
            raise ValueError(f"the batch must hold ensemble_size={C} copies of each image, got {tuple(leading)}")
        S = math.prod(leading) // C
        G, N, missing = _sizes(S, S if size is None else size)

        def grouped(tensor: Tensor) -> Tensor:
            width = tensor.shape[len(leading) :]
            if C > 1:
                tensor = tensor.unflatten(0, (-1, C)).transpose(0, 1)
            return _pad(tensor.reshape(C, S, *width), missing).view(C * G, N, *width)

        if not isinstance(missing, int) or missing:
            mask = torch.ones(leading, dtype=torch.bool, device=x.device) if mask is None else mask
        mask_GN, modality_GN = (None if tensor is None else grouped(tensor) for tensor in (mask, modality))
        groups = cls(mask_GN, modality_GN, modalities, leading, C)
        # Padding may hold anything, NaN too; as zeros it reaches neither the gate's gradient nor the output.
        return groups.real(grouped(x)), groups

    @property
    def mask_by_modality(self) -> dict[str, Tensor | None]:
        """{modality: (G, N) its real tokens}; None for all tokens."""
        if self.modality_GN is None:
            return {self.modalities[0]: self.mask_GN}
        own = {name: self.modality_GN == index for index, name in enumerate(self.modalities)}
        return own if self.mask_GN is None else {name: own_GN & self.mask_GN for name, own_GN in own.items()}

    @property
    def mask_GMN(self) -> Tensor | None:
        """Bool, the real tokens of each modality; None: all tokens, and of one modality."""
        own = list(self.mask_by_modality.values())
        return None if own[0] is None else torch.stack(own, dim=1)

    # --- images, for routers that route them whole ---

    @property
    def tokens_per_image(self) -> int:
        """T, the tokens of an image (of any sequence), padding too: of all axes of the input but the first."""
        return max(1, math.prod(self.leading[1:] if len(self.leading) > 1 else self.leading))

    @property
    def image_mask_GI(self) -> Tensor | None:
        """True where the image has a real token; None: all have."""
        return None if self.mask_GN is None else self._by_image(self.mask_GN).any(2)

    def image_means(self, x_GND: Tensor) -> Tensor:
        """(G, N, D), zero where there is padding -> (G, I, D), the means of each image's real tokens, in at least
        float32; zero for an image without one. ValueError: a group ends inside an image."""
        sum_GID = self._by_image(x_GND).sum(2, dtype=torch.promote_types(x_GND.dtype, torch.float32))
        if self.mask_GN is None:
            return sum_GID / self.tokens_per_image
        return sum_GID / self._by_image(self.mask_GN).sum(2).clamp(min=1)[..., None]

    def to_tokens(self, x_GIE: Tensor) -> Tensor:
        """(G, I, E) -> (G, N, E): each token has what its image has."""
        return x_GIE[:, :, None].expand(-1, -1, self.tokens_per_image, -1).flatten(1, 2)

    def _by_image(self, x_GN: Tensor) -> Tensor:
        """(G, N, ...) -> (G, I, T, ...)"""
        (G, N, *width), T = x_GN.shape, self.tokens_per_image
        if G and N % T:
            C = self.ensemble_size
            times = f" times ensemble_size={C}" if C > 1 else ""
            raise ValueError(
                f"per_image=True needs group_size to be a multiple of the {T} tokens of an image{times}, got {N * C}"
            )
        return x_GN.reshape(G, N // T, T, *width)

    def real(self, y_GND: Tensor) -> Tensor:
        """(G, N, D) with padding set to zero."""
        return y_GND if self.mask_GN is None else torch.where(self.mask_GN[..., None], y_GND, 0)

    def ungroup(self, y_GND: Tensor) -> Tensor:
        """(G, N, ...) -> (..., ...), the leading shape of the layer's input."""
        C, width, S = self.ensemble_size, y_GND.shape[2:], math.prod(self.leading) // self.ensemble_size
        if C == 1:
            return _first(y_GND.flatten(0, 1), S, 0).view(*self.leading, *width)
        y_CSD = _first(y_GND.unflatten(0, (C, -1)).flatten(1, 2), S, 1)
        images, *length = self.leading[0] // C, *self.leading[1:]
        return y_CSD.reshape(C, images, *length, *width).transpose(0, 1).flatten(0, 1)
