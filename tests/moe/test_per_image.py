"""Routing of whole images (Mobile V-MoEs, arXiv 2309.04354); in test_against_loop.py it equals a loop over images."""

import pytest
import timm
import torch

import vmoe
from vmoe.moe import SparseMoE

B, T, D, E = 6, 5, 8, 4
PLAIN = {"num_experts": E, "per_image": True, "capacity_factor": None}
CASES = {
    "plain": {"num_selected_experts": 2},
    "groups": {"group_size": 3 * T, "eval_capacity_factor": 0.5, "capacity_multiple_of": 1, "batch_priority": True},
    "ensemble": {"ensemble_size": 2, "eval_capacity_factor": 0.5, "capacity_multiple_of": 1},
    "learned": {"learned_noise": True, "num_selected_experts": 2},
}


def layer_of(train=False, **settings):
    torch.manual_seed(0)
    layer = SparseMoE(D, 8, **PLAIN | settings).double().train(train)
    torch.nn.init.normal_(layer.router.weight)
    return layer


def images(number=B):
    return torch.randn(number, T, D, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def run(layer, *inputs):
    with vmoe.record_routing(layer) as record:
        y = layer(*inputs)
    return y, record.layers[""]


def test_the_gate_sees_the_pooled_image_alone():
    layer, x, seen = layer_of(), images(), []
    layer.router.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    _, call = run(layer, x)
    torch.testing.assert_close(seen[0], x.mean(1)[None])
    other = x.flip(1) + torch.tensor([1.0, -1, 0, 2, -2], dtype=torch.double)[:, None]  # of the same mean
    torch.testing.assert_close(run(layer, other)[1].routing.logits_GNE, call.routing.logits_GNE)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("train", [False, True])
def test_all_tokens_of_an_image_go_together(case, train):
    layer = layer_of(train, **CASES[case])
    _, call = run(layer, images())
    for tensor in (call.expert_index, call.combine_weights, call.kept, call.routing.noisy_logits_GNE):
        by_token = call.tokens(tensor)
        assert (by_token == by_token[:, :1]).all()
    assert call.load.sum() == call.kept.sum()
    assert train or ("capacity" in str(CASES[case])) == (not call.kept.all())


@pytest.mark.parametrize("case", ["plain", "ensemble"])
def test_images_in_another_order_are_the_same_images(case):
    layer, x = layer_of(**CASES[case] | {"eval_capacity_factor": None}), images()
    order = torch.tensor([4, 5, 0, 1, 2, 3])  # the copies of an image stay next to each other
    torch.testing.assert_close(layer(x[order]), layer(x)[order])
    torch.testing.assert_close(layer(x.view(B, T, 1, D)), layer(x)[:, :, None])


def test_padding_changes_nothing():
    layer, x = layer_of(eval_capacity_factor=0.5, capacity_multiple_of=1, importance_loss=1.0), images()
    whole, call = run(layer, x)
    more = torch.cat([x, torch.full((B, 3, D), float("nan"), dtype=torch.double)], dim=1)
    more = torch.cat([more, torch.full((2, T + 3, D), float("nan"), dtype=torch.double)])  # two images of padding
    mask = torch.zeros(B + 2, T + 3, dtype=torch.bool)
    mask[:B, :T] = True
    padded, other = run(layer, more, mask)
    torch.testing.assert_close(padded[:B, :T], whole)
    assert (padded[~mask] == 0).all()
    assert other.load.tolist() == call.load.tolist()
    torch.testing.assert_close(other.auxiliary_loss, call.auxiliary_loss)


def test_models_train_and_save(tmp_path):
    kwargs = {"img_size": 16, "embed_dim": 32, "num_heads": 2, "depth": 2, "num_classes": 3, "num_experts": 4}
    model = timm.create_model("vmoe_tiny_patch8_48", **kwargs, per_image=True, weight_init="")
    x = torch.randn(4, 3, 16, 16)
    with vmoe.record_routing(model) as record:
        (model(x).square().sum() + record.auxiliary_loss()).backward()
    gate = model.blocks[1].mlp.router.weight
    assert gate.grad.abs().sum() > 0
    model.eval()
    expected = model(x)
    vmoe.save_pretrained(model, tmp_path / "m.safetensors")
    assert torch.equal(vmoe.create_model(pretrained=tmp_path / "m.safetensors").eval()(x), expected)


def test_upcycled_models_are_the_dense_ones():
    dense = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3).eval()
    sparse = vmoe.upcycle(dense, 4, layers="every1", per_image=True)
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(sparse(x), dense(x), atol=1e-5, rtol=1e-4)


def test_what_does_not_go_with_it_is_said():
    with pytest.raises(ValueError, match=r"group_size to be a multiple of the 5 tokens of an image, got 6"):
        layer_of(group_size=6)(images())
    with pytest.raises(ValueError, match="per_image=True needs router='top_k', not 'soft'"):
        layer_of(router="soft", num_slots=1)
    with pytest.raises(ValueError, match="must be left out of a LIMoE"):
        vmoe.create_model("limoe_tiny_patch8_48", per_image=True)
    assert layer_of()(images(0)).shape == (0, T, D)
