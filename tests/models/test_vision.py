import pytest
import timm
import torch
from timm.models import checkpoint_seq  # noqa: F401  (what set_grad_checkpointing uses)
from timm.optim import create_optimizer_v2

import vmoe
from vmoe.models.vision import VisionMoE, sparse_blocks
from vmoe.moe import SparseMoE

NAMES = timm.list_models("vmoe_*")
SMALL = {"img_size": 28, "patch_size": 14, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}


def test_the_papers_sizes_are_registered():
    sizes = {"small_patch32", "base_patch32", "base_patch16", "large_patch32", "large_patch16", "huge_patch14"}
    assert {f"vmoe_{size}_224" for size in sizes} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_of_each(name):
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL)
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
    ("name", "blocks"),
    [("vmoe_small_patch32_224", [5, 7]), ("vmoe_base_patch16_224", [1, 3, 5, 7, 9, 11])],
)
def test_where_the_papers_put_their_experts(name, blocks):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert [i for i, block in enumerate(model.blocks) if isinstance(block.mlp, SparseMoE)] == blocks
    assert model.blocks[blocks[0]].mlp.experts.fc1.weight.shape[0] == 8


def test_sparse_blocks():
    assert sparse_blocks("every2", 6) == (1, 3, 5)
    assert sparse_blocks("every3", 7) == (2, 5)
    assert sparse_blocks("last2", 8) == (5, 7)
    assert sparse_blocks("every1", 3) == (0, 1, 2)
    assert sparse_blocks((4, 0), 6) == (0, 4)
    for wrong in ("each2", "every0", "every", "last-1"):
        with pytest.raises(ValueError, match="must be 'everyN'"):
            sparse_blocks(wrong, 6)
    with pytest.raises(ValueError, match=r"must lie in 0\.\.5"):
        sparse_blocks([6], 6)
    for wrong in ("every9", "last4"):
        with pytest.raises(ValueError, match="asks for more than"):
            sparse_blocks(wrong, 6)


def test_routing_settings_reach_every_layer():
    model = timm.create_model(
        "vmoe_tiny_patch8_48",
        num_experts=3,
        num_selected_experts=2,
        batch_priority=True,
        capacity_factor=0.5,
        group_size=7,
    )
    layers = [block.mlp for block in model.blocks if isinstance(block.mlp, SparseMoE)]
    assert len(layers) == 3
    for layer in layers:
        assert (layer.num_experts, layer.num_selected_experts) == (3, 2)
        assert (layer.batch_priority, layer.capacity_factor, layer.group_size) == (True, 0.5, 7)
    assert isinstance(layers[0].experts.act, torch.nn.GELU) or "GELUTanh" in type(layers[0].experts.act).__name__


def test_dense_twin_has_no_experts_and_takes_timms_weights():
    twin = timm.create_model("vmoe_tiny_patch8_48", num_experts=0, num_classes=5)
    dense = timm.create_model(
        "vit_base_patch16_224", img_size=48, patch_size=8, embed_dim=128, depth=6, num_heads=4, num_classes=5,
        act_layer="gelu_tanh",
    )  # fmt: skip
    twin.load_state_dict(dense.state_dict())
    x = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(twin.eval()(x), dense.eval()(x))


def test_a_picture_does_not_depend_on_its_neighbours():
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


def test_gradient_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    model = timm.create_model("vmoe_tiny_patch8_48", num_classes=10)
    torch.nn.init.normal_(model.head.weight)
    x = torch.randn(3, 3, 48, 48)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(1)
        with vmoe.record_routing(model) as record:
            loss = model(x).square().mean() + record.auxiliary_loss()
        loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.slow
def test_compiles_as_one_graph():
    torch._dynamo.reset()
    model = timm.create_model("vmoe_tiny_patch8_48", num_classes=10, noise_std=0.0)
    torch.nn.init.normal_(model.head.weight)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 3, 48, 48)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("layer_decay", [None, 0.8])
def test_biases_of_experts_do_not_decay(layer_decay):
    model = timm.create_model("vmoe_tiny_patch8_48")
    optimizer = create_optimizer_v2(model, "adamw", weight_decay=0.1, layer_decay=layer_decay)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]}
    layer = model.blocks[1].mlp
    assert id(layer.experts.fc1.bias) not in decayed
    assert id(layer.experts.fc1.weight) in decayed


def test_fix_init_scales_the_experts_too():
    kwargs = {"embed_dim": 32, "num_heads": 2, "depth": 2}
    torch.manual_seed(0)
    plain = timm.create_model("vmoe_tiny_patch8_48", **kwargs)
    torch.manual_seed(0)
    fixed = timm.create_model("vmoe_tiny_patch8_48", fix_init=True, **kwargs)
    torch.testing.assert_close(fixed.blocks[1].mlp.experts.fc2.weight, plain.blocks[1].mlp.experts.fc2.weight / 2)
    assert isinstance(fixed, VisionMoE)
