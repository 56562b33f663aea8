"""open_clip's own functions make, load and describe our image-text models after `vmoe.open_clip.register()`."""

import open_clip
import pytest
import torch

import vmoe.open_clip
from vmoe.models.factory import preprocess_config, save_pretrained
from vmoe.models.serialization import WeightsError
from vmoe.models.spec import IMAGE_TEXT_NAMES
from vmoe.moe import SparseMoE

NAMES = ["limoe_tiny_patch12_48", "two_tower_tiny_patch12_48"]


@pytest.fixture(autouse=True, scope="module")
def _registered():
    vmoe.open_clip.register()
    vmoe.open_clip.register()  # twice is once


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


def test_names_are_in_open_clips_registry_and_its_own_stay():
    assert set(IMAGE_TEXT_NAMES) <= set(open_clip.list_models())
    config = open_clip.get_model_config("ViT-B-32")
    sizes = {"layers": 1, "width": 64, "head_width": 32, "image_size": 32, "patch_size": 16}
    text = {**config["text_cfg"], "layers": 1, "width": 32, "heads": 1}
    for custom, kind in ((False, open_clip.CLIP), (True, open_clip.CustomTextCLIP)):
        model = open_clip.create_model("ViT-B-32", force_custom_text=custom, vision_cfg=sizes, text_cfg=text)
        assert type(model) is kind


def test_model_transforms_and_tokenizer_are_ours(name):
    torch.manual_seed(0)
    model, _, transform = open_clip.create_model_and_transforms(name, output_dict=True)
    torch.manual_seed(0)
    ours, _, val = vmoe.create_model_and_transforms(name)
    tokenizer, own = open_clip.get_tokenizer(name), vmoe.get_tokenizer(name)
    texts = ["a red apple", "a very long text " * 9]
    assert torch.equal(tokenizer(texts), own(texts))
    from PIL import Image

    image = Image.effect_mandelbrot((90, 60), (-2, -1, 1, 1), 50).convert("RGB")
    torch.testing.assert_close(transform(image), val(image))
    images = torch.stack([val(image)] * 2)
    output = model.eval()(images, tokenizer(texts))
    expected = ours(images, own(texts))
    assert list(output) == ["image_features", "text_features", "logit_scale"]
    for value, other in zip(output.values(), expected, strict=True):
        assert torch.equal(value, other)
    assert output["logit_scale"] == model.logit_scale.exp()


def test_losses_of_the_layers_are_attached_since_the_trainer_adds_none(name):
    model = open_clip.create_model(name, output_dict=True).train()
    layers = [layer for layer in model.modules() if isinstance(layer, SparseMoE)]
    assert layers
    assert all(layer.auxiliary_loss == "attach" for layer in layers)
    model.set_grad_checkpointing()
    output = model(torch.randn(2, 3, 48, 48), open_clip.get_tokenizer(name)(["a", "b"]))
    (output["image_features"].sum() * 0 + output["text_features"].sum() * 0).backward()  # only the losses are left
    assert all(layer.router.weight.grad.abs().sum() > 0 for layer in layers)


@torch.no_grad()
def test_settings_of_open_clip_reach_the_model_and_its_file(name, tmp_path):
    changes = {"force_image_size": 96, "force_context_length": 8, "init_logit_bias": -10, "image_mean": (0.1, 0.2, 0.3)}
    model, _, _ = open_clip.create_model_and_transforms(name, image_resize_mode="squash", **changes)
    assert (tuple(model.visual.image_size), model.context_length, model.logit_bias.item()) == ((96, 96), 8, -10)
    save_pretrained(model, tmp_path / "m.safetensors")
    again = vmoe.create_model(pretrained=tmp_path / "m.safetensors").eval()
    config = preprocess_config(again)
    assert config["input_size"] == (3, 96, 96)
    assert config["mean"] == (0.1, 0.2, 0.3)
    assert config["crop_mode"] == "squash"
    images = torch.randn(2, 3, 96, 96)
    assert torch.equal(again.encode_image(images), model.eval().encode_image(images))


@torch.no_grad()
def test_a_file_brings_its_settings_and_preprocessing(name, tmp_path):
    small = {"num_experts": 2, "depth": 2}
    kwargs = small if name.startswith("limoe") else {"image": small, "text": small}
    model = vmoe.create_model(name, **kwargs).eval()
    visual = model.visual
    visual.preprocess_cfg = {"mean": (0.2, 0.3, 0.4), "std": (0.5, 0.5, 0.5), "interpolation": "bilinear"}
    save_pretrained(model, tmp_path / "m.safetensors")
    again = open_clip.create_model(name, pretrained=str(tmp_path / "m.safetensors")).eval()
    assert tuple(again.visual.preprocess_cfg["mean"]) == (0.2, 0.3, 0.4)
    assert again.visual.preprocess_cfg["interpolation"] == "bilinear"
    images, texts = torch.randn(2, 3, 48, 48), open_clip.get_tokenizer(name)(["a", "b"])
    assert torch.equal(again.encode_image(images), model.encode_image(images))
    assert torch.equal(again.encode_text(texts), model.encode_text(texts))
    other = next(each for each in NAMES if each != name)
    with pytest.raises(WeightsError, match=f"m.safetensors holds {name}, not {other}"):
        open_clip.create_model(other, pretrained=str(tmp_path / "m.safetensors"))


@pytest.mark.parametrize("settings", [{"num_experts": 4}, {"depth": 3}, {"force_context_length": 20}])
def test_settings_that_do_not_fit_a_file_are_one_sentence(settings, tmp_path):
    file = tmp_path / "m.safetensors"
    save_pretrained(vmoe.create_model(NAMES[0], num_experts=2, depth=2), file)
    with pytest.raises(
        WeightsError, match=r"m.safetensors does not fit limoe_tiny.* settings given \(.*\): leave out"
    ) as e:
        open_clip.create_model(NAMES[0], pretrained=str(file), **settings)
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 500


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"force_quick_gelu": True}, "limoe_tiny_patch12_48 does not take open_clip's quick_gelu"),
        ({"force_patch_dropout": 0.5}, "has no patch dropout"),
        ({"num_expert": 3}, "has no setting 'num_expert'; did you mean 'num_experts'"),
        ({"vmoe": {"name": "hf-hub:a/b", "kwargs": {}}}, "are refused: name is no name of a model"),
        ({"vmoe": ["limoe_tiny_patch12_48"]}, "are refused"),
    ],
)
def test_what_our_models_do_not_have_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        open_clip.create_model("limoe_tiny_patch12_48", **settings)


def test_locking():
    with pytest.raises(ValueError, match="a LIMoE has one tower"):
        open_clip.create_model("limoe_tiny_patch12_48", num_experts=2, depth=2).lock_image_tower(unlocked_groups=1)
    model = open_clip.create_model("two_tower_tiny_patch12_48")
    model.lock_image_tower(unlocked_groups=0, freeze_bn_stats=True)
    assert not any(parameter.requires_grad for parameter in model.visual.parameters())
