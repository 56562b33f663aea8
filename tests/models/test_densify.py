"""The ways out of a sparse model: one MLP, or fewer experts."""

import numpy as np
import pytest
import timm
import torch

import vmoe
from vmoe.models.dense_mlp import UpcycleError
from vmoe.models.factory import create_model, save_pretrained
from vmoe.models.preprocess import preprocess_config

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


def tiny_vmoe(**kwargs):
    """A V-MoE with a head that tells its inputs apart, and experts with their own biases."""
    torch.manual_seed(0)
    model = create_model("vmoe_tiny_patch8_48", **{**TINY, "num_experts": 6, **kwargs}).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "head" in name or "experts" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def images(number=4):
    return torch.randn(number, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def sparse():
    return tiny_vmoe(num_selected_experts=2, normalize_weights=True)


@torch.no_grad()
def test_average_weighted_average_and_one_of_the_experts(sparse):
    experts = sparse.blocks[1].mlp.experts
    mlp = vmoe.densify(sparse).blocks[1].mlp
    assert type(mlp) is timm.layers.Mlp
    torch.testing.assert_close(mlp.fc1.weight, experts.fc1.weight.mean(0))
    torch.testing.assert_close(mlp.fc2.bias, experts.fc2.bias.mean(0))
    usage = {"blocks.1.mlp": torch.tensor([3, 0, 1, 0, 0, 0])}
    mlp = vmoe.densify(sparse, "weighted", usage).blocks[1].mlp
    expected = 0.75 * experts.fc2.weight[0] + 0.25 * experts.fc2.weight[2]
    torch.testing.assert_close(mlp.fc2.weight, expected)
    mlp = vmoe.densify(sparse, 4).blocks[1].mlp
    x = torch.randn(7, 32)
    count = torch.tensor([0, 0, 0, 0, 7, 0])
    torch.testing.assert_close(mlp(x), experts(x, count))


@pytest.mark.parametrize(
    "kwargs", [{"expert_mlp": "swiglu"}, {"expert_mlp": "geglu"}, {"scale_mlp_norm": True}, {"act_layer": "prelu"}]
)
@torch.no_grad()
def test_experts_of_any_kind_in_models_that_never_were_dense(kwargs, tmp_path):
    sparse = tiny_vmoe(**kwargs)
    for parameter in sparse.blocks[1].mlp.experts.act.parameters():
        parameter.fill_(0.7)
    dense = vmoe.densify(sparse, 3)
    x = torch.randn(7, 32)
    count = torch.tensor([0, 0, 0, 7, 0, 0])
    torch.testing.assert_close(dense.blocks[1].mlp(x), sparse.blocks[1].mlp.experts(x, count))
    if "expert_mlp" in kwargs:  # no settings of a V-MoE give it gated dense MLPs
        with pytest.raises(ValueError, match="its settings give another model"):
            save_pretrained(dense, tmp_path / "m.safetensors")


@torch.no_grad()
def test_a_dense_vmoe_is_the_baseline_of_its_settings(sparse, tmp_path):
    dense = vmoe.densify(sparse)
    assert repr(dense) == repr(create_model("vmoe_tiny_patch8_48", **TINY, num_experts=0))
    save_pretrained(dense, tmp_path / "m.safetensors")
    again = create_model(pretrained=tmp_path / "m.safetensors").eval()
    torch.testing.assert_close(again(images()), dense(images()), rtol=0, atol=0)
    upcycled = vmoe.upcycle(again, num_experts=3, layers=[1])
    torch.testing.assert_close(upcycled(images()), dense(images()), rtol=0, atol=1e-5)


def test_usage_is_what_the_experts_kept(sparse):
    sparse.train()
    usage = vmoe.measure_usage(sparse, [images(3), (images(2),), {"image": images(1), "label": torch.zeros(1)}])
    assert sparse.training
    assert list(usage) == ["blocks.1.mlp"]
    assert usage["blocks.1.mlp"].sum() == 6 * 5 * 2  # six images of five tokens, two experts each
    with vmoe.record_routing(sparse.eval()) as record, torch.no_grad():
        sparse(images(3))
    load = record.layers["blocks.1.mlp"].load
    torch.testing.assert_close(vmoe.measure_usage(sparse, [images(3)])["blocks.1.mlp"], load.double())
    limoe = create_model("limoe_tiny_patch12_48", depth=2, num_experts=4, img_size=24, vocab_size=9, eot_token_id=8)
    texts = torch.full((2, 16), 8)
    usage = vmoe.measure_usage(limoe, [{"image": torch.zeros(2, 3, 24, 24), "text": texts}])
    assert usage["blocks.1.mlp"].sum() == 2 * (4 + 1)
    with pytest.raises(ValueError, match="no usage to measure"):
        vmoe.measure_usage(sparse, [])


@pytest.mark.parametrize("num_selected_experts", [1, 2])
@torch.no_grad()
def test_removing_unused_experts_changes_no_output(num_selected_experts):
    model = tiny_vmoe(num_selected_experts=num_selected_experts, normalize_weights=True)
    router = model.blocks[1].mlp.router
    # Experts 1 and 4 are nobody's choice, whatever the token: the others have opposite pairs among them.
    router.weight[[1, 4]] = 0
    router.weight[[2, 3]] = -router.weight[[0, 5]]
    usage = vmoe.measure_usage(model, [images(8)])
    assert usage["blocks.1.mlp"][[1, 4]].sum() == 0
    usage["blocks.1.mlp"][[0, 2, 3, 5]] += 1  # so few images may leave out one of these too
    pruned = vmoe.prune_experts(model, keep=4, usage=usage)
    torch.testing.assert_close(pruned.blocks[1].mlp.router.weight, router.weight[[0, 2, 3, 5]])
    torch.testing.assert_close(pruned(images(8)), model(images(8)), rtol=0, atol=1e-5)
    assert model.blocks[1].mlp.num_experts == 6


@torch.no_grad()
def test_without_normalised_weights_only_the_softmax_changes():
    model = tiny_vmoe(num_selected_experts=1)
    usage = {"blocks.1.mlp": torch.tensor([5.0, 1, 5, 1, 5, 5])}
    pruned = vmoe.prune_experts(model, keep=0.67, usage=usage)
    layer, x = pruned.blocks[1].mlp, torch.randn(2, 5, 32)
    with vmoe.record_routing(pruned) as record:
        pruned(images())
    assert record.layers["blocks.1.mlp"].gates.shape[-1] == 4
    logits = x @ model.blocks[1].mlp.router.weight[[0, 2, 4, 5]].T
    best = logits.softmax(-1).max(-1)
    chosen = torch.tensor([0, 2, 4, 5])[best.indices]
    experts = model.blocks[1].mlp.experts
    for token in range(5):
        row = torch.zeros(6, dtype=torch.long).scatter_(0, chosen[0, token][None], 1)
        expected = best.values[0, token] * experts(x[0, token][None], row)[0]
        torch.testing.assert_close(layer(x)[0, token], expected)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"router": "expert_choice"},
        {"router": "soft"},
        {"router_preset": "deepseek"},
        {"router_preset": "noisy_topk", "num_selected_experts": 2},
    ],
)
@torch.no_grad()
def test_pruned_models_have_files_like_others(settings, tmp_path):
    model = tiny_vmoe(**settings)
    usage = vmoe.measure_usage(model, [images()])
    pruned = vmoe.prune_experts(model, 3, usage)
    save_pretrained(pruned, tmp_path / "m.safetensors")
    again = create_model(pretrained=tmp_path / "m.safetensors").eval()
    assert again.blocks[1].mlp.num_experts == 3
    torch.testing.assert_close(again(images()), pruned(images()), rtol=0, atol=0)
    pruned.train()(images())  # the losses know the new number of experts


@torch.no_grad()
def test_a_pruned_limoe_keeps_its_thresholds_in_range(tmp_path):
    model = create_model("limoe_tiny_patch12_48", depth=2, num_experts=8)
    usage = {"blocks.1.mlp": torch.arange(8)}
    pruned = vmoe.prune_experts(model, 2, usage)
    assert pruned.blocks[1].mlp.losses.min_experts == {"image": 2, "text": 2}
    torch.testing.assert_close(pruned.blocks[1].mlp.experts.fc1.weight, model.blocks[1].mlp.experts.fc1.weight[6:])
    save_pretrained(pruned, tmp_path / "m.safetensors")
    assert create_model(pretrained=tmp_path / "m.safetensors").blocks[1].mlp.num_experts == 2


@torch.no_grad()
def test_virtual_groups_are_removed_as_a_whole():
    dense = create_model("vmoe_tiny_patch8_48", **TINY, num_experts=0).eval()
    sparse = vmoe.upcycle(dense, 6, [1], 2, granularity=2)
    usage = {"blocks.1.mlp": torch.tensor([9, 0, 1, 1, 4, 4])}
    pruned = vmoe.prune_experts(sparse, 4, usage)
    torch.testing.assert_close(pruned(images()), dense(images()), rtol=0, atol=1e-5)
    kept = sparse.blocks[1].mlp.router.weight[[0, 1, 4, 5]]
    torch.testing.assert_close(pruned.blocks[1].mlp.router.weight, kept)
    torch.testing.assert_close(vmoe.densify(pruned).state_dict(), dense.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="in steps of 2"):
        vmoe.prune_experts(sparse, 3, usage)


def test_bad_input_is_one_sentence(sparse):
    usage = vmoe.measure_usage(sparse, [images()])
    for keep in (1, 7, 0, 0.05, 2.5, float("nan"), 1.0):
        with pytest.raises(ValueError, match="does not suit blocks.1.mlp: it needs 2..6"):
            vmoe.prune_experts(sparse, keep, usage)
    with pytest.raises(UpcycleError, match="must be positive for some"):
        vmoe.densify(sparse, "weighted", {"blocks.1.mlp": torch.zeros(6)})
    for how in ("best", 6):
        with pytest.raises(ValueError, match=r"how must be 'average', .* expert of blocks.1.mlp, 0..5, got '?(best|6)"):
            vmoe.densify(sparse, how)
    with pytest.raises(UpcycleError, match="has no sparse layer"):
        vmoe.densify(vmoe.densify(sparse))
    with pytest.raises(UpcycleError, match="has a shared expert"):
        vmoe.densify(tiny_vmoe(num_shared_experts=1))


def test_usage_may_be_any_numbers_and_bad_ones_are_named(sparse):
    expected = vmoe.prune_experts(sparse, 2, {"blocks.1.mlp": torch.tensor([1, 5, 2, 7, 1, 0])}).state_dict()
    for usage in ([1, 5, 2, 7, 1, 0], np.array([1, 5, 2, 7, 1, 0])):
        for keep in (2, 2.0, np.int64(2)):
            pruned = vmoe.prune_experts(sparse, keep, {"blocks.1.mlp": usage})
            torch.testing.assert_close(pruned.state_dict(), expected, rtol=0, atol=0)
        vmoe.densify(sparse, "weighted", {"blocks.1.mlp": usage})
    for usage, message in [
        ({}, "is missing"),
        ({"blocks.1.mlp": torch.ones(4)}, r"must have shape \(6,\)"),
        ({"blocks.1.mlp": [1, 1, float("nan"), 1, 1, 1]}, "must be finite and >= 0"),
        ({"blocks.1.mlp": [1, 1, -1, 1, 1, 1]}, "must be finite and >= 0"),
    ]:
        for function, how in ((vmoe.prune_experts, 2), (vmoe.densify, "weighted")):
            with pytest.raises(UpcycleError, match=f"usage of blocks.1.mlp {message}"):
                function(sparse, how, usage)


# --- two towers ------------------------------------------------------------------------------------------------------

TEXT_SETTINGS = {"depth": 2, "width": 32, "num_heads": 2, "num_experts": 4, "num_selected_experts": 1}
TEXT_SETTINGS |= {"vocab_size": 512, "eot_token_id": 511}
IMAGE_SETTINGS = {key: value for key, value in TINY.items() if key != "num_classes"}


def two_towers(image=None, text=None):
    torch.manual_seed(0)
    image = image if image is TIMM else {**IMAGE_SETTINGS, "num_experts": 8, **(image or {})}
    return create_model("two_tower_tiny_patch8_48", image=image, text={**TEXT_SETTINGS, **(text or {})}).eval()


def pairs():
    return images(), torch.randint(1, 400, (4, 16), generator=torch.Generator().manual_seed(0))


def numbers(model):
    return [module.num_experts for module in model.modules() if isinstance(module, vmoe.SparseMoE)]


@torch.no_grad()
def comes_back(model, file, *inputs):
    save_pretrained(model, file)
    again = create_model(pretrained=file).eval()
    torch.testing.assert_close(again(*inputs), model(*inputs), rtol=0, atol=0)
    return again


DENSE = {"num_experts": 0}
TIMM = {"name": "vit_tiny_patch16_224", **IMAGE_SETTINGS, "patch_size": 8}


@pytest.mark.parametrize(
    ("towers", "upcycle", "expected"),
    [
        ({}, None, [4, 2]),
        ({"image": {"router": "soft"}, "text": {"router": "soft"}}, None, [4, 2]),
        ({"image": DENSE, "text": DENSE}, {"tower": "image"}, [2]),
        ({"image": DENSE, "text": DENSE}, {"tower": "text"}, [2]),
        ({"text": DENSE}, {"tower": "text", "granularity": 2}, [4, 2]),
        ({"image": TIMM, "text": DENSE}, {"tower": "text"}, [2]),
        ({"image": TIMM, "text": DENSE}, {"tower": "both"}, [2, 2]),
    ],
)
def test_each_tower_keeps_its_own_number_of_experts(towers, upcycle, expected, tmp_path):
    model = two_towers(**towers)
    if upcycle is not None:
        model = vmoe.upcycle(model, 4, [1], 2, **upcycle)
    pruned = vmoe.prune_experts(model, 0.5, vmoe.measure_usage(model, [pairs()]))
    assert numbers(comes_back(pruned, tmp_path / "pruned.safetensors", *pairs())) == expected
    dense = vmoe.densify(pruned)
    assert numbers(comes_back(dense, tmp_path / "dense.safetensors", *pairs())) == []
    comes_back(vmoe.upcycle(dense, 2, [1]), tmp_path / "again.safetensors", *pairs())


def test_two_towers_that_one_upcycle_cannot_give_come_back(tmp_path):
    dense = two_towers(TIMM, DENSE)
    sparse = vmoe.upcycle(dense, 4, [1], router="soft")
    pruned = vmoe.prune_experts(sparse, 2, vmoe.measure_usage(sparse, [pairs()]))
    assert numbers(comes_back(pruned, tmp_path / "m.safetensors", *pairs())) == [2, 2]
    twice = vmoe.upcycle(vmoe.upcycle(dense, 4, [1], tower="image"), 2, [1], tower="text")
    assert numbers(comes_back(twice, tmp_path / "m.safetensors", *pairs())) == [4, 2]


# --- dense baselines -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_experts_with_a_width_of_their_own(tmp_path):
    file = tmp_path / "m.safetensors"
    alike = vmoe.densify(tiny_vmoe(expert_width=48, moe_layers="every1"))
    assert comes_back(alike, file, images()).blocks[0].mlp.fc1.out_features == 48
    towers = vmoe.densify(two_towers({"expert_width": 48, "moe_layers": "every1"}))
    assert comes_back(towers, file, *pairs()).visual.blocks[0].mlp.fc1.out_features == 48
    other = vmoe.densify(tiny_vmoe(expert_width=48))
    assert other.blocks[1].mlp.fc1.out_features == 48
    with pytest.raises(ValueError, match="its settings give another model"):
        save_pretrained(other, file)


@pytest.mark.parametrize(
    "settings",
    [
        {"router": "soft", "num_slots": 2},
        {"name": "softmoe_tiny_patch8_48"},
        {"router_preset": "deepseek", "num_shared_experts": 0, "expert_mlp": "mlp"},
    ],
)
@torch.no_grad()
def test_a_dense_baseline_forgets_how_its_experts_were_routed(settings, tmp_path):
    torch.manual_seed(0)
    sparse = create_model(**{"name": "vmoe_tiny_patch8_48", **TINY, "num_experts": 4, **settings}).eval()
    dense = vmoe.densify(sparse)
    comes_back(dense, tmp_path / "dense.safetensors", images())
    again = vmoe.upcycle(dense, 2, [1])
    assert again.blocks[1].mlp.router_type == "top_k"
    comes_back(again, tmp_path / "sparse.safetensors", images())


SWIN = {"name": "swin_moe_tiny_patch4_window4_32", "num_classes": 3}
SIGLINO = {"name": "siglino_moe_0_3b", "img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SIGLINO |= {"head_dim": 16, "num_experts": 4, "num_selected_experts": 2, "expert_width": 16}
SIGLINO |= {"teacher_dims": {"dinov3": 8, "siglip2": 16}}


@pytest.mark.parametrize(
    "settings",
    [
        {"proj_drop_rate": 0.1},
        {"proj_drop_rate": 0.1, "expert_drop": 0.2},
        {"name": "vmoe_naflex_tiny_patch8", "depth": 2, "proj_drop_rate": 0.1, "num_experts": 2},
        SWIN,
        {**SWIN, "mlp_fc2_bias": False, "proj_drop_rate": 0.2},
        {**SIGLINO, "expert_drop": 0.2},
    ],
)
@torch.no_grad()
def test_a_dense_baseline_has_the_dropout_and_biases_of_its_settings(settings, tmp_path):
    sparse = create_model(**{"name": "vmoe_tiny_patch8_48", **(TINY if "name" not in settings else {}), **settings})
    dense = vmoe.densify(sparse.eval())
    comes_back(dense, tmp_path / "m.safetensors", torch.randn(2, *preprocess_config(dense)["input_size"]))


@torch.no_grad()
def test_biases_that_were_trained_are_kept():
    sparse = create_model(**SWIN, mlp_fc2_bias=False)
    sparse.layers[1].blocks[1].mlp.experts.fc2.bias.fill_(0.5)
    assert (vmoe.densify(sparse).layers[1].blocks[1].mlp.fc2.bias == 0.5).all()


def test_an_image_tower_of_another_class_is_dense_by_its_own_settings(tmp_path):
    image, text = {**SIGLINO, "num_classes": 32}, {**TEXT_SETTINGS, "num_classes": 32}
    model = create_model("two_tower_tiny_patch8_48", image=image, text=text, embed_dim=32).eval()
    comes_back(vmoe.densify(model), tmp_path / "m.safetensors", *pairs())


@pytest.mark.parametrize("kind", ["swiglu", "geglu"])
@torch.no_grad()
def test_gated_experts_are_made_dense_and_sparse_again(kind):
    dense = vmoe.densify(tiny_vmoe(expert_mlp=kind))
    again = vmoe.upcycle(dense, 4, [1]).eval()
    assert again.blocks[1].mlp.settings.expert_mlp == kind
    torch.testing.assert_close(again(images()), dense(images()), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="expert_mlp must be left out"):
        vmoe.upcycle(dense, 4, [1], expert_mlp="mlp")


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel])
def test_models_are_taken_out_of_their_wrappers(wrap, tmp_path):
    file, batch = tmp_path / "m.safetensors", pairs()
    sparse = two_towers(text={"expert_width": 24, "moe_layers": "every1"})
    usage = vmoe.measure_usage(sparse, [batch])
    pruned = vmoe.prune_experts(wrap(sparse), 2, usage)
    assert numbers(comes_back(pruned, file, *batch)) == [2, 2, 2]
    dense = comes_back(vmoe.densify(wrap(sparse), "weighted", usage), file, *batch)
    again = vmoe.upcycle(wrap(dense), 4, [1])
    assert again.vmoe_spec == vmoe.upcycle(dense, 4, [1]).vmoe_spec
    comes_back(again, file, *batch)


def test_a_module_of_the_users_is_no_wrapper():
    class Mine(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.extra = create_model("vmoe_tiny_patch8_48", depth=2), torch.nn.Linear(2, 2)

    assert hasattr(vmoe.densify(Mine()), "extra")
