"""What image-text models have in common: the learned scale and bias of the logits, and what `forward` returns.

Shapes, by suffix: B batch, C embedding width.
"""

import math

import torch
from torch import Tensor, nn

INIT_LOGIT_SCALE = math.log(1 / 0.07)  # CLIP's (arXiv 2103.00020)


class ImageTextModel(nn.Module):
    """open_clip's interface around `encode_image` and `encode_text`, which a subclass has.

    Args:
        init_logit_scale: initial log of the logit scale.
        init_logit_bias: initial logit bias, for the sigmoid loss; None: the model has none.
        output_dict: `forward` returns a dictionary, as in open_clip.
    """

    def __init__(self, init_logit_scale: float, init_logit_bias: float | None, output_dict: bool) -> None:
        super().__init__()
        self.output_dict = output_dict
        self.init_logit_scale, self.init_logit_bias = float(init_logit_scale), init_logit_bias
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.logit_bias = None if init_logit_bias is None else nn.Parameter(torch.empty(()))
        self.reset_logits()

    def reset_logits(self) -> None:
        """The scale and bias that training starts with."""
        nn.init.constant_(self.logit_scale, self.init_logit_scale)
        if self.logit_bias is not None:
            nn.init.constant_(self.logit_bias, float(self.init_logit_bias))

    def get_logits(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C)-normalised similarities, scaled: logits per image (B, B) and per text, its transpose."""
        logits = self.logit_scale.exp() * self.encode_image(image, True) @ self.encode_text(text, True).T
        if self.logit_bias is not None:
            logits = logits + self.logit_bias
        return logits, logits.T

    def outputs(self, image_features: Tensor | None, text_features: Tensor | None) -> tuple | dict[str, Tensor]:
        """What open_clip's losses take, from normalised features."""
        outputs = {
            "image_features": image_features,
            "text_features": text_features,
            "logit_scale": self.logit_scale.exp(),
        }
        if self.logit_bias is not None:
            outputs["logit_bias"] = self.logit_bias
        return outputs if self.output_dict else tuple(outputs.values())
