"""Swin-MoE: timm's Swin, with what timm's models and this package's tools do (golden figures: tests/convert)."""

import math

import pytest
import timm
import torch

import vmoe
from vmoe.evaluation.capacity import limited, sparse_image_layers, sweep_settings
from vmoe.evaluation.config import CapacityConfig
from vmoe.inspection.forward import patch_grid
from vmoe.models.factory import create_model, save_pretrained
from vmoe.models.swin_moe import SWIN_MOE_MODELS
from vmoe.moe import SparseMoE

TINY = {"embed_dim": 16, "num_heads": (2, 4), "num_classes": 5}
NAME = "swin_moe_tiny_patch4_window4_32"


def tiny(**kwargs):
    torch.manual_seed(0)
    model = create_model(NAME, **TINY, **kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_attention_is_timms_with_the_table_that_the_mlp_makes():
    ours = tiny(num_experts=0, img_size=64)
    sizes = {"img_size": 64, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
    theirs = timm.models.SwinTransformer(**sizes, num_classes=5).eval()
    weights = {name: tensor for name, tensor in ours.state_dict().items() if "cpb_mlp" not in name}
    for name, module in ours.named_modules():
        if name.endswith(".attn"):
            table = module.cpb_mlp(module.relative_coords_table).flatten(0, 2)
            weights[f"{name}.relative_position_bias_table"] = table.detach()
    theirs.load_state_dict(weights)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images))
        ours.set_input_size(img_size=(32, 48), window_size=(4, 2))
        assert ours(images[..., :32, :48]).isfinite().all()


def test_dropout_after_the_patch_embedding():
    model = tiny(pos_drop_rate=0.5)
    expected = model.patch_embed(IMAGES)
    found = model.train().patch_embed(IMAGES)
    kept = found != 0
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(found[kept], 2 * expected[kept])


def test_windows_of_images_that_are_not_square_follow_the_shorter_side():
    def windows(model):
        blocks = [block for stage in model.layers for block in stage.blocks]
        assert all(block.attn.window_size == block.window_size for block in blocks)
        assert all((block.attn_mask is not None) == any(block.shift_size) for block in blocks)
        return [(*block.window_size, *block.shift_size) for block in blocks]

    for window, side in ((4, 4), (12, 8)):
        # Stages of 8 x 16 and 4 x 8 positions.
        shift = 2 if window == 4 else 0
        wanted = [(side, side, 0, 0), (side, side, shift, shift), (4, 4, 0, 0), (4, 4, 0, 0)]
        model = create_model(NAME, **TINY, img_size=[32, 64], window_size=window).eval()
        assert windows(model) == wanted
        assert model(torch.zeros(1, 3, 32, 64)).shape == (1, 5)
        again = create_model(NAME, **TINY, img_size=64, window_size=window)
        again.set_input_size(img_size=(32, 64), window_size=window)
        assert windows(again) == wanted
    again.set_input_size(img_size=(32, 48), window_size=(4, 2))  # asked for with two sides: timm's
    assert windows(again) == [(4, 2, 0, 0), (4, 2, 2, 1), (4, 2, 0, 0), (4, 2, 0, 1)]
    square = create_model(NAME, **TINY, img_size=64)
    assert windows(square) == [(4, 4, 0, 0), (4, 4, 2, 2)] * 2


def test_names_stand_for_the_released_sizes():
    with torch.device("meta"):
        model = timm.create_model("swin_moe_small_patch4_window12_192_cosine_router_32expert_32gpu_22k")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseMoE)}
    blocks = [*(f"layers.2.blocks.{index}.mlp" for index in range(1, 18, 2)), "layers.3.blocks.1.mlp"]
    assert list(layers) == blocks
    assert layers[blocks[-1]].experts.fc1.weight.shape == (32, 3072, 768)
    assert layers[blocks[0]].router.projection.shape == (256, 384)
    assert not layers[blocks[0]].experts.fc2.bias.requires_grad
    assert model.head.fc.weight.shape == (21841, 768)
    assert model.layers[3].blocks[0].mlp.fc2.bias is None
    assert set(timm.list_models("swin_moe_*")) == set(SWIN_MOE_MODELS) == set(vmoe.list_models("swin_moe_*"))


def test_one_setting_drops_nothing():
    free, limited_model = tiny(eval_capacity_factor=math.inf), tiny(eval_capacity_factor=0.5)
    with torch.no_grad():
        together = free(IMAGES)
        torch.testing.assert_close(free(IMAGES[:1]), together[:1], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(limited_model(IMAGES), together, atol=1e-3)


@pytest.mark.parametrize("settings", [{}, {"gate": "cosine", "cosine_dim": 6}], ids=["linear", "cosine"])
def test_the_tools_of_other_models_work(settings, tmp_path):
    model = tiny(**settings)
    save_pretrained(model, tmp_path / "model.safetensors")
    again = create_model(pretrained=tmp_path / "model.safetensors").eval()
    with torch.no_grad():
        logits = model(IMAGES)
        assert torch.equal(again(IMAGES), logits)
        assert [patch_grid(model, tokens) for tokens in (64, 16)] == [(0, 8, 8), (0, 4, 4)]  # of the two stages
        layers = sparse_image_layers(model, model, IMAGES, "the model")
        for setting in sweep_settings(CapacityConfig(factors=[0.5, None]), layers):
            with limited(layers.values(), setting), vmoe.record_routing(model) as record:
                model(IMAGES)
            shares = [layer.metrics["share_dropped"] for layer in record.layers.values()]
            assert (max(shares) > 0) == (setting.factor == 0.5)
        stored = vmoe.quantize_experts(again, "int8")(IMAGES)
    assert 0 < (stored - logits).abs().max() < 0.05 * logits.abs().max()


def test_soft_routing_in_stages_of_different_sizes_comes_back(tmp_path):
    model = tiny(router="soft", moe_layers=[0, 2])
    assert [layer.settings.num_slots for layer in model.modules() if isinstance(layer, SparseMoE)] == [16, 4]
    save_pretrained(model, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(create_model(pretrained=tmp_path / "model.safetensors").eval()(IMAGES), model(IMAGES))


def test_training_reaches_every_part_and_timms_interfaces_work():
    model = tiny(gate="cosine", cosine_dim=6, mlp_fc2_bias=False).train()
    model.set_grad_checkpointing()
    with vmoe.record_routing(model) as record:
        loss = model(IMAGES).logsumexp(1).mean() + record.auxiliary_loss()
    loss.backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert [name.split(".", 3)[3] for name in without] == ["1.mlp.experts.fc2.bias"]
    decayed_not = model.no_weight_decay()
    assert "layers.1.blocks.1.mlp.router.projection" in decayed_not
    assert "layers.0.blocks.0.attn.cpb_mlp.0.weight" in decayed_not
    features = timm.create_model(NAME, features_only=True, **TINY).eval()(IMAGES)
    assert [each.shape for each in features] == [(4, 8, 8, 16), (4, 4, 4, 32)]
    sparse = tiny(gate="cosine", cosine_dim=4)
    pruned = vmoe.prune_experts(sparse, 2, vmoe.measure_usage(sparse, [IMAGES]))
    assert pruned.layers[1].blocks[1].mlp.router.projection.shape == (4, 32)
    model.eval().reset_classifier(2)
    assert model(IMAGES).shape == (4, 2)
