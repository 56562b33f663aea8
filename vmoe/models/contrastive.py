"""open_clip's interface of image-text models. Shapes, by suffix: B batch, C embedding width."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INIT_LOGIT_SCALE = math.log(1 / 0.07)  # CLIP's (arXiv 2103.00020)


class ImageTextModel(nn.Module):
    """open_clip's interface around the `features` of a subclass. `init_logit_scale` is the log of the initial scale,
    `init_logit_bias` the initial bias for the sigmoid loss or None."""

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

    def features(self, image: Tensor | None, text: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Images (B, 3, H, W) and token ids (B, L) -> (B, C) each; None for what is not given."""
        raise NotImplementedError

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """(B, 3, H, W) -> (B, C)."""
        features_BC, _ = self.features(image, None)
        return F.normalize(features_BC, dim=-1) if normalize else features_BC

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """(B, L) token ids -> (B, C)."""
        _, features_BC = self.features(None, text)
        return F.normalize(features_BC, dim=-1) if normalize else features_BC

    def get_logits(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C)-normalised similarities, scaled: logits per image (B, B) and per text, its transpose."""
        logits = self.logit_scale.exp() * self.encode_image(image, True) @ self.encode_text(text, True).T
        if self.logit_bias is not None:
            logits = logits + self.logit_bias
        return logits, logits.T

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> tuple | dict[str, Tensor]:
        """Images (B, 3, H, W), texts (B, L), or both -> (image_features, text_features, logit_scale[, logit_bias]), or
        with `output_dict` a dictionary of these names; features are normalised, (B, C) or None."""
        image_BC, text_BC = (each if each is None else F.normalize(each, dim=-1) for each in self.features(image, text))
        outputs = {"image_features": image_BC, "text_features": text_BC, "logit_scale": self.logit_scale.exp()}
        if self.logit_bias is not None:
            outputs["logit_bias"] = self.logit_bias
        return outputs if self.output_dict else tuple(outputs.values())
