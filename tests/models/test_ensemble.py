"""Efficient ensembles of experts (E3, arXiv 2110.03360): whole models, their losses, files and what refuses them."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torchvision.models.feature_extraction import create_feature_extractor

import vmoe
from vmoe.inspection.accumulate import split_modalities
from vmoe.models.dense_mlp import UpcycleError
from vmoe.models.flops import model_profile
from vmoe.models.vision import log_mean_probability

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 3}
TINY |= {"moe_layers": [1, 2], "num_experts": 4, "noise_std": 0.0}


def make(M=2, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model("vmoe_tiny_patch8_48", **TINY, ensemble_size=M, **kwargs)
    torch.nn.init.normal_(model.head.weight)
    return model


def test_each_member_is_a_vmoe():
    """With the same weights, a V-MoE whose experts and gate are those of one set."""
    ensemble, images = make(num_selected_experts=2).eval(), torch.randn(5, 3, 16, 16)
    logits = ensemble.member_logits(images)
    assert logits.shape == (10, 3)
    for m in range(2):
        alone = timm.create_model("vmoe_tiny_patch8_48", **{**TINY, "num_experts": 2}, num_selected_experts=2).eval()
        state = ensemble.state_dict()
        for name in state:
            if ".experts." in name or ".router." in name:
                state[name] = state[name].chunk(2)[m]
        alone.load_state_dict(state)
        torch.testing.assert_close(logits[m::2], alone(images))
    torch.testing.assert_close(ensemble(images), logits.softmax(-1).unflatten(0, (5, 2)).mean(1).log())
    assert ensemble.forward_features(images).shape == (10, 5, 16)
    with pytest.raises(ValueError, match="an ensemble has no features of single blocks"):
        ensemble.forward_intermediates(images, indices=1)
    traced = create_feature_extractor(ensemble, ["blocks.1.mlp", "head"])(images)  # by torch.fx
    torch.testing.assert_close(traced["head"], logits)
    assert traced["blocks.1.mlp"].shape == (10, 5, 16)
    ensemble.reset_classifier(0)
    assert ensemble(images).shape == (5, 16)


@pytest.mark.parametrize(("smoothing", "scale"), [(0.0, 1.0), (0.1, 1.0), (0.0, 0.25)])
def test_attached_losses_train_like_repeated_labels(smoothing, scale):
    images, labels = torch.randn(4, 3, 16, 16).double(), torch.arange(4) % 3
    model = make().double().train()
    with vmoe.record_routing(model) as record:
        logits = model(images)
        assert logits.shape == (8, 3)
        repeated = labels.repeat_interleave(2)
        loss = F.cross_entropy(logits, repeated, label_smoothing=smoothing) + record.auxiliary_loss()
    (scale * loss).backward()
    attached = make(auxiliary_loss="attach").double().train()
    vmoe.set_auxiliary_loss_scale(scale)
    try:
        output = attached(images)
        assert output.shape == (4, 3)
        (scale * F.cross_entropy(output, labels, label_smoothing=smoothing)).backward()
    finally:
        vmoe.set_auxiliary_loss_scale(1.0)
    grads = dict(attached.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name].grad, msg=name)


def test_a_number_of_members_that_is_not_whole_is_refused():
    with pytest.raises(ValueError, match="ensemble_size must be a whole number, got 2.0"):
        make(M=2.0)


def test_a_vmoe_becomes_an_ensemble_with_its_weights(tmp_path):
    dense_gate = make(M=1, num_selected_experts=2).eval()
    vmoe.save_pretrained(dense_gate, tmp_path / "vmoe.safetensors")
    ensemble = vmoe.create_model(pretrained=tmp_path / "vmoe.safetensors", ensemble_size=2).eval()
    assert ensemble.blocks[1].mlp.ensemble_size == 2
    # The reference reshapes the gate (D, E) to (D, M, E / M): the same numbers in the same order.
    for name, tensor in dense_gate.state_dict().items():
        assert torch.equal(tensor, ensemble.state_dict()[name])
    vmoe.save_pretrained(ensemble, tmp_path / "e3.safetensors")
    images = torch.randn(2, 3, 16, 16)
    again = vmoe.create_model(pretrained=tmp_path / "e3.safetensors").eval()
    assert torch.equal(again(images), ensemble(images))
    assert not torch.allclose(dense_gate(images).log_softmax(-1), again(images))
    profile, plain = model_profile(ensemble), model_profile(dense_gate)
    assert profile["parameters_total"] == plain["parameters_total"]
    assert profile["parameters_active"] > plain["parameters_active"]
    assert 1.2 < profile["gflops_per_image"] / plain["gflops_per_image"] < 2  # the first block runs once


def test_log_mean_probability_of_certain_members():
    logits = torch.tensor([[[0.0, 200.0], [0.0, -200.0]]])
    torch.testing.assert_close(log_mean_probability(logits), torch.tensor([[0.5, 0.5]]).log())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: timm.create_model("vmoe_tiny_patch8_48", ensemble_size=3), r"must divide num_experts \(8\), got 3"),
        (lambda: timm.create_model("vmoe_tiny_patch8_48", ensemble_size="2"), "ensemble_size must be a whole number"),
        (
            lambda: timm.create_model("vmoe_tiny_patch8_48", ensemble_size=2, num_experts=0),
            "ensemble_size=2 needs blocks with experts",
        ),
        (lambda: vmoe.create_model("softmoe_tiny_patch8_48", ensemble_size=2), "needs router='top_k' or"),
        (lambda: vmoe.create_model("limoe_tiny_patch8_48", ensemble_size=2), "has no setting 'ensemble_size'"),
        (lambda: vmoe.create_model("vit_tiny_patch16_224", ensemble_size=2), "has no setting 'ensemble_size'"),
        (
            lambda: vmoe.create_model("two_tower_tiny_patch8_48", image={"ensemble_size": 2}),
            "image.ensemble_size must be left out, got 2",
        ),
        (
            lambda: vmoe.upcycle(timm.create_model("vit_tiny_patch16_224"), 4, ensemble_size=2),
            "no setting 'ensemble_size'",
        ),
    ],
)
def test_what_cannot_be_an_ensemble(build, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        build()


def test_an_ensemble_keeps_its_experts():
    for change in (vmoe.densify, lambda model: vmoe.prune_experts(model, 2, {})):
        with pytest.raises(UpcycleError, match="an ensemble of 2 members"):
            change(make())


def test_statistics_take_the_choices_of_all_copies():
    model = make(num_selected_experts=2, eval_capacity_factor=0.5, capacity_multiple_of=1).eval()
    with torch.no_grad(), vmoe.record_routing(model) as record:
        model(torch.randn(3, 3, 16, 16))
    call = record.layers["blocks.1.mlp"]
    tokens = split_modalities(call)["image"]
    assert tokens.expert_BTK.shape == tokens.kept_BTK.shape == (3, 5, 4)  # two of each set of two experts
    assert (np.sort(tokens.expert_BTK) == np.arange(4)).all()
    assert tokens.real_BT.shape == (3, 5)
    np.testing.assert_allclose(tokens.gate_BTE.sum(-1), 1, rtol=1e-6)
    kept = tokens.expert_BTK[tokens.kept_BTK]
    assert (np.bincount(kept, minlength=4) == call.load.numpy()).all()
    assert len(kept) < tokens.kept_BTK.size
