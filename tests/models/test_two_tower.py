import re

import pytest
import timm
import torch
from open_clip.loss import ClipLoss
from timm.models import group_parameters
from timm.optim import create_optimizer_v2

import vmoe
from vmoe.models.factory import create_model, preprocess_config, save_pretrained
from vmoe.models.spec import model_spec
from vmoe.models.two_tower import TWO_TOWER_CONFIGS, TwoTower, merge_settings
from vmoe.moe import SparseMoE

IMAGE = {"name": "vmoe_tiny_patch8_48", "img_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_experts": 4}
TEXT = {"width": 32, "depth": 3, "num_heads": 2, "num_experts": 4, "context_length": 8}
TEXT |= {"vocab_size": 64, "eot_token_id": 63}


def tiny(image: dict | None = None, text: dict | None = None, **kwargs) -> TwoTower:
    torch.manual_seed(0)
    return TwoTower({**IMAGE, **(image or {})}, {**TEXT, **(text or {})}, **{"embed_dim": 24, **kwargs})


def pairs(B: int = 4):
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(1, 63, (B, 8), generator=generator)
    text[:, 5:] = 63
    return torch.randn(B, 3, 16, 16, generator=generator), text


def test_all_names_build():
    for name in TWO_TOWER_CONFIGS:
        with torch.device("meta"):
            model = create_model(name, image={"depth": 4}, text={"depth": 1, "num_experts": 0})
        assert any(isinstance(module, SparseMoE) for module in model.visual.modules()), name
    assert vmoe.get_tokenizer(name)("a cat").shape == (1, model.context_length) == (1, 16)


def test_any_timm_model_can_be_the_image_tower():
    model = TwoTower({"name": "resnet10t"}, TEXT, embed_dim=24)
    image, text = torch.randn(2, 3, 64, 64), pairs(2)[1]
    assert model(image, text)[0].shape == (2, 24)
    model.lock_image_tower()
    before = {name: buffer.clone() for name, buffer in model.visual.named_buffers()}
    model.train()(image, text)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.visual.named_buffers())


def test_locked_towers_do_not_change():
    model = tiny({"num_classes": 0, "drop_path_rate": 0.5, "capacity_factor": 0.3}, embed_dim=32)
    image, text = pairs()
    model.lock_image_tower()
    model.train()
    assert model.text.training
    features = model.encode_image(image)
    before = {name: tensor.clone() for name, tensor in model.visual.state_dict().items()}
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        with vmoe.record_routing(model) as record:
            loss = ClipLoss()(*model(image, text)) + record.auxiliary_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(model.encode_image(image), features)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.visual.state_dict().items())

    def trainable(tower):
        return {re.match(r"blocks\.\d+|\w+", name)[0] for name, p in tower.named_parameters() if p.requires_grad}

    model = tiny()
    model.lock_image_tower(unlocked_groups=2)
    assert trainable(model.visual) == {"blocks.1", "norm", "head"}
    model.lock_text_tower(unlocked_layers=1)
    assert trainable(model.text) == {"head"}
    model.lock_text_tower()
    assert trainable(model.text) == set()
    assert not model.train().text.training
    assert model.visual.training
    with pytest.raises(ValueError, match="freeze_layer_norm=False is not supported"):
        model.lock_text_tower(freeze_layer_norm=False)
    with pytest.raises(ValueError, match="must be >= 0, got -1"):
        model.lock_image_tower(-1)


def test_layer_decay_counts_from_the_top():
    groups = group_parameters(model := tiny(), model.group_matcher(), reverse=True)
    assert groups["visual.head.weight"] == groups["text.head.weight"] == groups["logit_scale"]
    for name in ("norm.weight", "blocks.{}.mlp.experts.fc1.weight"):
        assert groups[f"visual.{name.format(1)}"] == groups[f"text.{name.format(1)}"] + (name != "norm.weight")
    assert groups["text.token_embedding.weight"] == 0
    assert groups["visual.patch_embed.proj.weight"] == 1
    spared = model.no_weight_decay()
    assert {"visual.pos_embed", "text.pos_embed", "logit_scale", "text.blocks.1.mlp.experts.fc1.bias"} <= spared


def test_settings_of_one_tower_leave_the_others():
    base = TWO_TOWER_CONFIGS["two_tower_tiny_patch12_48"]
    merged = merge_settings(base, {"image": {"num_experts": 0}})
    assert merged["image"] == {**base["image"], "num_experts": 0}
    assert merged["text"] == base["text"]
    assert merge_settings(base, {"image": {"name": "resnet10t"}})["image"] == {"name": "resnet10t"}


def test_files(tmp_path):
    given = {"image": {"router_preset": "mixtral", "depth": 2}, "text": {"depth": 2, "router": "soft"}}
    model = create_model("two_tower_tiny_patch12_48", **given).eval()
    model.set_input_size(72)
    save_pretrained(model, tmp_path / "m.safetensors")
    again, _, _ = vmoe.create_model_and_transforms(pretrained=tmp_path / "m.safetensors")
    assert again.visual.image_size == preprocess_config(again)["input_size"][1:] == (72, 72)
    image, text = torch.randn(2, 3, 72, 72), vmoe.get_tokenizer(again)(["a", "b c"])
    torch.testing.assert_close(again(image, text), model(image, text))
    smaller = create_model(pretrained=tmp_path / "m.safetensors", image={"img_size": 48}, text={"drop_path_rate": 0.1})
    assert smaller.visual.pos_embed.shape == (1, 17, 128)
    assert torch.equal(smaller.text.head.weight, model.text.head.weight)
    assert model_spec(smaller)["kwargs"]["image"]["router_preset"] == "mixtral"


def test_image_tower_from_a_file(tmp_path):
    torch.manual_seed(0)
    source = create_model("vmoe_tiny_patch8_48", num_classes=3, depth=2, num_experts=4)
    torch.nn.init.normal_(source.head.weight)
    save_pretrained(source, tmp_path / "image.safetensors")
    image = {"pretrained": str(tmp_path / "image.safetensors")}
    images = torch.randn(2, 3, 48, 48)
    # Without a head, as in LiT: what the classifier saw.
    lit = create_model("two_tower_tiny_patch12_48", image={**image, "num_classes": 0}, text={"depth": 2}).eval()
    expected = source.eval().forward_head(source.forward_features(images), pre_logits=True)
    assert torch.equal(lit.encode_image(images), expected)
    # With a new head, and another image size.
    tuned = create_model("two_tower_tiny_patch12_48", image={**image, "img_size": 64}, text={"depth": 2}, embed_dim=16)
    assert tuned.visual.patch_embed.grid_size == (8, 8)
    assert tuned.visual.head.out_features == 16
    assert torch.equal(tuned.visual.norm.weight, source.norm.weight)
    # The saved model needs the first file no more, with whatever settings it is asked for.
    save_pretrained(lit, tmp_path / "lit.safetensors")
    (tmp_path / "image.safetensors").unlink()
    again = create_model(pretrained=tmp_path / "lit.safetensors", image={**image, "num_classes": 0}).eval()
    assert torch.equal(again.encode_image(images), expected)

    with pytest.raises(ValueError, match="nowhere: it does not exist"):
        create_model("two_tower_tiny_patch12_48", image={"pretrained": str(tmp_path / "nowhere")})
    with pytest.raises(ValueError, match="must hold an image model .* holds 'two_tower_tiny_patch12_48'"):
        create_model("two_tower_tiny_patch12_48", image={"pretrained": str(tmp_path / "lit.safetensors")})


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="the image tower gives 32 features, embed_dim is 24; set embed_dim=32"):
        tiny({"num_classes": 0})
    unknown = "has no setting 'num_expert'; did you mean 'num_experts'"
    for kwargs, message in (
        ({"image": {"num_expert": 3}}, unknown),
        ({"text": {"num_expert": 3}}, unknown),
        ({"image": 3}, "image must hold the image tower's settings, got 3"),
        ({"text": 3}, "text must hold the text tower's settings, got 3"),
        ({"image": {"name": "nope"}}, "image.name must be a model of timm's registry, got 'nope'"),
        ({"text": {"num_heads": 7}}, "width must be a multiple of num_heads"),
    ):
        with pytest.raises(ValueError, match=message):
            create_model("two_tower_tiny_patch8_48", **kwargs)
    with pytest.raises(ValueError, match="unknown model 'two_tower_base_patch61'; did you mean"):
        create_model("two_tower_base_patch61")
    assert timm.list_models("two_tower_*") == []  # timm knows no text


def test_fixed_batch_norms_stay_in_files(tmp_path):
    image = {"name": "resnet10t", "num_classes": 128}
    model = create_model("two_tower_tiny_patch8_48", image=image, text={"depth": 2}).train()
    model.lock_image_tower(unlocked_groups=1, freeze_bn_stats=True)
    model.train()
    norms = [module for module in model.visual.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert any(not norm.training for norm in norms)
    before = model.visual.bn1.running_mean.clone()
    model.encode_image(torch.randn(2, 3, 48, 48))
    assert torch.equal(before, model.visual.bn1.running_mean)
    save_pretrained(model, tmp_path / "model.safetensors")
    create_model(pretrained=tmp_path / "model.safetensors")
