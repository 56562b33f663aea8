"""open_clip's interface, which LIMoE and the two towers share."""

import math

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss

from vmoe.models.limoe import LIMOE_CONFIGS, LIMoE
from vmoe.models.two_tower import TwoTower

TEXT = {"width": 32, "depth": 2, "num_heads": 2, "num_experts": 4, "vocab_size": 64, "eot_token_id": 63}
IMAGE = {"name": "vmoe_tiny_patch8_48", "embed_dim": 32, "depth": 2, "num_heads": 2, "num_experts": 4}
MODELS = {
    "limoe": lambda **kwargs: LIMoE(**{**LIMOE_CONFIGS["limoe_tiny_patch12_48"], **TEXT, **kwargs}),
    "two towers": lambda **kwargs: TwoTower(IMAGE, {**TEXT, "context_length": 16}, 128, **kwargs),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_open_clips_conventions(make):
    torch.manual_seed(0)
    image, text = torch.randn(4, 3, 48, 48), torch.randint(1, 63, (4, 16))
    text[:, 9] = 63
    model = make().eval()
    image_features, text_features, scale = model(image, text)
    assert image_features.shape == text_features.shape == (4, 128)
    torch.testing.assert_close(image_features.norm(dim=-1), torch.ones(4))
    torch.testing.assert_close(image_features, F.normalize(model.encode_image(image), dim=-1))
    torch.testing.assert_close(text_features, model.encode_text(text, normalize=True))
    torch.testing.assert_close(scale, model.logit_scale.exp())
    torch.testing.assert_close(model.logit_scale, torch.tensor(math.log(1 / 0.07)))
    assert model.logit_bias is None
    assert torch.isfinite(ClipLoss()(image_features, text_features, scale))

    model = make(init_logit_scale=math.log(10), init_logit_bias=-10.0, output_dict=True).eval()
    outputs = model(image, text)
    assert set(outputs) == {"image_features", "text_features", "logit_scale", "logit_bias"}
    assert torch.isfinite(SigLipLoss()(**outputs))
    assert model(image=image)["text_features"] is model(text=text)["image_features"] is None
    logits, transposed = model.get_logits(image, text)
    torch.testing.assert_close(logits, 10 * outputs["image_features"] @ outputs["text_features"].T - 10)
    assert torch.equal(logits.T, transposed)
    assert model.visual.image_size == (48, 48)
