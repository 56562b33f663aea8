"""Dense models made sparse: the same function at the start, on many architectures; options; files; the optimizer."""

import copy
import pickle

import numpy as np
import open_clip
import pytest
import timm
import torch
from timm.models.metaformer import StarReLU
from timm.optim import create_optimizer_v2
from torch import nn

import vmoe
from vmoe.models.dense_mlp import UpcycleError
from vmoe.models.expert_init import spherical_k_means
from vmoe.models.factory import create_model, save_pretrained

pytestmark = pytest.mark.filterwarnings("ignore:Overwriting")

SMALL = {"embed_dim": 64, "num_heads": 4, "depth": 2, "num_classes": 5}
# timm name: arguments for a small one
TIMM = {
    "vit_tiny_patch16_224": {**SMALL, "img_size": 32},
    "vit_base_patch16_siglip_224": {**SMALL, "img_size": 32},
    "vit_small_patch14_reg4_dinov2": {**SMALL, "img_size": 28},  # registers, LayerScale
    "vit_giant_patch14_reg4_dinov2": {**SMALL, "img_size": 28, "mlp_ratio": 4},  # SwiGLU in one layer
    "vit_small_patch16_dinov3": {**SMALL, "img_size": 32},
    "vit_small_plus_patch16_dinov3": {**SMALL, "img_size": 32},  # SwiGLU in two layers
    "eva02_tiny_patch14_224": {**SMALL, "img_size": 28},
    "eva02_base_patch14_224": {**SMALL, "img_size": 28},  # SwiGLU with a norm
    "deit_tiny_distilled_patch16_224": {**SMALL, "img_size": 32},
    "deit3_small_patch16_224": {**SMALL, "img_size": 32},
    "beit_base_patch16_224": {**SMALL, "img_size": 32},
    "beit3_base_patch16_224": {**SMALL, "img_size": 32},  # Mlp with a norm
    "aimv2_large_patch14_224": {**SMALL, "img_size": 28},
    "hiera_tiny_224": {"img_size": 32, "embed_dim": 32, "stages": (1, 1), "q_pool": 1, "num_classes": 5},
    "naflexvit_base_patch16_gap": SMALL,
    "swin_tiny_patch4_window7_224": {
        **{"img_size": 56, "embed_dim": 32, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8), "num_classes": 5}
    },
}
VISION = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32}
TEXT = {"context_length": 16, "vocab_size": 512, "width": 48, "heads": 4, "layers": 2}
VOCABULARY = {"vocab_size": 512, "eot_token_id": 511}
IMAGE_TEXT = {
    "CLIP": lambda: open_clip.CLIP(32, VISION, TEXT),
    "CLIP, QuickGELU": lambda: open_clip.CLIP(32, VISION, TEXT, quick_gelu=True),
    "CustomTextCLIP": lambda: open_clip.CustomTextCLIP(
        32, {**VISION, "ls_init_value": 0.1}, {**TEXT, "ls_init_value": 0.1}
    ),
    "CustomTextCLIP, norm in the MLP": lambda: open_clip.CustomTextCLIP(
        32, {**VISION, "block_type": "custom", "scale_fc": True}, TEXT
    ),
    "CustomTextCLIP, timm trunk": lambda: open_clip.CustomTextCLIP(
        32,
        {"image_size": 32, "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "timm_proj": None},
        TEXT,
    ),
    "LIMoE": lambda: create_model("limoe_tiny_patch12_48", **BASELINES["limoe_tiny_patch12_48"]),
    "two towers": lambda: create_model("two_tower_tiny_patch12_48", **BASELINES["two_tower_tiny_patch12_48"]),
}
DENSE = {"num_experts": 0, "depth": 2}
BASELINES = {
    "vmoe_tiny_patch8_48": {**DENSE, "num_classes": 5},
    "limoe_tiny_patch12_48": {**DENSE, **VOCABULARY},
    "two_tower_tiny_patch12_48": {"image": DENSE, "text": {**DENSE, **VOCABULARY}},
    "vit_tiny_patch16_224": {**SMALL, "img_size": 48},
}


def trained(model):
    """The model with weights that make a difference, as training leaves them, and not the zeros of fresh heads."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.numel() > 1:
            std = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.data = torch.randn(parameter.shape, generator=generator) * std
    return model.eval()


def images(side=32):
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))


def texts(length=16):
    tokens = torch.randint(1, 510, (3, length), generator=torch.Generator().manual_seed(0))
    tokens[:, 9:] = 0
    tokens[:, 9] = 511
    return tokens


def tiny_vit(**kwargs):
    return trained(timm.create_model("vit_tiny_patch16_224", **{**SMALL, "img_size": 32, **kwargs}))


def routers(model):
    return [name for name, module in model.named_modules() if isinstance(module, vmoe.SparseMoE)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", TIMM)
@torch.no_grad()
def test_timm_models_compute_the_same_when_made_sparse_and_dense_again(name):
    dense, side = trained(timm.create_model(name, **TIMM[name])), TIMM[name].get("img_size", 32)
    before = {key: tensor.clone() for key, tensor in dense.state_dict().items()}
    sparse = vmoe.upcycle(dense, num_experts=3, layers="every1")
    assert type(sparse) is type(dense)
    assert len(routers(sparse)) == (5 if "swin" in name else 2)
    x = images(side)
    expected = dense(x)
    assert expected.std() > 0.01
    torch.testing.assert_close(sparse(x), expected, rtol=0, atol=1e-5)
    assert all(torch.equal(tensor, before[key]) for key, tensor in dense.state_dict().items())
    again = vmoe.densify(sparse)
    assert repr(again) == repr(dense)
    torch.testing.assert_close(again.state_dict(), dense.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(again(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", IMAGE_TEXT)
@pytest.mark.parametrize("tower", ["image", "text", "both"])
@torch.no_grad()
def test_image_text_models_compute_the_same_in_either_tower(name, tower):
    if "timm trunk" in name:
        with pytest.MonkeyPatch.context() as patch:  # open_clip gives no way to make a small trunk
            full = timm.create_model
            patch.setattr(timm, "create_model", lambda *args, **kw: full(*args, **{**kw, "img_size": 32, "depth": 2}))
            dense = trained(IMAGE_TEXT[name]())
    else:
        dense = trained(IMAGE_TEXT[name]())
    if name == "LIMoE" and tower == "text":
        with pytest.raises(ValueError, match="LIMoE has one"):
            vmoe.upcycle(dense, tower=tower)
        return
    sparse = vmoe.upcycle(dense, num_experts=4, layers="every1", tower=tower)
    assert len(routers(sparse)) == (4 if tower == "both" and name != "LIMoE" else 2)
    x = images(48 if name in ("LIMoE", "two towers") else 32)
    torch.testing.assert_close(sparse.encode_image(x), dense.encode_image(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(sparse.encode_text(texts()), dense.encode_text(texts()), rtol=0, atol=1e-5)
    again = vmoe.densify(sparse)
    assert repr(again) == repr(dense)
    torch.testing.assert_close(again.state_dict(), dense.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
@pytest.mark.parametrize("router", ["top_k", "soft"])
@torch.no_grad()
def test_open_clips_models_embed_texts_with_quantized_experts_in_all_blocks(kind, router):
    sparse = vmoe.upcycle(trained(IMAGE_TEXT["CLIP"]()), 4, "every1", router=router)
    small = vmoe.quantize_experts(copy.deepcopy(sparse), kind)
    expected = sparse.encode_text(texts())
    atol = 0.02 * expected.abs().max().item()
    torch.testing.assert_close(small.encode_text(texts()), expected, atol=atol, rtol=0)
    assert small.bfloat16().encode_text(texts()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "granularity", "num_experts", "num_selected_experts"),
    [
        ("vit_tiny_patch16_224", 1, 8, 2),
        ("vit_tiny_patch16_224", 2, 8, 4),
        ("vit_tiny_patch16_224", 4, 8, 8),
        ("eva02_tiny_patch14_224", 3, 9, 3),
    ],
)
@torch.no_grad()
def test_virtual_groups_compute_the_same_in_training(name, granularity, num_experts, num_selected_experts):
    side = TIMM[name]["img_size"]
    dense = trained(timm.create_model(name, **{**TIMM[name], "embed_dim": 96, "mlp_ratio": 4})).train()
    sparse = vmoe.upcycle(
        dense, num_experts, "every1", num_selected_experts, granularity=granularity, capacity_factor=None
    )
    layer = sparse.blocks[1].mlp
    assert layer.experts.fc2.weight.shape == (num_experts, 96, 384 // granularity)
    with vmoe.record_routing(sparse) as record:
        outputs = sparse(images(side))
    torch.testing.assert_close(outputs, dense(images(side)), rtol=0, atol=1e-5)
    chosen = record.layers["blocks.1.mlp"].expert_index.flatten(0, 1).sort(dim=1).values
    groups = chosen.view(len(chosen), -1, granularity)  # whole groups are chosen
    assert (groups // granularity == groups[..., :1] // granularity).all()
    again = vmoe.densify(sparse).state_dict()
    torch.testing.assert_close(again, dense.state_dict(), rtol=2e-7, atol=0)  # a third is no binary fraction


def test_frozen_parameters_dtype_and_dropout_are_kept():
    dense = tiny_vit(proj_drop_rate=0.3, drop_path_rate=0.2).to(torch.bfloat16)
    for parameter in dense.blocks[1].mlp.parameters():
        parameter.requires_grad_(False)
    sparse = vmoe.upcycle(dense, layers="every1")
    assert {tensor.dtype for tensor in sparse.state_dict().values()} == {torch.bfloat16}
    frozen = {name for name, parameter in sparse.named_parameters() if not parameter.requires_grad}
    assert frozen == {f"blocks.1.mlp.experts.{fc}.{kind}" for fc in ("fc1", "fc2") for kind in ("weight", "bias")}
    assert sparse.blocks[0].mlp.experts.drop.p == 0.3
    assert sparse.blocks[1].drop_path2.drop_prob == dense.blocks[1].drop_path2.drop_prob > 0
    assert vmoe.upcycle(dense, layers=[0], expert_drop=0.1).blocks[0].mlp.experts.drop.p == 0.1
    assert sparse(images().bfloat16()).isfinite().all()
    assert {p.requires_grad for p in vmoe.densify(sparse).blocks[1].mlp.parameters()} == {False}


def test_routing_settings_and_presets_reach_the_layers():
    layer = vmoe.upcycle(tiny_vit(), layers=[1], router_preset="dbrx", z_loss=0.5).blocks[1].mlp
    assert (layer.num_experts, layer.num_selected_experts, layer.settings.normalize_weights) == (16, 4, True)
    assert (layer.settings.z_loss, layer.settings.gshard_loss, layer.experts.gated) == (0.5, 0.05, False)
    plain = vmoe.upcycle(tiny_vit(), layers=[1]).blocks[1].mlp.settings
    assert (plain.num_experts, plain.num_selected_experts) == (8, 2)
    assert (plain.capacity_factor, plain.eval_capacity_factor) == (2.0, None)
    # Padding would take the tokens' capacity in open_clip's text tower.
    clip = vmoe.upcycle(trained(IMAGE_TEXT["CLIP"]()), layers=[1])
    assert clip.visual.transformer.resblocks[1].mlp.capacity_factor == 2.0
    assert clip.transformer.resblocks[1].mlp.capacity_factor is None
    assert clip.transformer.resblocks[1].mlp.modalities == ("text",)


def test_a_dense_limoe_gets_the_losses_of_its_own_class():
    dense = create_model("limoe_tiny_patch12_48", num_experts=0, depth=2)
    layer = vmoe.upcycle(dense, num_experts=4, layers=[1], z_loss=0.2).blocks[1].mlp
    real = create_model("limoe_tiny_patch12_48", num_experts=4, depth=2, moe_layers=[1]).blocks[1].mlp
    assert layer.modalities == real.modalities == ("image", "text")
    assert layer.losses.weights == {**real.losses.weights, "z_loss": 0.2}
    assert layer.losses.min_experts == real.losses.min_experts
    assert layer.batch_priority


@pytest.mark.filterwarnings("error")
def test_one_expert_with_normalised_weights_is_warned_of():
    with pytest.warns(UserWarning, match="only the auxiliary losses train the router"):
        sparse = vmoe.upcycle(tiny_vit(), layers=[1], num_selected_experts=1)
    sparse(images()).square().sum().backward()
    assert sparse.blocks[1].mlp.router.weight.grad.abs().max() < 1e-6
    vmoe.upcycle(tiny_vit(), layers=[1], num_selected_experts=1, normalize_weights=False)


def test_noise_and_drop_upcycling_make_experts_differ_by_what_was_asked():
    dense = tiny_vit()
    weight = dense.blocks[1].mlp.fc1.weight.detach()
    noisy = vmoe.upcycle(dense, layers=[1], expert_noise=0.1).blocks[1].mlp.experts.fc1.weight.detach()
    difference = (noisy - weight).flatten(1)
    torch.testing.assert_close(difference.std(dim=1) / weight.std(), torch.full((8,), 0.1), rtol=0.05, atol=0)
    assert not torch.equal(noisy[0], noisy[1])

    experts = vmoe.upcycle(dense, layers=[1], reinit=0.25).blocks[1].mlp.experts
    fresh = (experts.fc1.weight != weight).all(dim=2)  # (E, F)
    assert fresh.sum(dim=1).tolist() == [64] * 8
    assert ((experts.fc1.weight != weight).any(dim=2) == fresh).all()
    assert not torch.equal(fresh[0], fresh[1])
    changed = experts.fc2.weight != dense.blocks[1].mlp.fc2.weight  # (E, D, F)
    assert (changed.all(dim=1) == fresh).all()
    assert (changed.any(dim=1) == fresh).all()
    for expert in range(8):
        old, new = weight[fresh[expert]], experts.fc1.weight[expert][fresh[expert]]
        torch.testing.assert_close(new.std(), old.std(), rtol=0.1, atol=0)
    gated = timm.create_model("eva02_tiny_patch14_224", **TIMM["eva02_tiny_patch14_224"])
    experts, original = (vmoe.upcycle(gated, 2, [1], reinit=r).blocks[1].mlp.experts for r in (0.5, 0))
    gate, value = (experts.fc1.weight != original.fc1.weight).all(dim=2).chunk(2, dim=1)
    assert torch.equal(gate, value)  # gate and value of a unit are drawn again together


def test_models_without_known_mlps_are_named():
    for model, message in [
        (timm.create_model("resnet10t"), "ResNet has no blocks with an `.mlp`"),
        (timm.create_model("vit_base_patch16_xp_224", **SMALL), "VisionTransformer has no blocks"),
        (timm.create_model("convnext_atto"), "ConvNeXt.stages.3.blocks.1.mlp: the layer fc1 of an MLP is a Conv"),
        (vmoe.upcycle(tiny_vit(), layers=[1]), "is sparse already"),
    ]:
        with pytest.raises(UpcycleError, match=message):
            vmoe.upcycle(model, layers="last1")
    odd = tiny_vit()
    odd.blocks[1].mlp = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    with pytest.raises(UpcycleError, match="blocks.1.mlp: an MLP of class Sequential"):
        vmoe.upcycle(odd, layers=[1])


@pytest.mark.parametrize("options", [{}, {"granularity": 2}, {"router": "expert_choice"}, {"router": "soft"}])
@pytest.mark.parametrize("name", BASELINES)
@torch.no_grad()
def test_files_of_upcycled_models_are_all_that_is_needed(name, options, tmp_path):
    dense = trained(create_model(name, **BASELINES[name]))
    sparse = vmoe.upcycle(dense, num_experts=4, layers=(1,), reinit=0.5, **options)
    save_pretrained(sparse, tmp_path / "m.safetensors")
    again = create_model(pretrained=tmp_path / "m.safetensors").eval()
    inputs = (images(48),) if "vmoe" in name or "vit" in name else (images(48), texts())
    torch.testing.assert_close(again(*inputs), sparse(*inputs), rtol=0, atol=0)
    # What is given in the call goes over the file's, for routing settings as for others.
    if name == "vit_tiny_patch16_224" and not options:
        other = create_model(pretrained=tmp_path / "m.safetensors", capacity_factor=5.0, num_classes=7)
        assert other.blocks[1].mlp.capacity_factor == 5.0
        assert other.head.out_features == 7


def test_timm_models_by_timm_are_saved_if_their_name_says_all(tmp_path):
    plain = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3)
    save_pretrained(plain, tmp_path / "m.safetensors")
    again = create_model(pretrained=tmp_path / "m.safetensors")
    torch.testing.assert_close(again.state_dict(), plain.state_dict(), rtol=0, atol=0)
    save_pretrained(vmoe.upcycle(plain, num_experts=2, layers=[1]), tmp_path / "m.safetensors")
    assert create_model(pretrained=tmp_path / "m.safetensors").blocks[1].mlp.num_experts == 2
    other = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, act_layer="relu")  # the same shapes
    save_pretrained(vmoe.upcycle(other, layers=[1]), tmp_path / "m.safetensors")
    assert isinstance(create_model(pretrained=tmp_path / "m.safetensors").blocks[1].mlp.experts.act, nn.ReLU)
    other.blocks[0].mlp.act = nn.SiLU()
    with pytest.raises(ValueError, match="not made by vmoe.create_model"):
        save_pretrained(vmoe.upcycle(other, layers=[1]), tmp_path / "m.safetensors")


@torch.no_grad()
def test_models_whose_pooling_is_a_layer():
    torch.manual_seed(0)
    plain = timm.create_model("nest_tiny", img_size=64).eval()
    sparse = vmoe.upcycle(plain, num_experts=2, layers=[3])
    torch.testing.assert_close(sparse(images(64)), plain(images(64)), rtol=0, atol=1e-5)


def test_wrong_settings_are_named():
    dense = tiny_vit()
    for kwargs, message in [
        ({"layers": "last9"}, "layers='last9' asks for more"),
        ({"layers": []}, "layers chooses no block"),
        ({"layers": 3}, "layers must be a word such as 'last2' or a list, got 3"),
        ({"layers": [1.5]}, "layers must lie in 0..1, .*, got .1.5"),
        ({"tower": "audio"}, "tower must be one of"),
        ({"num_expert": 4}, "upcycle has no setting 'num_expert'"),
        ({"num_experts": 4.5}, "num_experts must be a whole number"),
        ({"reinit": 1.5}, "reinit must be 0..1"),
        ({"reinit": "a"}, "reinit must be 0..1, got 'a'"),
        ({"expert_noise": -1}, "expert_noise must be a number >= 0"),
        ({"expert_noise": "a"}, "expert_noise must be a number >= 0 and finite, got 'a'"),
        ({"expert_mlp": "swiglu"}, "must be left out, since the model's MLPs are 'mlp'"),
        ({"granularity": 3}, "must divide the hidden width 256"),
        ({"granularity": 2, "num_experts": 7}, "num_experts must be a multiple of granularity"),
        ({"granularity": 2, "num_experts": "4"}, "num_experts must be a multiple of granularity .2., got '4'"),
        ({"granularity": 2, "num_selected_experts": 3}, "num_selected_experts must be a multiple of granularity"),
        ({"granularity": 2, "router": "soft"}, "needs router='top_k'"),
        ({"granularity": 0}, "granularity must be a whole number >= 1"),
        ({"granularity": "2"}, "granularity must be a whole number >= 1, got '2'"),
    ]:
        with pytest.raises(ValueError, match=message):
            vmoe.upcycle(dense, **{"layers": [1], **kwargs})
    normed = timm.create_model("eva02_base_patch14_224", **TIMM["eva02_base_patch14_224"])
    with pytest.raises(UpcycleError, match="cannot split an MLP that normalises"):
        vmoe.upcycle(normed, layers=[1], granularity=2)


def test_layers_may_be_any_whole_numbers(tmp_path):
    dense = create_model("vit_tiny_patch16_224", **SMALL, img_size=32)
    for layers in (np.array([1]), range(1, 2), {1}):
        sparse = vmoe.upcycle(dense, 4, layers, 2, granularity=2)
        assert isinstance(sparse.blocks[1].mlp, vmoe.SparseMoE)
        save_pretrained(sparse, tmp_path / "m.safetensors")
        assert create_model(pretrained=tmp_path / "m.safetensors").blocks[1].mlp.num_experts == 4
    for word in ("moe_layers", "layers"):
        with pytest.raises(ValueError, match=f"whose sparse layers are fixed: leave {word} out"):
            create_model(pretrained=tmp_path / "m.safetensors", **{word: [0]})


# --- the optimizer ---------------------------------------------------------------------------------------------------


def adam(model, **kwargs):
    decay = [p for p in model.parameters() if p.ndim > 1 and p.requires_grad]
    rest = [p for p in model.parameters() if p.ndim <= 1 and p.requires_grad]
    groups = [{"params": rest, "weight_decay": 0.0}, {"params": decay}]
    return torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1, **kwargs)


def step(model, optimizer):
    optimizer.zero_grad()
    model(images()).square().mean().backward()
    optimizer.step()


def without_key_bias(key, tensor):
    """It moves all scores of a query alike, so its gradient is zero, and Adam steps along the rounding of that."""
    return torch.cat(tensor.chunk(3)[::2]) if key.endswith("qkv.bias") else tensor


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_plus_patch16_dinov3"])
def test_adam_goes_on_as_before(name):
    dense = trained(timm.create_model(name, **TIMM[name]))
    optimizer = adam(dense)
    for _ in range(3):
        step(dense, optimizer)
    sparse = vmoe.upcycle(dense, num_experts=2, layers=[1], num_selected_experts=2)
    new = adam(sparse)
    vmoe.upcycle_optimizer(optimizer, dense, sparse, new)
    experts, layout = sparse.blocks[1].mlp.experts, sparse.blocks[1].mlp.upcycled_from.layout
    for key in ("exp_avg", "exp_avg_sq"):
        for parameter in (experts.fc1.weight, experts.fc2.bias):
            assert new.state[parameter][key].shape == parameter.shape
        first = [optimizer.state[dense.blocks[1].mlp.get_parameter(f"{fc}.weight")][key] for fc in layout.fc1]
        torch.testing.assert_close(new.state[experts.fc1.weight][key][1], torch.cat(first))
    assert new.state[experts.fc2.weight]["step"] == 3
    assert sparse.blocks[1].mlp.router.weight not in new.state
    step(dense, optimizer)
    step(sparse, new)
    # Outside the experts (which share the gradient among them) the next step is the same.
    own = dict(dense.named_parameters())
    for key, parameter in sparse.named_parameters():
        if key in own:
            found, expected = without_key_bias(key, parameter), without_key_bias(key, own[key])
            torch.testing.assert_close(
                found, expected, rtol=1e-4, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}"
            )
    assert new.state[sparse.head.weight]["exp_avg"] is not optimizer.state[dense.head.weight]["exp_avg"]


def test_optimizers_that_cannot_go_on_say_so():
    dense = tiny_vit()
    sparse = vmoe.upcycle(dense, layers=[1])
    optimizer = adam(dense)
    with pytest.raises(UpcycleError, match="made no step yet"):
        vmoe.upcycle_optimizer(optimizer, dense, sparse, adam(sparse))
    step(dense, optimizer)
    with pytest.raises(UpcycleError, match="state of AdamW is of no use to SGD"):
        vmoe.upcycle_optimizer(optimizer, dense, sparse, torch.optim.SGD(sparse.parameters(), lr=0.1))
    factored = torch.optim.Adafactor(dense.parameters())
    step(dense, factored)
    with pytest.raises(UpcycleError, match="not one number per weight"):
        vmoe.upcycle_optimizer(factored, dense, sparse, torch.optim.Adafactor(sparse.parameters()))
    with pytest.raises(UpcycleError, match="AdamW with amsgrad needs state that the dense model's AdamW does not"):
        vmoe.upcycle_optimizer(optimizer, dense, sparse, adam(sparse, amsgrad=True))
    sgd = torch.optim.SGD(dense.parameters(), lr=0.1)
    step(dense, sgd)
    with pytest.raises(UpcycleError, match="keeps none"):
        vmoe.upcycle_optimizer(sgd, dense, sparse, torch.optim.SGD(sparse.parameters(), lr=0.1))
    frozen = copy.deepcopy(dense)
    frozen.blocks[1].mlp.requires_grad_(False)
    optimizer = adam(frozen)
    step(frozen, optimizer)
    carried = adam(sparse)
    vmoe.upcycle_optimizer(optimizer, frozen, sparse, carried)
    assert sparse.blocks[1].mlp.experts.fc1.weight not in carried.state
    assert sparse.blocks[0].mlp.fc1.weight in carried.state


def settings_of(model, **kwargs):
    """{name: (weight decay, factor on the learning rate)} in timm's optimizer."""
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.1, **kwargs)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [(group["weight_decay"], group.get("lr_scale")) for group in optimizer.param_groups]
    return {names[id(p)]: group for group, g in zip(groups, optimizer.param_groups, strict=True) for p in g["params"]}


PIT = {"base_dims": [16] * 3, "depth": [2, 1, 1], "heads": [2, 2, 2]}  # has no group_matcher


@pytest.mark.parametrize(
    "make",
    [
        *(pytest.param(lambda name=name: timm.create_model(name, **TIMM[name]), id=name)
          for name in ("vit_tiny_patch16_224", "eva02_base_patch14_224", "beit3_base_patch16_224",
                       "vit_giant_patch14_reg4_dinov2", "swin_tiny_patch4_window7_224")),
        pytest.param(lambda: timm.create_model("pit_ti_224", **PIT), id="pit_ti_224"),
        *(pytest.param(IMAGE_TEXT[name], id=name)
          for name in ("CLIP", "CustomTextCLIP, norm in the MLP", "LIMoE", "two towers")),
        pytest.param(lambda: create_model(
            "two_tower_tiny_patch12_48", image={"name": "vit_tiny_patch16_224", **SMALL, "num_classes": 128},
            text={**DENSE, **VOCABULARY},
        ), id="two towers, timm's image tower"),
    ],
)  # fmt: skip
def test_timms_optimizers_treat_experts_as_the_mlps_before(make):
    dense = make()
    sparse = vmoe.upcycle(dense, num_experts=3, layers="every1")
    for kwargs in ({}, {"layer_decay": 0.5}):
        before, now = settings_of(dense, **kwargs), settings_of(sparse, **kwargs)
        assert settings_of(copy.deepcopy(sparse), **kwargs) == now
        assert settings_of(pickle.loads(pickle.dumps(sparse)), **kwargs) == now
        assert settings_of(vmoe.densify(sparse), **kwargs) == before
        assert {name: now[name] for name in now.keys() & before.keys()} == {
            name: before[name] for name in now.keys() & before.keys()
        }
        for name in routers(sparse):
            layout = sparse.get_submodule(name).upcycled_from.layout
            for part, own in (("fc1", layout.fc1[0]), ("norm", layout.norm), ("fc2", layout.fc2)):
                for kind in ("weight", "bias"):
                    assert now.get(f"{name}.experts.{part}.{kind}") == before.get(f"{name}.{own}.{kind}"), (name, part)
            assert now[f"{name}.router.weight"] == before[f"{name}.{layout.fc2}.weight"]


def test_files_of_upcycled_models_keep_their_parameter_groups(tmp_path):
    sparse = vmoe.upcycle(create_model("pit_ti_224", **PIT), 2, "every1", router="soft", num_slots=3)
    save_pretrained(sparse, tmp_path / "m.safetensors")
    again = create_model(pretrained=tmp_path / "m.safetensors")
    for kwargs in ({}, {"layer_decay": 0.5}):
        assert settings_of(again, **kwargs) == settings_of(sparse, **kwargs)
    assert settings_of(again)["transformers.0.blocks.1.mlp.router.slots"][0] == 0


@pytest.mark.parametrize("act", ["prelu", StarReLU])
@pytest.mark.parametrize("options", [{}, {"granularity": 2}, {"num_shared_experts": 1}])
def test_learned_activations_stay_and_learn(act, options):
    dense = tiny_vit(act_layer=act)
    numbers = dict(dense.blocks[1].mlp.act.named_parameters())
    with torch.no_grad():
        for parameter in numbers.values():
            parameter.add_(0.3)
    dense.blocks[0].mlp.act.requires_grad_(False)
    sparse = vmoe.upcycle(dense, num_experts=4, layers="every1", capacity_factor=None, **options)
    x = images()
    torch.testing.assert_close(sparse(x), dense(x), rtol=0, atol=1e-5)
    dense(x).square().sum().backward()
    sparse(x).square().sum().backward()
    experts = sparse.blocks[1].mlp.experts
    for name, parameter in numbers.items():
        own = experts.act.get_parameter(name)
        torch.testing.assert_close(own.grad, parameter.grad, rtol=1e-3, atol=1e-4)
        assert own.data_ptr() != parameter.data_ptr()
    assert not any(p.requires_grad for p in sparse.blocks[0].mlp.experts.act.parameters())
    if not options.get("num_shared_experts"):
        with torch.no_grad():
            for parameter in experts.act.parameters():
                parameter.mul_(2)
        again = vmoe.densify(sparse)
        assert repr(again) == repr(dense)
        for name, parameter in again.blocks[1].mlp.act.named_parameters():
            torch.testing.assert_close(parameter, 2 * numbers[name], rtol=0, atol=0)
            assert parameter.data_ptr() != experts.act.get_parameter(name).data_ptr()
        torch.testing.assert_close(again(x), sparse(x), rtol=0, atol=1e-5)


def test_files_and_optimizers_of_learned_activations(tmp_path):
    torch.manual_seed(0)
    dense = create_model("vit_tiny_patch16_224", **SMALL, img_size=32, act_layer="prelu")
    optimizer = adam(dense)
    step(dense, optimizer)
    sparse = vmoe.upcycle(dense, num_experts=2, layers=[1])
    new = adam(sparse)
    vmoe.upcycle_optimizer(optimizer, dense, sparse, new)
    state = new.state[sparse.blocks[1].mlp.experts.act.weight]
    assert torch.equal(state["exp_avg"], optimizer.state[dense.blocks[1].mlp.act.weight]["exp_avg"])
    step(sparse, new)
    assert sparse.blocks[1].mlp.experts.act.weight != dense.blocks[1].mlp.act.weight
    save_pretrained(sparse, tmp_path / "m.safetensors")
    again = create_model(pretrained=tmp_path / "m.safetensors").eval()
    assert torch.equal(again(images()), sparse.eval()(images()))
    sparse = vmoe.upcycle(dense, num_experts=4, layers=[1])
    smaller = vmoe.prune_experts(sparse, 2, {"blocks.1.mlp": [1, 0, 1, 0]})
    assert torch.equal(smaller.blocks[1].mlp.experts.act.weight, sparse.blocks[1].mlp.experts.act.weight)


def test_activations_with_a_number_for_each_channel_are_named():
    message = "the activation PReLU of an MLP learns a number for each channel"
    with pytest.raises(UpcycleError, match=f"blocks.1.mlp: {message}"):
        vmoe.upcycle(tiny_vit(act_layer=lambda: nn.PReLU(256)), layers=[1])
    native = create_model("vmoe_tiny_patch8_48", depth=2, act_layer=lambda: nn.PReLU(512))
    with pytest.raises(UpcycleError, match=message):
        vmoe.densify(native)


def siblings(dense):
    """A dense model, and two others that differ from it in their MLPs alone."""
    models = [dense, copy.deepcopy(dense), copy.deepcopy(dense)]
    for name, parameter in [pair for model in models[1:] for pair in model.named_parameters()]:
        if ".mlp." in name and ".act." not in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return models


@pytest.mark.parametrize(("name", "G"), [("vit_tiny_patch16_224", 2), ("eva02_base_patch14_224", 1), ("CLIP", 1)])
@torch.no_grad()
def test_each_of_several_models_gives_experts(name, G, tmp_path):
    models = siblings(trained(IMAGE_TEXT[name]() if name in IMAGE_TEXT else timm.create_model(name, **TIMM[name])))
    before = [copy.deepcopy(model.state_dict()) for model in models]
    sparse = vmoe.upcycle(models=models, num_experts=6 * G, granularity=G)
    for expert in (0, 3, 5):
        torch.testing.assert_close(vmoe.densify(sparse, expert).state_dict(), before[expert // 2], rtol=0, atol=0)
    assert len(routers(sparse)) == (4 if name == "CLIP" else 2)
    assert vmoe.upcycle(nn.ModuleList(models)).get_submodule(routers(sparse)[0]).num_experts == 3
    if name != "CLIP":
        save_pretrained(sparse, tmp_path / "m.safetensors")
        x = images(TIMM[name]["img_size"])
        assert torch.equal(create_model(pretrained=tmp_path / "m.safetensors").eval()(x), sparse(x))


def test_several_models_that_differ_elsewhere_are_refused():
    a, b, c = siblings(tiny_vit(act_layer="prelu"))
    with torch.no_grad():
        c.blocks[0].mlp.act.weight.add_(1)
    for models, settings, message in [
        ([a, b, c], {}, r"models\[2\] differs from models\[0\] in blocks.0.mlp.act.weight, but may"),
        ([a, b], {"layers": [1]}, r"models\[1\] differs from models\[0\] in blocks.0.mlp.fc1.weight, but may"),
        ([a, copy.deepcopy(b).double()], {}, r"models\[1\] has torch.float64, not torch.float32 as models\[0\]"),
        ([a, vmoe.upcycle(b, layers=[1])], {}, r"models\[1\] is sparse; make it dense first with vmoe.densify"),
        ([a, tiny_vit(drop_path_rate=0.3, act_layer="prelu")], {}, r"models\[1\] is not .*model.kwargs.drop_path_rate"),
        (
            [a, tiny_vit(num_heads=2, act_layer="prelu")],
            {},
            r"models\[1\] is not .*: num_heads of .* is 2 instead of 4",
        ),
        ([a, b], {"num_experts": 6, "granularity": 2}, r"granularity \(2\) times the number of models \(2\), got 6"),
        ([a, b], {"calibration": images()}, "calibration clusters what one model sees, and there are 2"),
        ([], {}, r"models must be a model, or a list of some, got \[\]"),
        (None, {}, r"got \['NoneType'\]"),
        ([a, b.state_dict()], {}, r"got \['OrderedDict', 'VisionTransformer'\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            vmoe.upcycle(models, **settings)


def test_k_means_finds_the_directions_that_are_there():
    direction_CD, cluster_N = torch.linalg.qr(torch.randn(8, 8)).Q[:5], torch.arange(500) % 5
    x_ND = (torch.rand(500, 1) * 9 + 1) * (direction_CD[cluster_N] + 0.1 * torch.randn(500, 8))
    centroid_CD = spherical_k_means(x_ND, 5)
    torch.testing.assert_close(centroid_CD.norm(dim=1), torch.ones(5))
    found_N = (x_ND @ centroid_CD.T).argmax(1)
    assert len(set(zip(found_N.tolist(), cluster_N.tolist()))) == 5  # one found cluster for each
    with pytest.raises(ValueError, match="fewer than 6 different tokens"):
        spherical_k_means(direction_CD[cluster_N], 6)


@torch.no_grad()
def test_copies_with_centroids_as_router_compute_the_same():
    dense = trained(IMAGE_TEXT["CLIP"]())
    batch = {"image": torch.randn(32, 3, 32, 32), "text": torch.randint(1, 512, (32, 16))}
    sparse = vmoe.upcycle(dense, 8, "every1", 4, granularity=2, calibration=batch, cluster_energy=1)
    assert len(sparse.upcycle_differences) == 5  # of two blocks in each tower, and the output
    assert max(sparse.upcycle_differences.values()) < 1e-5
    with vmoe.record_routing(sparse) as record:
        sparse(*batch.values())
    for call in record.layers.values():
        assert call.load.min() > 0  # no cluster is empty


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_base_patch14_224"])  # SwiGLU with a norm
@torch.no_grad()
def test_an_expert_is_the_lowest_rank_that_keeps_the_energy_on_its_cluster(name):
    dense, seen = trained(timm.create_model(name, **TIMM[name])), []
    x = torch.randn(96, 3, TIMM[name]["img_size"], TIMM[name]["img_size"])
    sparse, closer = (vmoe.upcycle(dense, 4, [1], calibration=x, cluster_energy=share) for share in (0.9, 0.97))
    mlp, layer = dense.blocks[1].mlp, sparse.blocks[1].mlp
    mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    expected = dense(x)
    cluster_N = (seen[0] @ layer.router.weight.T).argmax(1)
    weight_OI = (torch.cat([mlp.fc1_g.weight, mlp.fc1_x.weight]) if "eva" in name else mlp.fc1.weight).double()
    for expert in range(4):
        x_IN = seen[0][cluster_N == expert].T.double()
        energies = torch.linalg.svdvals(weight_OI @ x_IN).square()
        rank = int((energies.cumsum(0) < 0.9 * energies.sum()).sum()) + 1
        own_OI = layer.experts.fc1.weight[expert].double()
        assert torch.linalg.matrix_rank(own_OI, rtol=1e-4) == rank < 64
        lost = ((own_OI - weight_OI) @ x_IN).square().sum()  # what no matrix of this rank can keep
        torch.testing.assert_close(lost, energies[rank:].sum(), rtol=1e-3, atol=0)
        assert torch.linalg.matrix_rank(layer.experts.fc2.weight[expert], rtol=1e-4) < 64
    far, theirs = sparse.upcycle_differences, mlp(seen[0])
    assert far["blocks.1.mlp"] == pytest.approx(float((layer(seen[0]) - theirs).norm() / theirs.norm()), rel=1e-4)
    assert far["output"] == pytest.approx(float((sparse(x) - expected).norm() / expected.norm()), rel=1e-4)
    assert 0.05 < closer.upcycle_differences["blocks.1.mlp"] < 0.7 * far["blocks.1.mlp"]


@torch.no_grad()
def test_routers_of_whole_images_start_from_clusters_of_their_means():
    dense, seen = tiny_vit(), []
    colour_C3 = 2 * torch.eye(3)
    x = colour_C3.repeat(8, 1)[:, :, None, None] + 0.1 * torch.randn(24, 3, 32, 32)
    sparse = vmoe.upcycle(
        dense, 3, [1], 1, per_image=True, normalize_weights=False, calibration=x, capacity_factor=None
    )
    mlp, layer = dense.blocks[1].mlp, sparse.blocks[1].mlp
    mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    dense(x)
    with vmoe.record_routing(sparse) as record:
        sparse(x)
    expert_BT = record.layers["blocks.1.mlp"].expert_index.view(24, -1)
    assert (expert_BT == expert_BT[:3, :1].repeat(8, 1)).all()  # each colour has an expert of its own
    assert expert_BT.unique().tolist() == [0, 1, 2]
    mean_BD = torch.nn.functional.normalize(seen[0].mean(1), dim=1)
    for expert in range(3):
        own_BD = mean_BD[expert_BT[:, 0] == expert]
        expected = torch.nn.functional.normalize(own_BD.sum(0), dim=0)
        torch.testing.assert_close(layer.router.weight[expert], expected, rtol=0, atol=1e-5)
    far, theirs = sparse.upcycle_differences["blocks.1.mlp"], mlp(seen[0])
    assert far == pytest.approx(float((layer(seen[0]) - theirs).norm() / theirs.norm()), rel=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: x[:0], r"images must be \(B, C, H, W\) with B > 0, got \(0, 3, 32, 32\)"),
        (lambda x: x[0], r"B > 0, got \(3, 32, 32\)"),
        (list, r"B > 0, got \(3, 32, 32\)"),
        (lambda x: (x[0], 1), r"B > 0, got \(3, 32, 32\)"),
        (lambda x: {"image": x[0]}, r"B > 0, got \(3, 32, 32\)"),
        (lambda x: [x, torch.zeros(3)], r"B > 0, got \(3,\)"),
        (lambda x: x.to(torch.uint8), "images must be floating point, .* got torch.uint8"),
        (lambda x: x.numpy(), "a batch must be a tensor, tuple or mapping, got ndarray"),
        (lambda x: "data", "got str"),
        (lambda x: 512, "got int"),
        (lambda x: {"image": x.numpy()}, "got ndarray"),
        (lambda x: {"pixel_values": x}, r"must have 'image', 'text' or 'patches', got the keys \['pixel_values'\]"),
    ],
)
def test_a_calibration_in_another_form_is_refused(make, message):
    with pytest.raises(ValueError, match=f"^calibration: .*{message}"):
        vmoe.upcycle(tiny_vit(), 4, [1], calibration=make(images()))


def test_a_calibration_takes_the_dtype_of_the_model():
    dense = tiny_vit().bfloat16()
    for batch in (images(), (images(), torch.zeros(3)), {"image": images().double()}, [[images(), torch.zeros(3)]]):
        far = vmoe.upcycle(dense, 4, [1], calibration=batch, cluster_energy=1).upcycle_differences
        assert max(far.values()) < 0.02


def test_what_cannot_be_clustered_is_refused_and_zeros_are_left_out():
    dense = tiny_vit()
    for settings, message in [
        ({"calibration": []}, "calibration is empty"),
        ({"calibration": [(images()[:1] * 0, torch.zeros(1))]}, "blocks.1.mlp sees fewer than 64"),  # with labels
        ({"calibration": [images(), images() * float("nan")]}, "blocks.1.mlp sees values that are not finite"),
        ({"calibration": images(), "router": "expert_choice"}, "needs router='top_k' and a linear gate"),
        ({"calibration": images(), "cluster_energy": 0}, "cluster_energy must be above 0 and at most 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            vmoe.upcycle(dense, 64, [1], **settings)
    with pytest.raises(ValueError, match="does not reach transformer.resblocks.0.mlp; give images and texts"):
        vmoe.upcycle(IMAGE_TEXT["CLIP"](), 4, "every1", calibration=images())
    nn.init.zeros_(dense.head.weight)
    nn.init.zeros_(dense.head.bias)
    assert vmoe.upcycle(dense, 4, [1], calibration=images()).upcycle_differences.keys() == {"blocks.1.mlp"}
