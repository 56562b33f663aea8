import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

import vmoe
from vmoe.models.vision import sincos2d_positions, sparse_blocks
from vmoe.moe import SparseMoE
from vmoe.moe.config import PRESETS

NAMES = timm.list_models("vmoe_*") + timm.list_models("softmoe_*")
SMALL = {"img_size": 28, "patch_size": 14, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}


@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_of_each(name):
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL, num_experts=4)
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-2, weight_decay=0.05, layer_decay=0.7)
    images, labels = torch.randn(6, 3, 28, 28), torch.arange(6) % 5
    before = {key: value.clone() for key, value in model.state_dict().items()}
    losses = []
    for _ in range(4):
        with vmoe.record_routing(model) as record:
            loss = torch.nn.functional.cross_entropy(model(images), labels) + record.auxiliary_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert record.layers
    assert all(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.default_cfg["mean"] == model.default_cfg["std"] == (0.5, 0.5, 0.5)  # pixels in -1..1


@pytest.mark.parametrize(
    ("name", "blocks", "num_experts"),
    [("vmoe_small_patch32_224", [5, 7], 8), ("softmoe_small_patch16_224", [6, 7, 8, 9, 10, 11], 128)],
)
def test_where_the_papers_put_their_experts(name, blocks, num_experts):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert [i for i, block in enumerate(model.blocks) if isinstance(block.mlp, SparseMoE)] == blocks
    layer = model.blocks[blocks[0]].mlp
    assert layer.experts.fc1.weight.shape[0] == num_experts
    if name.startswith("softmoe"):
        assert layer.router.slots.shape[1] == 1  # a slot for each expert
        assert (model.cls_token, model.global_pool) == (None, "avg")
        assert isinstance(model.norm, torch.nn.LayerNorm)  # before the mean
        assert model.blocks[0].attn.q_norm.bias is None


def test_a_preset_goes_over_a_names_settings_and_under_the_users():
    def layer(name="vmoe_tiny_patch8_48", **kwargs) -> SparseMoE:
        return timm.create_model(name, **kwargs).blocks[-1].mlp

    assert layer().num_selected_experts == 1
    assert layer(router_preset="vmoe").num_selected_experts == 2
    assert layer(router_preset="vmoe", num_selected_experts=3).num_selected_experts == 3
    assert layer(router_preset="mixtral").capacity_factor is None
    assert layer(router_preset="mixtral", capacity_factor=2.0).capacity_factor == 2.0
    assert layer(capacity_factor=float("inf")).capacity_factor is None  # timm leaves None out
    assert layer("softmoe_tiny_patch8_48", router_preset="expert_choice").router_type == "expert_choice"
    assert layer("softmoe_tiny_patch8_48", router="top_k").num_experts == 32
    assert layer(router_preset="soft").router.slots.shape[:2] == (8, round(37 / 8))  # 36 patches and the class token
    with pytest.raises(ValueError, match="router_preset must be one of"):
        layer(router_preset="maxtril")


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_train(preset):
    torch.manual_seed(0)
    model = timm.create_model("vmoe_tiny_patch8_48", **SMALL, router_preset=preset)
    torch.nn.init.normal_(model.head.weight)
    with vmoe.record_routing(model) as record:
        loss = model(torch.randn(6, 3, 28, 28)).square().mean() + record.auxiliary_loss()
    loss.backward()
    layer = model.blocks[1].mlp
    assert layer.experts.fc2.weight.grad.abs().sum() > 0
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "noise" not in name)
    for layer_decay in (None, 0.8):
        decay = create_optimizer_v2(model, "adamw", weight_decay=0.1, layer_decay=layer_decay).param_groups
        decayed = {id(p) for group in decay if group["weight_decay"] > 0 for p in group["params"]}
        for name, parameter in model.named_parameters():
            assert (id(parameter) in decayed) == (name.endswith("weight") and "norm" not in name), name


def test_sparse_blocks():
    assert sparse_blocks("every2", 6) == (1, 3, 5)
    assert sparse_blocks("every3", 7) == (2, 5)
    assert sparse_blocks("last2", 8) == (5, 7)
    assert sparse_blocks("every1", 3) == (0, 1, 2)
    assert sparse_blocks((4, 0), 6) == (0, 4)
    assert sparse_blocks("second_half", 7) == (3, 4, 5, 6)
    assert sparse_blocks((), 6) == ()
    for wrong in ("each2", "every0", "every", "last-1"):
        with pytest.raises(ValueError, match="must be 'everyN'"):
            sparse_blocks(wrong, 6)
    with pytest.raises(ValueError, match=r"must lie in 0\.\.5"):
        sparse_blocks([6], 6)
    with pytest.raises(ValueError, match=r"got 3; write \[3\]"):
        sparse_blocks(3, 6)
    for wrong in ("every9", "last4"):
        with pytest.raises(ValueError, match="asks for more than"):
            sparse_blocks(wrong, 6)


def test_dense_baseline_has_no_experts_and_takes_timms_weights():
    baseline = timm.create_model("vmoe_tiny_patch8_48", num_experts=0, num_classes=5)
    dense = timm.create_model(
        "vit_base_patch16_224", img_size=48, patch_size=8, embed_dim=128, depth=6, num_heads=4, num_classes=5,
        act_layer="gelu_tanh",
    )  # fmt: skip
    baseline.load_state_dict(dense.state_dict())
    x = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(baseline.eval()(x), dense.eval()(x))


def test_an_image_does_not_depend_on_its_neighbours():
    torch.manual_seed(0)
    model = timm.create_model("vmoe_tiny_patch8_48", num_classes=10, capacity_factor=0.3, batch_priority=True).eval()
    torch.nn.init.normal_(model.head.weight)
    images = torch.randn(64, 3, 48, 48)
    with torch.no_grad():
        together = model(images)
        for index in (0, 13, 63):
            torch.testing.assert_close(model(images[index : index + 1])[0], together[index], atol=1e-5, rtol=1e-5)


def test_what_timm_does_with_a_vit_works():
    model = timm.create_model("vmoe_tiny_patch8_48", num_classes=10, drop_path_rate=0.1, global_pool="avg")
    x = torch.randn(2, 3, 48, 48)
    features, intermediates = model.forward_intermediates(x)
    assert features.shape == (2, 37, 128)
    assert intermediates[-1].shape == (2, 128, 6, 6)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.set_input_size(img_size=64)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 3)
    dynamic = timm.create_model("vmoe_tiny_patch8_48", dynamic_img_size=True, num_classes=0)
    assert dynamic(torch.randn(1, 3, 40, 56)).shape == (1, 128)
    pyramid = timm.create_model("vmoe_tiny_patch8_48", features_only=True, out_indices=(1, 5))
    assert [tuple(f.shape) for f in pyramid(x)] == [(2, 128, 6, 6)] * 2
    for pool in ("map", "avgmax", "max"):
        assert timm.create_model("vmoe_tiny_patch8_48", global_pool=pool, num_classes=4)(x).shape == (2, 4)


def test_rotary_positions_fit_any_image_size():
    rope = {**SMALL, "patch_size": 7, "pos_embed": "rope"}
    model, fixed = (timm.create_model("vmoe_tiny_patch8_48", **rope, dynamic_img_size=any_size) for any_size in (1, 0))
    torch.nn.init.normal_(model.head.weight)
    assert not [name for name in model.state_dict() if "pos_embed" in name or "rope" in name]
    fixed.load_state_dict(model.state_dict())
    fixed.set_input_size((21, 42))
    images = torch.randn(2, 3, 21, 42)
    torch.testing.assert_close(model.eval()(images), fixed.eval()(images))
    features, maps = model.forward_intermediates(images)
    assert torch.equal(features, model.forward_features(images))
    assert maps[-1].shape == (2, 32, 3, 6)
    assert not torch.allclose(model(images.transpose(2, 3)), model(images.flip(3).transpose(2, 3)))
    outputs = []
    for recompute in (False, True):
        model.train().set_grad_checkpointing(recompute)
        model.zero_grad()
        torch.manual_seed(0)
        with vmoe.record_routing(model):
            model(images).square().sum().backward()
        outputs.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))
    with pytest.raises(ValueError, match="needs heads of a multiple of 4 channels, got 6"):
        timm.create_model("vmoe_tiny_patch8_48", **rope | {"embed_dim": 12})
    with pytest.raises(ValueError, match="no patch_drop_rate"):
        timm.create_model("vmoe_tiny_patch8_48", **rope, patch_drop_rate=0.5)


@pytest.mark.slow
def test_compiles_as_one_graph():
    torch._dynamo.reset()
    model = timm.create_model("vmoe_tiny_patch8_48", depth=1, moe_layers=[0], num_classes=10, noise_std=0.0)
    torch.nn.init.normal_(model.head.weight)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 3, 48, 48)
    torch.testing.assert_close(compiled(x), model(x))


def test_fix_init_scales_the_experts_too():
    kwargs = {"embed_dim": 32, "num_heads": 2, "depth": 2}
    torch.manual_seed(0)
    plain = timm.create_model("vmoe_tiny_patch8_48", **kwargs)
    torch.manual_seed(0)
    fixed = timm.create_model("vmoe_tiny_patch8_48", fix_init=True, **kwargs)
    torch.testing.assert_close(fixed.blocks[1].mlp.experts.fc2.weight, plain.blocks[1].mlp.experts.fc2.weight / 2)
    with pytest.raises(ValueError, match="block_fn cannot be set"):
        timm.create_model("vmoe_tiny_patch8_48", block_fn=torch.nn.Identity, **kwargs)


def test_sincos2d_positions():
    positions = sincos2d_positions(2, 3, 16, 100.0)
    assert positions.shape == (1, 6, 16)
    y, x = 1, 2
    for i in range(4):
        w = 100.0 ** (-i / 3)
        expected = torch.tensor([x * w, x * w, y * w, y * w])
        expected = torch.stack([expected[0].sin(), expected[1].cos(), expected[2].sin(), expected[3].cos()])
        torch.testing.assert_close(positions[0, y * 3 + x, i::4], expected)


@pytest.mark.parametrize("class_token", [True, False])
def test_sincos2d_follows_the_image(class_token):
    torch.manual_seed(0)
    kwargs = {**SMALL, "pos_embed": "sincos2d", "class_token": class_token, "global_pool": "token"}
    model = timm.create_model("vmoe_tiny_patch8_48", **kwargs).eval()
    torch.nn.init.normal_(model.head.weight)
    assert not [name for name in model.state_dict() if "pos" in name]
    larger = timm.create_model("vmoe_tiny_patch8_48", **{**kwargs, "img_size": (42, 28)}).eval()
    dynamic = timm.create_model("vmoe_tiny_patch8_48", **kwargs, dynamic_img_size=True).eval()
    for other in (larger, dynamic):
        other.load_state_dict(model.state_dict())
    small, large = torch.randn(2, 3, 28, 28), torch.randn(2, 3, 42, 28)
    torch.testing.assert_close(dynamic(small), model(small))
    torch.testing.assert_close(dynamic(large), larger(large))
    assert not torch.allclose(larger(large), larger(large.flip(2)))
    model.set_input_size((42, 28))
    torch.testing.assert_close(model(large), larger(large))
    embedded = model.patch_embed(large)
    placed = model._pos_embed(embedded)
    torch.testing.assert_close(
        placed[:, int(class_token) :] - embedded, sincos2d_positions(3, 2, 32, 1e4).expand(2, -1, -1)
    )
    assert len(larger.forward_intermediates(large)[1]) == 4
    with pytest.raises(ValueError, match="multiple of 4 and at least 8, got 30"):
        timm.create_model("vmoe_tiny_patch8_48", **{**kwargs, "embed_dim": 30})
    with pytest.raises(ValueError, match="pos_embed must be"):
        timm.create_model("vmoe_tiny_patch8_48", pos_embed="alibi")


def test_first_patch_without_a_class_token():
    model = timm.create_model("vmoe_tiny_patch8_48", **SMALL, class_token=False).eval()
    x = torch.randn(2, 3, 28, 28)
    features = model.forward_features(x)
    assert features.shape == (2, 4, 32)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features[:, 0])
    model.reset_classifier(3, "avg")
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.mean(1))
    model.reset_classifier(3, "token")
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features[:, 0])


def test_qk_norm_in_blocks_and_pool():
    model = timm.create_model("vmoe_tiny_patch8_48", **SMALL, qk_norm=True, global_pool="map", class_token=False).eval()
    torch.nn.init.normal_(model.head.weight)
    names = {name for name in model.state_dict() if "_norm." in name}
    owners = [f"blocks.{i}.attn" for i in range(4)] + ["attn_pool"]
    assert names == {f"{owner}.{which}_norm.weight" for owner in owners for which in "qk"}
    x = torch.randn(2, 3, 28, 28)
    before = model(x)
    with torch.no_grad():  # scaled queries and keys are normed away, up to the norm's epsilon
        model.blocks[0].attn.qkv.weight[:64] *= 100
        model.attn_pool.q.weight *= 100
        model.attn_pool.q.bias *= 100
    torch.testing.assert_close(model(x), before, atol=2e-3, rtol=1e-2)


def test_representation_layer(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vmoe_tiny_patch8_48", **SMALL, representation_size=24).eval()
    x = torch.randn(2, 3, 28, 28)
    assert torch.equal(model(x), torch.zeros(2, 5))  # a fresh classifier is zero, as timm's
    torch.nn.init.normal_(model.head.weight)
    torch.nn.init.normal_(model.pre_logits.weight)
    features = model.forward_features(x)
    expected = torch.tanh(features[:, 0] @ model.pre_logits.weight.T + model.pre_logits.bias)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), expected)
    torch.testing.assert_close(model(x), expected @ model.head.weight.T + model.head.bias)
    # timm's own way of loading keeps it.
    torch.save(model.state_dict(), tmp_path / "m.pth")
    overlay = {"file": str(tmp_path / "m.pth"), "num_classes": 5}
    again = timm.create_model(
        "vmoe_tiny_patch8_48", pretrained=True, pretrained_cfg_overlay=overlay, **SMALL, representation_size=24
    )
    again.eval()
    torch.testing.assert_close(again(x), model(x))
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), expected)
    assert model.head_hidden_size == 24
    pyramid = timm.create_model(
        "vmoe_tiny_patch8_48", **SMALL, representation_size=24, features_only=True, out_indices=(1,)
    )
    assert not [name for name in pyramid.state_dict() if "pre_logits" in name]


def test_slots_of_a_soft_name_follow_the_capacity_that_is_asked_for():
    def slots(**kwargs) -> int:
        model = timm.create_model("softmoe_tiny_patch8_48", depth=2, **kwargs)
        return model.blocks[-1].mlp.router.slots.shape[1]

    assert slots() == 1  # the paper's
    assert slots(capacity_factor=4.0) == round(36 * 4.0 / 32)
    assert slots(router_preset="soft") == round(36 / 32)
    assert slots(num_slots=3, capacity_factor=4.0) == 3
    with pytest.raises(ValueError, match="num_slots=4 needs router='soft'"):
        timm.create_model("softmoe_tiny_patch8_48", depth=2, router="top_k", num_slots=4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"representation_size": 0}, "representation_size must be a whole number >= 1"),
        ({"representation_size": 2.5}, "representation_size must be a whole number >= 1"),
        ({"pos_embed": "rope", "pos_temperature": 0}, "pos_temperature must be > 0, got 0"),
        ({"pos_embed": "rope", "pos_temperature": "x"}, "pos_temperature must be > 0, got 'x'"),
        ({"pos_embed": "sincos2d", "pos_temperature": 0}, "pos_temperature must be > 0, got 0"),
        ({"class_token": False, "global_pool": "token", "reg_tokens": 2}, "leave reg_tokens out"),
    ],
)
def test_options_that_would_break_silently_are_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("vmoe_tiny_patch8_48", depth=2, **kwargs)
