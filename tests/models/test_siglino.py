import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import default_collate

import vmoe
from tests.convert.golden import GOLDEN, load
from vmoe.convert import pretrained_cfg
from vmoe.evaluation.capacity import limited, sparse_image_layers, sweep_settings
from vmoe.evaluation.config import CapacityConfig
from vmoe.evaluation.inference import evaluating
from vmoe.export import export_model
from vmoe.models.flops import count_parameters
from vmoe.models.siglino import SIGLINO_CONFIGS, SigLinoTransform
from vmoe.moe import SparseMoE

TINY = {"img_size": 24, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "head_dim": 16}
TINY |= {"num_experts": 4, "num_selected_experts": 2, "expert_width": 16, "teacher_dims": {"dinov3": 8, "siglip2": 16}}
TRANSFORM = SigLinoTransform(patch_size=8, min_pixels=16 * 16, max_pixels=32 * 32)


def make(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("siglino_moe_0_3b", **{**TINY, **kwargs})


@pytest.fixture(scope="module")
def model():
    return make().eval()


@pytest.fixture(scope="module")
def batch():
    """Patches of three images of different shapes; padding holds garbage, which must not matter."""
    rng = np.random.default_rng(0)
    sizes = ((30, 30), (16, 40), (9, 50))
    images = [Image.fromarray(rng.integers(256, size=(*size, 3), dtype=np.uint8)) for size in sizes]
    given = TRANSFORM(images)
    given["pixel_values"][~given["padding_mask"]] = float("nan")
    return given


@torch.no_grad()
def test_an_image_does_not_depend_on_padding_or_others(model, batch):
    with vmoe.record_routing(model) as record:
        mixed = model(**batch)
    real_P = batch["padding_mask"].sum(1)
    for row, (count, (rows, columns)) in enumerate(zip(real_P.tolist(), batch["spatial_shapes"].tolist())):
        patches = batch["pixel_values"][row : row + 1, :count]
        alone = model(pixel_values=patches, spatial_shapes=batch["spatial_shapes"][row : row + 1])
        image = patches.view(1, rows, columns, 8, 8, 3).permute(0, 5, 1, 3, 2, 4).reshape(1, 3, rows * 8, columns * 8)
        for given in (alone, model(pixel_values=image)):
            for name in ("siglino", "dinov3", "siglip2"):
                ours = mixed["patch_features"][name][row, :count], mixed["summary_features"][name][row]
                theirs = given["patch_features"][name][0], given["summary_features"][name][0]
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    for layer in record.layers.values():  # 5 prefix tokens in each image
        assert layer.load.sum() == 2 * (real_P.sum() + 3 * 5)


def test_padding_takes_no_capacity_and_counts_in_no_loss(batch):
    model = make(eval_capacity_factor=1.0, capacity_multiple_of=1, importance_loss=0.1).eval()
    longer = {"pixel_values": (0, 0, 0, 9), "padding_mask": (0, 9), "spatial_shapes": ()}
    longer = {key: F.pad(batch[key], padding) for key, padding in longer.items()}
    records = []
    for given in (batch, longer):
        with torch.no_grad(), vmoe.record_routing(model) as record:
            model(**given)
        records.append(record)
    for ours, theirs in zip(*(record.layers.values() for record in records), strict=True):
        assert torch.equal(ours.load, theirs.load)
        assert 0 < ours.metrics["share_dropped"] == pytest.approx(theirs.metrics["share_dropped"])
    torch.testing.assert_close(*(record.auxiliary_loss() for record in records))


def test_as_a_model_of_timm(model, batch):
    images = torch.randn(2, 3, 24, 32)
    with torch.no_grad():
        features = model.forward_features(images)
        assert model(images).shape == (2, 32)
        assert torch.equal(model.forward_head(features, pre_logits=True), model(images))
        final, maps = model.forward_intermediates(images, indices=2, norm=True, return_prefix_tokens=True)
        assert torch.equal(final, features)
        patches, prefix = maps[-1]
        assert patches.shape == (2, 32, 3, 4)
        assert prefix.shape == (2, 5, 32)
        assert torch.equal(torch.cat([prefix, patches.flatten(2).transpose(1, 2)], dim=1), features)
        packed = model.forward_intermediates(
            batch["pixel_values"], [0], output_fmt="NLC", intermediates_only=True, stop_early=True,
            padding_mask=batch["padding_mask"], spatial_shapes=batch["spatial_shapes"],
        )  # fmt: skip
        assert packed[0].shape == (3, 16, 32)
        getter = make(features_only=True, out_indices=(0, 1))
        assert [tuple(each.shape) for each in getter(images)] == [(2, 32, 3, 4)] * 2
        assert getter.feature_info.reduction() == [8, 8]
        classifier = make(num_classes=7, global_pool="avg").eval()
        assert classifier(images).shape == (2, 7)
        logits = classifier(batch["pixel_values"], batch["padding_mask"], batch["spatial_shapes"])
        assert logits.isfinite().all()
        classifier.reset_classifier(3, "token")
        assert classifier(images).shape == (2, 3)
    with pytest.raises(ValueError, match="NLC"):
        model.forward_intermediates(*batch.values())


@pytest.mark.parametrize("num_classes", [0, 3])
def test_gradients_reach_all_that_is_trained(batch, num_classes):
    model = make(num_classes=num_classes, num_kv_heads=1, num_shared_experts=1, expert_mlp="relu2glu").train()
    model.set_grad_checkpointing()
    if num_classes:
        model(*batch.values()).square().sum().backward()
    else:
        outputs = model(**batch)
        real = batch["padding_mask"]
        loss = sum(each[real].square().sum() for each in outputs["patch_features"].values())
        (loss + sum(each.square().sum() for each in outputs["summary_features"].values())).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (not num_classes or not name.startswith(("teachers", "siglip2_pool")))
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0, name
    before = model.blocks[0].mlp.router.expert_bias.clone()
    vmoe.update_expert_bias(model)
    assert not torch.equal(before, model.blocks[0].mlp.router.expert_bias)


@pytest.mark.parametrize("settings", [{"router": "expert_choice"}, {"router": "soft"}, {"per_image": True}])
def test_other_routers(batch, settings):
    model = make(depth=1, **settings)
    loss = sum(each[batch["padding_mask"]].square().sum() for each in model(**batch)["patch_features"].values())
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.blocks[0].mlp.parameters())
    with pytest.raises(ValueError, match="bias_update_rate=0.1 needs router='top_k', not 'soft'"):
        make(router="soft", bias_update_rate=0.1)


def test_int8_capacity_and_export(tmp_path):
    model = make(num_classes=3, depth=1).eval()
    images = torch.randn(4, 3, 24, 24)
    with evaluating(model, "cpu"), torch.no_grad():
        layers = sparse_image_layers(model, model, images, "the model")
        for setting in sweep_settings(CapacityConfig(factors=[0.5, 1.0, None]), layers):
            with limited(layers.values(), setting), vmoe.record_routing(model) as record:
                model(images)
            dropped = sum(layer.metrics["share_dropped"] for layer in record.layers.values())
            assert (dropped > 0) == (setting.factor is not None)
    [row, *others] = export_model(model, tmp_path / "model.pt2", "pt2").differences
    assert max(each.relative for each in (row, *others)) < 1e-5
    with torch.no_grad():
        wanted = model(images)
        found = vmoe.quantize_experts(model, "int8")(images)
    assert 0 < (found - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_files(tmp_path, batch):
    model = make(norm_weights=False).eval()
    model.frequencies.mul_(1.5)  # as a checkpoint may have its own
    vmoe.save_pretrained(model, tmp_path / "model.safetensors")
    again = vmoe.create_model(pretrained=tmp_path / "model.safetensors").eval()
    cfg = pretrained_cfg(tmp_path / "model.safetensors")
    by_timm = timm.create_model(cfg["architecture"], pretrained=True, pretrained_cfg=cfg).eval()
    classifier = vmoe.create_model(pretrained=tmp_path / "model.safetensors", num_classes=5)
    assert classifier.head.out_features == 5
    with torch.no_grad():
        wanted = model(**batch)["summary_features"]["siglip2"]
        for each in (again, by_timm):
            assert torch.equal(each(**batch)["summary_features"]["siglip2"], wanted)
    half = again.bfloat16()
    assert torch.equal(half.frequencies, model.frequencies)
    assert half(torch.randn(1, 3, 24, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_bad_input(model, batch):
    patches, mask, shapes = batch.values()
    empty, outside = mask.clone(), torch.tensor([[2, 2], [2, 5], [1, 6]])
    empty[1] = False
    cases = [
        ((torch.zeros(1, 3, 24, 7),), "whole patches of 8 x 8 pixels, got 24 x 7"),
        ((torch.zeros(1, 3, 24, 30),), "got 24 x 30"),
        ((torch.zeros(1, 1, 24, 24),), r"images must be \(B, 3, H, W\)"),
        ((torch.zeros(1, 3, 24, 24), mask), "leave padding_mask out"),
        ((patches[..., :100], mask, shapes), r"patches \(B, P, 192\), got \(3, 16, 100\)"),
        ((patches, mask), "need spatial_shapes"),
        ((patches, mask[:, :5], shapes), r"padding_mask must be \(3, 16\)"),
        ((patches, empty, shapes), "an image without a real patch"),
        ((patches, mask, outside), "at least the real patches"),
    ]
    for given, message in cases:
        with pytest.raises(ValueError, match=message):
            model(*given)
    for settings, message in [
        ({"head_dim": 6}, "multiple of 4"),
        ({"num_kv_heads": 3}, "must divide num_heads"),
        ({"mlp": "gelu", "moe_layers": [1]}, "mlp must be one of swiglu"),
        ({"global_pool": "map"}, "'token' or 'avg'"),
        ({"teacher_dims": {"siglip2": 10}}, "multiple of 16"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(**settings)


@pytest.mark.parametrize("case", ["siglino_moe_k3", "siglino_mixed"])
def test_patches_are_the_projects_own(case):
    _, figures = load(case, GOLDEN / "released")
    model = make()
    for row, theirs in enumerate(figures["pixel_values"]):
        image = torch.tensor(figures[f"image{row}_hwc"])
        ours = model.patch_embed.cut(image.permute(2, 0, 1)[None])[0]
        assert np.array_equal(ours, theirs[: len(ours)])


def test_transform():
    transform = SigLinoTransform()
    assert transform.size(480, 640) == (208, 288)  # as large as 256 x 256 pixels allow
    assert transform.size(50, 100) == (96, 192)  # enlarged to at least 128 x 128 pixels
    assert transform.size(200, 210) == (192, 208)
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(200, 210, 3), dtype=np.uint8))
    sample = transform(image)
    assert sample["spatial_shapes"].tolist() == [12, 13]
    assert sample["padding_mask"].tolist() == [True] * 156 + [False] * 100
    pixels = np.asarray(image.resize((208, 192), Image.Resampling.BICUBIC), dtype=np.float32) / 127.5 - 1
    second = pixels[:16, 16:32].reshape(-1)
    np.testing.assert_allclose(sample["pixel_values"][1], second, atol=1e-6)
    batches = transform([image, image]), default_collate([sample, sample])
    assert all(torch.equal(batches[0][key], batches[1][key]) for key in sample)
    for size, message in (((15, 100), "smaller than a patch"), ((16, 4000), "too long")):
        with pytest.raises(ValueError, match=message):
            transform.size(*size)
    with pytest.raises(ValueError, match="min_pixels"):
        SigLinoTransform(16, 100, 200)


def test_names():
    """As many parameters, in millions, as the project's page at Hugging Face shows."""
    sizes = {"siglino_moe_0_3b": 500, "siglino_moe_0_15b": 500, "siglino_0_6b": 500}
    sizes |= {"siglino_70m": 69.5, "siglino_30m": 47.1}
    assert set(SIGLINO_CONFIGS) == set(sizes) == set(vmoe.list_models("siglino_*"))
    for name, millions in sizes.items():
        with torch.device("meta"):
            total, active = count_parameters(timm.create_model(name))
        assert float(f"{total / 1e6:.{1 if millions == 500 else 3}g}") == millions, name
        assert (active < total) == ("moe" in name)


@pytest.mark.parametrize("kwargs", [{}, {"expert_mlp": "geglu", "moe_layers": (1,), "mlp_width": 24}, {"depth": 1}])
def test_a_densified_model_is_saved_and_read(kwargs, tmp_path):
    dense = vmoe.densify(make(**kwargs)).eval()
    vmoe.save_pretrained(dense, tmp_path / "dense.safetensors")
    again = vmoe.create_model(pretrained=str(tmp_path / "dense.safetensors")).eval()
    assert not any(isinstance(module, SparseMoE) for module in again.modules())
    images = torch.randn(2, 3, 24, 24)
    assert torch.equal(dense(images), again(images))
