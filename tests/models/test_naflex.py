"""V-MoE and upcycled ViTs on images of any sizes: padding and other images of the batch change nothing."""

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data.naflex_dataset import NaFlexCollator
from timm.data.naflex_transforms import patchify_image
from timm.models.naflexvit import checkpoint_filter_fn

import vmoe
from vmoe.inspection.forward import patch_grid

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5, "num_selected_experts": 2}
P = 8


def make(name="vmoe_naflex_tiny_patch8", **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL, **kwargs})
    torch.nn.init.normal_(model.head.weight, std=0.1)
    return model.eval()


def packed(images, length, fill=0.0):
    """The batch of timm's collator, with other content of the padding."""
    names = ("patches", "patch_coord", "patch_valid")
    batch, _ = NaFlexCollator(length)([(dict(zip(names, patchify_image(image, (P, P)))), 0) for image in images])
    batch["patches"][~batch["patch_valid"]] = fill
    return batch


def upcycled(**kwargs):
    torch.manual_seed(0)
    dense = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": P, "num_classes": 5, "init_values": 0.1}
    model = timm.create_model("naflexvit_base_patch16_gap", **dense, **kwargs)
    return vmoe.upcycle(model, 4, layers="every1", eval_capacity_factor=float("inf")).eval()


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
        if not name.startswith("upcycled"):
            together["patch_coord"][~together["patch_valid"]] = 9
        logits, features = model(together), model.forward_features(*list(together.values())[:3])["patches"]
        for row, (image, count) in enumerate(zip(images, counts)):
            torch.testing.assert_close(model(packed([image], count))[0], logits[row], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(model(image[None])[0], logits[row], atol=1e-5, rtol=1e-5)
            tokens = model.forward_features(image[None])[0]
            torch.testing.assert_close(tokens, features[row, : len(tokens)], atol=1e-5, rtol=1e-5)

    check()


@pytest.mark.parametrize("make_model", [make, upcycled])
def test_capacity_and_losses_count_real_patches_only(make_model):
    model = make_model()
    sizes = [(3, 5), (1, 2), (6, 4)]
    images = [torch.randn(3, P * rows, P * columns) for rows, columns in sizes]
    real = sum(rows * columns for rows, columns in sizes) + len(sizes) * model.num_prefix_tokens
    for layer in (module for module in model.modules() if isinstance(module, vmoe.SparseMoE)):
        layer.eval_capacity_factor, layer.capacity_multiple_of = 1.0, 1
    records = []
    for batch in (packed(images, 24), packed(images, 200, float("nan"))):
        with torch.no_grad(), vmoe.record_routing(model) as record:
            model(batch)
        records.append(record)
    for ours, theirs in zip(*(record.layers.values() for record in records), strict=True):
        assert ours.load.max() <= -(-real * 2 // len(ours.load))  # K S / E
        assert torch.equal(ours.load, theirs.load)
        assert 0 < ours.metrics["share_dropped"] == pytest.approx(theirs.metrics["share_dropped"])
    losses = [record.auxiliary_loss() for record in records]
    assert losses[0] > 0
    torch.testing.assert_close(*losses)


def test_gradients_are_those_of_the_real_patches():
    model = make(pos_embed="rope", drop_path_rate=0.0, noise_std=0.0).train()
    images, gradients = [torch.randn(3, P * 3, P * 2), torch.randn(3, P, P * 5)], []
    for length, recompute in ((6, False), (30, False), (30, True)):
        model.set_grad_checkpointing(recompute)
        model.zero_grad()
        with vmoe.record_routing(model) as record:
            loss = model(packed(images, length, float(length > 6))).square().sum() + record.auxiliary_loss()
        loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)
    assert all(torch.equal(value, gradients[2][name]) for name, value in gradients[1].items())


def test_a_v_moe_with_rope_is_the_same_function(tmp_path):
    square = make("vmoe_tiny_patch8_48", pos_embed="rope", dynamic_img_size=True)
    native = make(pos_embed="rope", class_token=True, global_pool="token")
    native.load_state_dict(checkpoint_filter_fn(square.state_dict(), native))
    for size in ((48, 48), (24, 56)):
        image = torch.randn(2, 3, *size)
        torch.testing.assert_close(native(image), square(image), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_files_folders_and_timms_interface(tmp_path):
    image = torch.randn(1, 3, 24, 40)
    for model in (make(pos_embed="rope"), upcycled()):
        model.reset_classifier(3, "max")
        vmoe.save_pretrained(model, tmp_path / "m.safetensors")
        again = vmoe.create_model(pretrained=tmp_path / "m.safetensors").eval()
        assert torch.equal(again(image), model(image))
    vmoe.save_pretrained(vmoe.densify(model), tmp_path / "m.safetensors")  # of timm's classes again
    folder = vmoe.save_hub_folder(model, tmp_path / "upcycled")
    assert torch.equal(timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(image), model(image))
    assert patch_grid(make(class_token=True), 37) == (1, 6, 6)
    maps = timm.create_model("vmoe_naflex_tiny_patch8", features_only=True, out_indices=(1, 5))(image)
    assert [tuple(each.shape) for each in maps] == [(1, 128, 3, 5)] * 2


def test_errors():
    model, batch = make(), packed([torch.randn(3, P, P)], 4)
    batch["patch_valid"][:] = False
    for bad in (model, upcycled()):
        with pytest.raises(ValueError, match="patch_valid has an image without a real patch: leave such images out"):
            bad(batch)
        with pytest.raises(ValueError, match=r"an image of 20 x 7 pixels is smaller than a patch \(8 x 8\)"):
            bad(torch.randn(1, 3, 7, 20))
        with pytest.raises(ValueError, match="must consist of whole patches of 8 x 8 pixels, got 20 x 16"):
            bad(torch.randn(1, 3, 16, 20))
    with pytest.raises(ValueError, match="pos_embed must be 'learned', 'factorized', 'rope' or 'none', got 'sincos2d'"):
        make(pos_embed="sincos2d")
    with pytest.raises(ValueError, match="swiglu_mlp cannot be set"):
        make(swiglu_mlp=True)
