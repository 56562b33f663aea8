"""Files of models that others built: timm, open_clip, upcycle, prune, densify, quantize and PEFT."""

import json

import open_clip
import pytest
import timm
import torch

import vmoe
from tests.models.test_hub import CLIP
from vmoe.models.preprocess import preprocess_config
from vmoe.models.serialization import read_pretrained_metadata

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 16, "patch_size": 8, "num_classes": 5}
VARIANTS = {
    "tiny-clip": {},
    "tiny-clip-quickgelu": {"quick_gelu": True},
    "tiny-clip-text": {"custom_text": True, "vision_cfg": {**CLIP["vision_cfg"], "ls_init_value": 0.1}},
    "tiny-clip-timm": {
        "custom_text": True,
        "vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "avg", "image_size": 224},
    },
}


def vmoe_of_timm(**kwargs):
    return timm.create_model("vmoe_tiny_patch8_48", **{**SMALL, **kwargs})


def vit_of_timm(**kwargs):
    return timm.create_model("vit_tiny_patch16_224.augreg_in21k", **{**SMALL, **kwargs})


def upcycled(**kwargs):
    return vmoe.upcycle(vit_of_timm(), num_experts=4, layers=[1], **kwargs)


def changed():
    model = vmoe_of_timm()
    model.reset_classifier(3)
    model.set_input_size(24)
    return model


def resized(model, size):
    model.set_input_size(size)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, size, size)}
    return model


def upcycled_eva():
    model = vmoe.upcycle(timm.create_model("eva02_tiny_patch14_224", **{**SMALL, "img_size": 28}), 4, [1])
    model.reset_classifier(3, "token")  # keeps the norm that timm puts behind the mean
    return model


def pruned(model):
    return vmoe.prune_experts(model, 2, vmoe.measure_usage(model, [torch.randn(2, 3, 16, 16)]))


MADE = {
    "timm": vmoe_of_timm,
    "timm, soft": lambda: vmoe_of_timm(router="soft"),
    "timm, preset": lambda: vmoe_of_timm(router_preset="switch", num_experts=4),
    "timm, changed": changed,
    "Swin-MoE, resized": lambda: resized(vmoe.create_model("swin_moe_tiny_patch4_window4_32"), 64),
    "Swin, upcycled, resized": lambda: resized(
        vmoe.upcycle(
            timm.create_model("swin_tiny_patch4_window7_224", img_size=56, embed_dim=32, depths=(1, 1, 2, 1)), 4, [1]
        ),
        112,
    ),
    "EVA, upcycled, changed": upcycled_eva,
    "upcycled": upcycled,
    "upcycled, other mean": lambda: vmoe.upcycle(
        vit_of_timm(pretrained_cfg_overlay={"mean": (0.1, 0.2, 0.3), "crop_pct": 0.5}), num_experts=2, layers=[1]
    ),
    "pruned": lambda: pruned(vmoe_of_timm()),
    "upcycled, pruned": lambda: pruned(upcycled()),
    "densified": lambda: vmoe.densify(vmoe_of_timm()),
    "upcycled, densified": lambda: vmoe.densify(upcycled()),
    "quantized": lambda: vmoe.quantize_experts(vmoe_of_timm(), "int8"),
}


@torch.no_grad()
def assert_comes_back(model, file, extra=None):
    for parameter in model.parameters():
        if parameter.numel() > 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    vmoe.save_pretrained(model, file, extra)
    again = vmoe.create_model(pretrained=file).eval()
    assert preprocess_config(again) == preprocess_config(model)
    images = torch.randn(2, *preprocess_config(model)["input_size"])
    model.eval()
    if hasattr(model, "encode_text"):
        texts = torch.randint(1, 500, (2, model.context_length))
        assert torch.equal(again.encode_text(texts), model.encode_text(texts))
        model, again = model.encode_image, again.encode_image
    assert torch.equal(again(images), model(images))


@pytest.mark.parametrize("made", MADE)
def test_models_that_others_built_come_back(made, tmp_path):
    torch.manual_seed(0)
    assert_comes_back(MADE[made](), tmp_path / "m.safetensors")


@pytest.fixture(scope="module", autouse=True)
def _tiny_clips(tmp_path_factory):
    for name, changes in VARIANTS.items():
        file = tmp_path_factory.mktemp("configs") / f"{name}.json"
        file.write_text(json.dumps({**CLIP, **changes}))
        open_clip.add_model_config(file)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("steps", [[], [{}], [{"tower": "image", "router": "soft"}, {"tower": "text"}]])
def test_open_clips_models_come_back(name, steps, tmp_path):
    torch.manual_seed(0)
    preprocess = {"mean": (0.1, 0.2, 0.3), "interpolation": "bilinear", "resize_mode": "squash"}
    changes = {"force_image_size": 48, "force_context_length": 8, "force_preprocess_cfg": preprocess}
    model = open_clip.create_model(name, **(changes if steps else {}))
    for step in steps:
        model = vmoe.upcycle(model, num_experts=4, layers=[1], **step)
    assert_comes_back(model, tmp_path / "m.safetensors")
    assert read_pretrained_metadata(tmp_path / "m.safetensors")["name"] == name


def test_the_tokenizer_of_open_clips_models(monkeypatch):
    model = vmoe.create_model("tiny-clip")
    tokenizer = vmoe.get_tokenizer(model)
    assert torch.equal(tokenizer(["a cat"]), open_clip.get_tokenizer("tiny-clip")(["a cat"]))
    monkeypatch.setattr("open_clip.factory.HFTokenizer", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ValueError, match=r"the tokenizer of ViT-B-16-SigLIP cannot be downloaded \(division by zero\)"):
        vmoe.get_tokenizer("ViT-B-16-SigLIP")


def test_the_routing_of_both_towers_can_be_set_when_a_file_is_loaded(tmp_path):
    model = vmoe.upcycle(open_clip.create_model("tiny-clip"), num_experts=4, layers=[1])
    vmoe.save_pretrained(model, tmp_path / "m.safetensors")
    again = vmoe.create_model(pretrained=tmp_path / "m.safetensors", num_selected_experts=1, capacity_factor=1.0)
    layers = [module for module in again.modules() if isinstance(module, vmoe.SparseMoE)]
    assert [(layer.num_selected_experts, layer.capacity_factor) for layer in layers] == [(1, 1.0)] * 2


def test_an_open_clip_model_under_no_name_is_refused_with_the_remedy(tmp_path):
    model = vmoe.upcycle(open_clip.CLIP(48, CLIP["vision_cfg"], CLIP["text_cfg"]), num_experts=2, layers=[1])
    with pytest.raises(ValueError, match="made by .* timm or open_clip under a name of theirs"):
        vmoe.save_pretrained(model, tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [vmoe_of_timm, upcycled])
def test_adapters_of_peft_are_merged_first(make, tmp_path):
    peft = pytest.importorskip("peft", reason="needs PEFT (pip install -e '.[test]')")
    config = peft.LoraConfig(
        r=2,
        init_lora_weights=False,
        target_modules=["qkv"],
        target_parameters=["mlp.experts.fc1.weight", "mlp.router.weight"],
        modules_to_save=["head"],
    )
    model = peft.get_peft_model(make(), config)
    with pytest.raises(ValueError, match=r"holds adapters: save what its merge_and_unload\(\) returns"):
        vmoe.save_pretrained(model, tmp_path / "m.safetensors")
    assert_comes_back(model.merge_and_unload(), tmp_path / "m.safetensors")
