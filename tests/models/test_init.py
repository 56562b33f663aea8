"""Every model can be built on the meta device, get empty memory and be initialised there."""

import pytest
import torch
from torch import nn

import vmoe
from vmoe.models.limoe import LIMOE_CONFIGS
from vmoe.models.spec import list_models
from vmoe.models.two_tower import TWO_TOWER_CONFIGS
from vmoe.moe import SparseMoE

VOCABULARY = {"vocab_size": 64, "eot_token_id": 63}


def small(name):
    """Settings that leave two narrow blocks of a model, one of them with two experts."""
    if name.startswith("swin_moe"):
        return {
            "img_size": 32,
            "window_size": 4,
            "embed_dim": 64,
            "depths": (1, 1),
            "num_heads": (4, 4),
            "moe_layers": [1],
        }
    blocks = {"depth": 2, "num_experts": 2, "num_selected_experts": 1, "moe_layers": [1], "num_heads": 4}
    image, text = {**blocks, "embed_dim": 64}, {**blocks, "width": 64, **VOCABULARY}
    if "soft" in name:
        del image["num_selected_experts"]
        text = {**VOCABULARY, "width": 64, "num_heads": 4, "depth": 2}
    if name in TWO_TOWER_CONFIGS:
        return {"image": image, "text": text, **({"embed_dim": 64} if "soft" in name else {})}
    return text if name in LIMOE_CONFIGS else image


def all_tensors(module):
    yield from module.named_parameters()
    yield from module.named_buffers()


def check(build):
    torch.manual_seed(0)
    direct = dict(all_tensors(build()))
    with torch.device("meta"):
        model = build()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for _, tensor in all_tensors(model):
            tensor.fill_(torch.nan if tensor.is_floating_point() else 99)
    model.init_weights()
    for module in model.modules():
        if getattr(module, "bias_update_rate", 0) > 0 and hasattr(module, "expert_load"):
            assert not module.expert_load.any()
    for name, tensor in all_tensors(model):
        expected = direct[name].float()
        tensor = tensor.float()
        assert tensor.isfinite().all(), name
        std, count = expected.std(correction=0), expected.numel()
        if std == 0:
            assert torch.equal(tensor, expected), name
            continue
        assert abs(tensor.mean() - expected.mean()) < 8 * std / count**0.5, name
        assert abs(tensor.std(correction=0) / std - 1) < 8 / count**0.5, name


@pytest.mark.parametrize("name", list_models())
def test_every_model_initialises_all_of_itself(name):
    check(lambda: vmoe.create_model(name, **small(name)))


VARIANTS = {
    "deepseek": ("vmoe_tiny_patch8_48", {"router_preset": "deepseek"}),
    "learned noise": ("vmoe_tiny_patch8_48", {"router_preset": "noisy_topk", "num_selected_experts": 2}),
    "expert choice": ("vmoe_tiny_patch8_48", {"router": "expert_choice"}),
    "map": (
        "vmoe_tiny_patch8_48",
        {"global_pool": "map", "qk_norm": True, "representation_size": 8, "init_values": 0.1},
    ),
    "no head": ("softmoe_tiny_patch8_48", {"num_classes": 0, "reg_tokens": 2}),
    "limoe map": ("limoe_tiny_patch8_48", {"pool": "map", "router_preset": "deepseek", **VOCABULARY}),
    "a tower of timm with batch norms, text map": (
        "two_tower_tiny_patch8_48",
        {
            "image": {"name": "resnet10t"},
            "text": {"pool": "map", "qk_norm": True, "depth": 2, **VOCABULARY},
            "init_logit_bias": -10.0,
        },
    ),
}


@pytest.mark.parametrize(("name", "kwargs"), VARIANTS.values(), ids=VARIANTS)
def test_so_do_variants(name, kwargs):
    check(lambda: vmoe.create_model(name, **{"depth": 2, **kwargs} if "text" not in kwargs else kwargs))


def test_norms_inside_experts_reset_themselves():
    layer = SparseMoE(8, 16, norm_layer=nn.LayerNorm)
    nn.init.constant_(layer.experts.norm.weight, torch.nan)
    nn.init.constant_(layer.experts.norm.bias, torch.nan)
    layer.experts.norm.reset_parameters()
    assert (layer.experts.norm.weight == 1).all()
    assert (layer.experts.norm.bias == 0).all()
