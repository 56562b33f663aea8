"""Cluster-aware upcycling: clusters, what the experts keep of the dense MLP, and how far the model is from it."""

import open_clip
import pytest
import timm
import torch

import vmoe
from vmoe.models.expert_init import spherical_k_means

VIT = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
VISION = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
TEXT = {"context_length": 16, "vocab_size": 512, "width": 48, "heads": 4, "layers": 2}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(name="vit_tiny_patch16_224", **kwargs):
    model = timm.create_model(name, **VIT, patch_size=8, **kwargs)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn_like(parameter) * parameter[0].numel() ** -0.5
    return model


def images(number=32):
    return torch.randn(number, 3, 32, 32)


def test_k_means_finds_the_directions_that_are_there():
    direction_CD, cluster_N = torch.linalg.qr(torch.randn(8, 8)).Q[:5], torch.arange(500) % 5
    length_N1 = torch.rand(500, 1) * 9 + 1
    x_ND = length_N1 * (direction_CD[cluster_N] + 0.1 * torch.randn(500, 8))
    centroid_CD = spherical_k_means(x_ND, 5)
    torch.testing.assert_close(centroid_CD.norm(dim=1), torch.ones(5))
    found_N = (x_ND @ centroid_CD.T).argmax(1)
    assert len({(int(a), int(b)) for a, b in zip(found_N, cluster_N)}) == 5  # one found cluster for each
    with pytest.raises(ValueError, match="fewer than 6 different tokens"):
        spherical_k_means(direction_CD[cluster_N], 6)


def test_copies_with_centroids_as_router_compute_the_same():
    dense, x = make(), images()
    sparse = vmoe.upcycle(dense, 4, "every1", calibration=[images(), x], cluster_energy=1)
    assert sparse.training
    assert sparse.upcycle_differences.keys() == {"blocks.0.mlp", "blocks.1.mlp", "output"}
    assert max(sparse.upcycle_differences.values()) < 1e-6
    torch.testing.assert_close(sparse.eval()(x), dense.eval()(x), rtol=0, atol=1e-5)
    with vmoe.record_routing(sparse) as record:
        sparse(x)
    for call in record.layers.values():
        assert call.load.min() > 0.02 * call.load.sum()
        assert call.gates.max(-1).values.mean() > 0.3  # 0.25 of a router that does not decide


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_base_patch14_224"])  # SwiGLU with a norm
@torch.no_grad()
def test_an_expert_is_the_lowest_rank_that_keeps_the_energy_on_its_cluster(name):
    dense, energy, seen = make(name).eval(), 0.9, []
    x = images(64)
    sparse = vmoe.upcycle(dense, 4, [1], calibration=x, cluster_energy=energy)
    dense.blocks[1].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    dense(x)
    mlp, layer = dense.blocks[1].mlp, sparse.blocks[1].mlp
    cluster_N = (seen[0] @ layer.router.weight.T).argmax(1)
    weight_OI = torch.cat([mlp.fc1_g.weight, mlp.fc1_x.weight]) if "eva" in name else mlp.fc1.weight
    for expert in range(4):
        x_IN = seen[0][cluster_N == expert].T.double()
        energies = torch.linalg.svdvals(weight_OI.double() @ x_IN).square()
        rank = int((energies.cumsum(0) < energy * energies.sum()).sum()) + 1
        own_OI = layer.experts.fc1.weight[expert].double()
        assert torch.linalg.matrix_rank(own_OI, rtol=1e-4) == rank < 32
        lost = ((own_OI - weight_OI.double()) @ x_IN).square().sum()  # what no matrix of this rank can keep
        torch.testing.assert_close(lost, energies[rank:].sum(), rtol=1e-3, atol=0)
        assert torch.linalg.matrix_rank(layer.experts.fc2.weight[expert], rtol=1e-4) < 32
    far = sparse.upcycle_differences
    ours, theirs = layer(seen[0]), mlp(seen[0])
    assert far["blocks.1.mlp"] == pytest.approx(float((ours - theirs).norm() / theirs.norm()), rel=1e-4)
    assert far["output"] == pytest.approx(float((sparse(x) - dense(x)).norm() / dense(x).norm()), rel=1e-4)
    closer = vmoe.upcycle(dense, 4, [1], calibration=x, cluster_energy=0.97).upcycle_differences
    assert 0.1 < closer["blocks.1.mlp"] < 0.7 * far["blocks.1.mlp"]


@torch.no_grad()
def test_both_towers_and_virtual_groups():
    dense = open_clip.CLIP(32, VISION, TEXT).eval()
    batch = {"image": images(), "text": torch.randint(1, 512, (32, 16))}
    sparse = vmoe.upcycle(dense, 8, "every1", 4, granularity=2, calibration=batch, cluster_energy=1)
    assert len(sparse.upcycle_differences) == 5
    assert max(sparse.upcycle_differences.values()) < 1e-5
    weight_ED = sparse.transformer.resblocks[0].mlp.router.weight
    assert torch.equal(weight_ED[::2], weight_ED[1::2])
    assert weight_ED[::2].unique(dim=0).shape[0] == 4


def test_a_new_classifier_without_weights_is_no_difference():
    dense = vmoe.create_model("vmoe_tiny_patch8_48", num_experts=0, depth=2, num_classes=3)  # its head is zero
    far = vmoe.upcycle(dense, 4, [1], calibration=torch.randn(8, 3, 48, 48)).upcycle_differences
    assert far["output"] == 0 < far["blocks.1.mlp"]


def test_what_cannot_be_clustered_is_refused():
    dense, labels = make(), torch.zeros(2, dtype=torch.long)
    for settings, message in [
        ({"calibration": []}, "calibration is empty"),
        ({"calibration": [(images(2)[:, :, :8, :8].repeat(1, 1, 4, 4) * 0, labels)]}, "blocks.1.mlp sees fewer than"),
        ({"calibration": images(), "router": "expert_choice"}, "needs router='top_k' and a linear gate"),
        ({"calibration": images(), "gate": "cosine"}, "needs router='top_k' and a linear gate"),
        ({"calibration": images(), "cluster_energy": 0}, "cluster_energy must be above 0 and at most 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            vmoe.upcycle(dense, 64, [1], **settings)
    with pytest.raises(ValueError, match="does not reach transformer.resblocks.0.mlp; give images and texts"):
        vmoe.upcycle(open_clip.CLIP(32, VISION, TEXT), 4, "every1", calibration=images())
