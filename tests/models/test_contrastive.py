"""LIMoE and the two towers: open_clip's interface, and learning."""

import math

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss
from timm.optim import create_optimizer_v2

import vmoe
from vmoe.models.limoe import LIMOE_CONFIGS, LIMoE
from vmoe.models.two_tower import TwoTower

TEXT = {"width": 32, "depth": 2, "num_heads": 2, "num_experts": 4, "vocab_size": 64, "eot_token_id": 63}
IMAGE = {"name": "vmoe_tiny_patch8_48", "embed_dim": 32, "depth": 2, "num_heads": 2, "num_experts": 4}
MODELS = {
    "limoe": lambda **kwargs: LIMoE(**{**LIMOE_CONFIGS["limoe_tiny_patch12_48"], **TEXT, **kwargs}),
    "two towers": lambda image=(), text=(), **kwargs: TwoTower(
        {**IMAGE, **dict(image)}, {**TEXT, "context_length": 16, **dict(text)}, 128, **kwargs
    ),
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


IN_IMAGE, IN_TEXT, DENSE = "visual.blocks.1.mlp", "text.blocks.1.mlp", {"num_experts": 0}


@pytest.mark.parametrize(
    ("name", "settings", "layers"),
    [
        ("limoe", {"global_entropy_min_experts": 2}, ["blocks.1.mlp"]),
        ("limoe", DENSE, []),
        ("two towers", {}, [IN_IMAGE, IN_TEXT]),
        ("two towers", {"image": DENSE}, [IN_TEXT]),
        ("two towers", {"image": {"router": "expert_choice"}, "text": DENSE}, [IN_IMAGE]),
        ("two towers", {"image": DENSE, "text": DENSE}, []),
        ("two towers", {"image": {"router": "soft"}, "text": {"router": "soft"}}, [IN_IMAGE, IN_TEXT]),
    ],
)
def test_all_parameters_learn_pairs(name, settings, layers):
    torch.manual_seed(0)
    model = MODELS[name](**settings)
    image, text = torch.randn(4, 3, 48, 48), torch.randint(1, 63, (4, 16))
    text[:, 9:] = 63
    optimizer = create_optimizer_v2(model, "adamw", lr=3e-3, weight_decay=0.01, layer_decay=0.9)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(18):  # with 12, some draws of the router's noise do not get there
        with vmoe.record_routing(model) as record:
            loss = ClipLoss()(*model(image, text)) + record.auxiliary_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert list(record.layers) == layers
    assert loss < 0.5 * math.log(4)
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
