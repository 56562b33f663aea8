"""V-MoE and upcycled ViTs on images of any sizes: padding and other images of the batch change nothing."""

import copy
import pickle

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data.naflex_dataset import NaFlexCollator
from timm.data.naflex_transforms import patchify_image

import vmoe
from vmoe.inspection.forward import patch_grid
from vmoe.models.naflex import from_square

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
P, DENSE = 8, "naflexvit_base_patch16_gap"


def make(name="vmoe_naflex_tiny_patch8", **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL, "num_selected_experts": 2, **kwargs})
    torch.nn.init.normal_(model.head.weight, std=0.1)
    return model.eval()


def upcycled(**kwargs):
    torch.manual_seed(0)
    dense = timm.create_model(DENSE, **SMALL, patch_size=P, init_values=0.1, **kwargs)
    return vmoe.upcycle(dense, 4, layers="every1").eval()


def packed(images, length, fill=0.0):
    """The batch of timm's collator, with other content of the padding."""
    names = ("patches", "patch_coord", "patch_valid")
    batch, _ = NaFlexCollator(length)([(dict(zip(names, patchify_image(image, (P, P)))), 0) for image in images])
    batch["patches"][~batch["patch_valid"]] = fill
    return {name: batch[name] for name in names}


MODELS = {
    "learned": lambda: make(pos_embed="learned"),
    "factorized": lambda: make(pos_embed="factorized", class_token=True, reg_tokens=1, global_pool="map"),
    "rope": lambda: make(pos_embed="rope", class_token=True, global_pool="token"),
    "expert choice": lambda: make(router="expert_choice"),
    "soft": lambda: make(router="soft", pos_embed="rope"),
    "upcycled": upcycled,
    "upcycled rope": lambda: upcycled(pos_embed="none", rope_type="axial", use_key_only_attn_mask=True),
}
grids = st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=2, max_size=2)


@pytest.mark.parametrize("name", MODELS)
def test_an_image_does_not_depend_on_padding_or_others(name):
    model = MODELS[name]()

    @settings(max_examples=3)
    @given(grids, st.integers(0, 9), st.sampled_from([0.0, 1e4, float("nan")]))
    @torch.no_grad()
    def check(sizes, padding, fill):
        images = [torch.randn(3, P * rows, P * columns) for rows, columns in sizes]
        counts = [rows * columns for rows, columns in sizes]
        together = packed(images, max(counts) + padding, fill)
        together["patch_coord"][~together["patch_valid"]] = 9
        logits, features = model(together), model.forward_features(*together.values())["patches"]
        for row, (image, count) in enumerate(zip(images, counts)):
            torch.testing.assert_close(model(packed([image], count))[0], logits[row], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(model(image[None])[0], logits[row], atol=1e-5, rtol=1e-5)
            tokens = model.forward_features(image[None])[0]
            torch.testing.assert_close(tokens, features[row, : len(tokens)], atol=1e-5, rtol=1e-5)

    check()


@pytest.mark.parametrize("make_model", [make, upcycled])
@torch.no_grad()
def test_masks_of_numbers_and_one_mask_for_all_images(make_model):
    batch = packed([torch.randn(3, P * rows, 3 * P) for rows in (2, 2)], 9)
    model = make_model(global_pool="max")
    expected, T = model(batch), 9 + model.num_prefix_tokens
    numbers = {**batch, "patch_valid": batch["patch_valid"].int()}
    torch.testing.assert_close(model(numbers), expected, atol=0, rtol=0)
    real_T = torch.arange(T) < T - 3
    mask = (real_T[:, None] & real_T)[None, None]
    for each in (mask, torch.zeros(mask.shape).masked_fill(~mask, torch.finfo().min)):
        torch.testing.assert_close(model({**batch, "attn_mask": each}), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make_model", [make, upcycled])
def test_capacity_losses_and_gradients_are_of_real_patches_only(make_model):
    model, sizes, found = make_model(), [(3, 5), (1, 2), (6, 4)], []
    images = [torch.randn(3, P * rows, P * columns) for rows, columns in sizes]
    real = sum(rows * columns for rows, columns in sizes) + len(sizes) * model.num_prefix_tokens
    for layer in (module for module in model.modules() if isinstance(module, vmoe.SparseMoE)):
        layer.eval_capacity_factor, layer.capacity_multiple_of = 1.0, 1
    for length, fill, recompute in ((24, 0.0, False), (99, float("nan"), False), (99, 1.0, True)):
        model.set_grad_checkpointing(recompute)
        model.zero_grad()
        with vmoe.record_routing(model) as record:
            (model(packed(images, length, fill)).square().sum() + record.auxiliary_loss()).backward()
        for layer in record.layers.values():
            assert layer.load.max() <= -(-real * 2 // len(layer.load))  # K S / E
            assert layer.metrics["share_dropped"] > 0
        loads = [layer.load for layer in record.layers.values()]
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        found.append([record.auxiliary_loss(), *loads, *(gradient.clone() for gradient in gradients)])
    assert found[0][0] > 0
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[1], found[2], atol=0, rtol=0)


@pytest.mark.parametrize("rope_type", ["none", "axial"])
def test_clusters_of_upcycling_are_of_real_patches_only(rope_type):
    torch.manual_seed(0)
    dense = timm.create_model(DENSE, **SMALL, patch_size=P, init_values=0.1, rope_type=rope_type)
    images, classes, found = [torch.randn(3, P * rows, 3 * P) for rows in (2, 5)], list(map(type, dense.modules())), []
    for length, fill in ((15, 0.0), (40, 1e4), (40, float("nan"))):
        torch.manual_seed(1)
        sparse = vmoe.upcycle(dense, 4, layers="every1", calibration=packed(images, length, fill), cluster_energy=0.9)
        assert list(map(type, dense.modules())) == classes
        found.append({**sparse.state_dict(), **sparse.upcycle_differences})
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-3, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(("pos_embed", "size"), [("learn", (48, 48)), ("rope", (24, 56))])
def test_a_v_moe_of_square_images_is_the_same_function(pos_embed, size):
    square = make("vmoe_tiny_patch8_48", pos_embed=pos_embed, dynamic_img_size=True)
    torch.nn.init.normal_(square.cls_token)
    native = make(pos_embed=pos_embed, class_token=True, global_pool="token")
    image = torch.randn(2, 3, *size)
    expected = square(image)
    native.load_state_dict(from_square(square.state_dict(), native))
    torch.testing.assert_close(native(image), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(square(image), expected)


@torch.no_grad()
def test_files_folders_and_timms_interface(tmp_path):
    image, file = torch.randn(1, 3, 24, 40), tmp_path / "model.safetensors"
    for model in (make(pos_embed="rope"), upcycled()):
        model.reset_classifier(3, "max")
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert getattr(other._forward_embeds, "args", (other,))[0] is other  # and not the model it is a copy of
        vmoe.save_pretrained(model, file)
        assert torch.equal(vmoe.create_model(pretrained=file).eval()(image), model(image))
    vmoe.save_pretrained(vmoe.densify(model), file)  # of timm's classes again
    folder = vmoe.save_hub_folder(model, tmp_path / "upcycled")
    assert torch.equal(timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(image), model(image))
    assert patch_grid(make(class_token=True), 37) == (1, 6, 6)
    maps = timm.create_model("vmoe_naflex_tiny_patch8", features_only=True, out_indices=(1, 5))(image)
    assert [tuple(each.shape) for each in maps] == [(1, 128, 3, 5)] * 2


def test_errors():
    batch = packed([torch.randn(3, P, P)], 4)
    batch["patch_valid"][:] = False
    for model in (make(), upcycled()):
        with pytest.raises(ValueError, match="patch_valid has an image without a real patch: leave such images out"):
            model(batch)
        with pytest.raises(ValueError, match=r"an image of 20 x 7 pixels is smaller than a patch \(8 x 8\)"):
            model(torch.randn(1, 3, 7, 20))
        with pytest.raises(ValueError, match=r"\(1, 4, 192\) is no batch of images .*: patches come with patch_coord"):
            model(batch["patches"])
        with pytest.raises(ValueError, match="20 x 16 pixels does not consist of whole patches"):
            model(torch.randn(1, 3, 16, 20))
    with pytest.raises(ValueError, match="pos_embed must be 'learned', 'factorized', 'rope' or 'none', got 'sincos2d'"):
        make(pos_embed="sincos2d")
    with pytest.raises(ValueError, match="swiglu_mlp cannot be set"):
        make(swiglu_mlp=True)
    for name, value in (("rope_type", "dinov3"), ("rope_temperature", 100.0)):
        with pytest.raises(ValueError, match=f"'rope' is axial, its setting is pos_temperature: leave {name} out"):
            make(pos_embed="rope", **{name: value})
    with pytest.raises(ValueError, match="has no setting 'moe_layer'; did you mean 'moe_layers'"):
        vmoe.create_model("vmoe_naflex_tiny_patch8", moe_layer="last1")
