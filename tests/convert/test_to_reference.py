"""Models of this package in the reference's words, and those that it has no words for."""

import pytest
import timm
import torch

import vmoe
from vmoe.convert import from_reference, reference_config, to_reference
from vmoe.convert.layout import reference_layout
from vmoe.models.factory import create_model

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router_preset": "mixtral"}, "expert_mlp='swiglu'|normalize_weights=True"),
        ({"z_loss": 0.1}, "z_loss=0.1"),
        ({"act_layer": "gelu"}, "the activation of blocks.0.mlp"),
        ({"init_values": 0.1}, r"blocks\.0\.ls1\.gamma, which the reference does not have"),
        ({"reg_tokens": 2}, "reg_token, which the reference does not have"),
        ({"global_pool": "avg"}, "global_pool='avg' with class_token=True"),
        ({"qkv_bias": False}, r"no blocks\.0\.attn\.qkv\.bias, which it needs"),
        ({"pre_norm": True}, "norm_pre.bias, which the reference does not have"),
        ({"in_chans": 1}, "in_chans=1"),
        ({"pos_embed": "rope"}, "pos_embed='rope'"),
        ({"class_token": False, "global_pool": "avg"}, "no norm before the pooling"),
    ],
)
def test_models_that_the_reference_does_not_have(settings, message):
    model = create_model("vmoe_tiny_patch8_48", **TINY, **settings)
    with pytest.raises(ValueError, match=message):
        to_reference(model)


def test_no_weight_is_left_out():
    model = create_model("vmoe_tiny_patch8_48", **TINY, scale_attn_norm=True)
    model.head = torch.nn.Linear(16, 3, bias=False)
    message = r"has blocks\.0\.attn\.norm\.bias, which .*norm\.weight, which .* not have; no head\.bias, which it needs"
    for convert in (to_reference, reference_config):
        with pytest.raises(ValueError, match=message):
            convert(model)


class OtherTowers(torch.nn.Module):
    """Two towers of another program."""

    def __init__(self, **towers):
        super().__init__()
        for name, tower in towers.items():
            setattr(self, name, tower)


def test_models_of_other_programs_are_refused():
    towers = create_model("two_tower_tiny_patch8_48", text={"depth": 2, "eot_token_id": None}, image={"depth": 2})
    swapped = timm.create_model("vmoe_tiny_patch8_48", depth=2)
    swapped.blocks[0].mlp = torch.nn.Identity()
    swapped.blocks[0].attn = torch.nn.Identity()
    for model in (OtherTowers(visual=towers.visual, text=towers.text), swapped):
        with pytest.raises(ValueError, match="reference"):
            reference_config(model)


def test_limoe_and_others():
    for name, kwargs in (("limoe_tiny_patch8_48", {"depth": 2}), ("resnet18", {})):
        with pytest.raises(ValueError, match="the reference has no model like this one"):
            to_reference(create_model(name, **kwargs))
    with pytest.raises(ValueError, match="hides padding"):
        to_reference(create_model("two_tower_tiny_patch8_48", text={"depth": 2}, image={"depth": 2}))


def test_unlimited_capacity_becomes_capacity_for_all_tokens():
    model = create_model("vmoe_tiny_patch8_48", **TINY, num_experts=3, num_selected_experts=2).eval()
    again = from_reference(reference_config(model), to_reference(model))
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad(), vmoe.record_routing(again) as record:
        torch.testing.assert_close(again(images), model(images))
    assert all(layer.kept.all() for layer in record.layers.values())


def test_limited_capacity_without_groups_needs_their_size():
    model = create_model("vmoe_tiny_patch8_48", **TINY, eval_capacity_factor=1.0)
    with pytest.raises(ValueError, match="give group_size"):
        reference_config(model)
    assert reference_config(model, group_size=10)["encoder"]["moe"]["group_size"] == 10


def test_every_parameter_has_one_entry():
    model = create_model("softmoe_tiny_patch8_48", depth=2, representation_size=8)
    layout = reference_layout(model)
    assert {entry.tensor for entry in layout.values()} == set(model.state_dict())
    sizes = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    arrays = to_reference(model)
    assert sum(array.size for array in arrays.values()) == sum(sizes.values())


def test_dense_timm_model_of_the_same_kind():
    model = timm.create_model("vmoe_tiny_patch8_48", depth=2, num_experts=0).eval()
    again = from_reference(reference_config(model), to_reference(model))
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(again(images), model(images))


def test_capacity_that_was_changed_on_the_layers_is_exported():
    model = create_model("vmoe_tiny_patch8_48", **TINY, group_size=5, eval_capacity_factor=1.0)
    model.blocks[1].mlp.eval_capacity_factor = 0.5
    model.blocks[1].mlp.batch_priority = True
    dispatcher = reference_config(model)["encoder"]["moe"]["router"]["dispatcher"]
    assert (dispatcher["capacity_factor"], dispatcher["batch_priority"]) == (0.5, True)
