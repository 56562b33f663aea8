"""The part of a model that a file holds, as a module with named inputs and outputs.

Shapes, by suffix: B batch, L text length.
"""

from __future__ import annotations

import copy

import torch
from timm.layers import to_2tuple
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vmoe.models.factory import is_contrastive, preprocess_config

PARTS = ("image", "text", "both")


class Part(nn.Module):
    """Images (B, 3, H, W), token ids (B, L), or both -> a tuple of outputs, named by `outputs`.

    An image model gives what it gives. The towers of an image-text model give what `encode_image` and `encode_text`
    give with `normalize=True`, and both together also the scale and bias of the logits; the number of images need not
    be that of texts.
    """

    def __init__(self, model: nn.Module, part: str) -> None:
        super().__init__()
        self.model, self.contrastive = model, is_contrastive(model)
        self.inputs = ("image", "text") if part == "both" else (part,)
        self.outputs = tuple(f"{name}_features" for name in self.inputs)
        if not self.contrastive:
            self.outputs = ("logits",) if getattr(model, "num_classes", 0) else ("features",)
        self.has_bias = part == "both" and model.logit_bias is not None
        if part == "both":
            self.outputs += ("logit_scale",) + ("logit_bias",) * self.has_bias
        self.preprocess = preprocess_config(model)
        if (size := getattr(getattr(model, "visual", None), "image_size", None)) is not None:  # of open_clip's too
            self.preprocess["input_size"] = (*self.preprocess["input_size"][:1], *to_2tuple(size))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if not self.contrastive:
            return (self.model(*inputs),)
        given = dict(zip(self.inputs, inputs, strict=True))
        outputs = [getattr(self.model, f"encode_{name}")(x, normalize=True) for name, x in given.items()]
        if len(outputs) == 2:
            outputs.append(self.model.logit_scale.exp())
        return (*outputs, self.model.logit_bias + 0) if self.has_bias else tuple(outputs)

    def example(self, batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Random inputs: normal pixels, and texts of all lengths as the tokenizer gives them."""
        size = (batch, *self.preprocess["input_size"])
        return tuple(
            self._texts(batch, generator) if name == "text" else torch.randn(size, generator=generator)
            for name in self.inputs
        )

    def _texts(self, batch: int, generator: torch.Generator) -> Tensor:
        text, L = getattr(self.model, "text", self.model), self.model.context_length
        vocabulary = self.model.vocab_size
        end = getattr(text, "eot_token_id", vocabulary - 1)  # of open_clip's models: CLIP's
        text_BL = torch.randint(vocabulary, (batch, L), generator=generator)
        if end is None:
            return text_BL
        text_BL = torch.where(text_BL == end, (end + 1) % vocabulary, text_BL)
        length_B1 = torch.randint(1, L, (batch, 1), generator=generator)  # without the end of text
        position_L = torch.arange(L)
        return text_BL.masked_fill(position_L > length_B1, 0).masked_fill(position_L == length_B1, end)


def take_part(model: nn.Module, part: str | None) -> Part:
    """A copy of a model's part for export: on the CPU, in float32 and eval(), the model itself is not changed.
    ValueError: it has no such part, or is sharded over processes."""
    model = unwrap_model(model)
    if any(isinstance(tensor, DTensor) for tensor in model.parameters()):
        raise ValueError("a model that is sharded over processes cannot be exported: export a checkpoint of its run")
    contrastive = is_contrastive(model)
    part = part or ("both" if contrastive else "image")
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
    if not contrastive and part != "image":
        raise ValueError(f"{type(model).__name__} takes images alone, so it has no part {part!r}; leave it out")
    return Part(copy.deepcopy(model).cpu().float().eval().requires_grad_(False), part).eval()
