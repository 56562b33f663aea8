"""timm's Muon on models with experts: who is orthogonalised, and each expert by itself."""

import copy
import re

import open_clip
import pytest
import timm.optim
import torch
from torch import nn

import vmoe
from vmoe.training.config import OptimConfig
from vmoe.training.muon import Muon
from vmoe.training.optim import create_optimizer, parameter_groups

NAMES = ["muon", "nmuon", "adamuon", "nadamuon"]
TINY = {"depth": 2, "num_heads": 2, "num_experts": 4, "img_size": 16, "patch_size": 8}


def vision(**kwargs):
    torch.manual_seed(0)
    model = vmoe.create_model("vmoe_tiny_patch8_48", embed_dim=32, num_classes=3, **{**TINY, **kwargs})
    nn.init.normal_(model.head.weight)
    return model


def gradients(model, seed=0):
    """Gradients of the same numbers for all models of the same names."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def by_muon(optimizer, model):
    """Names of the parameters that Muon took in the step before."""
    return {name for name, p in model.named_parameters() if optimizer.state[p].get("use_muon")}


def clip():
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}
    image = {"image_size": 16, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
    return vmoe.upcycle(open_clip.CLIP(32, image, text), num_experts=4, layers=[1])


BLOCKS = r"blocks\.[01]\.(attn\.(qkv|proj)|mlp\.(fc[12]|experts\.fc[12]))\.weight"
CASES = {
    "vmoe": (vision, BLOCKS),
    "soft": (lambda: vision(router="soft"), BLOCKS),
    "shared, map pooling": (
        lambda: vision(num_shared_experts=1, global_pool="map"),
        BLOCKS + r"|blocks\.1\.mlp\.shared\.fc[12]\.weight",
    ),
    "limoe": (lambda: vmoe.create_model("limoe_tiny_patch8_48", width=32, vocab_size=64, **TINY), BLOCKS),
    "two towers": (
        lambda: vmoe.create_model(
            "two_tower_tiny_patch8_48", image={"embed_dim": 32, **TINY}, text={"vocab_size": 64, **TINY_TEXT}
        ),
        rf"(visual|text)\.({BLOCKS})",
    ),
    "upcycled CLIP": (
        clip,
        r"(visual\.)?transformer\.resblocks\.[01]\."
        r"(attn\.(in_proj_weight|out_proj\.weight)|mlp\.(c_fc|c_proj|experts\.fc[12])\.weight)",
    ),
    "convnext": (
        lambda: timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=9),
        r"stages\.[0-3]\.(blocks\.0\.mlp\.fc[12]|downsample\.1)\.weight",
    ),
}
TINY_TEXT = {"width": 32, "depth": 2, "num_heads": 2, "num_experts": 4}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_hidden_matrices_are_muons_and_all_else_adamws(case, layer_decay):
    make, pattern = CASES[case]
    model = make()
    optimizer = create_optimizer(model, OptimConfig(name="muon", weight_decay=0.1, layer_decay=layer_decay))
    gradients(model)
    optimizer.step()
    names = {name for name, _ in model.named_parameters()}
    assert by_muon(optimizer, model) == {name for name in names if re.fullmatch(pattern, name)}
    # Weight and layer decay are as for other optimizers.
    other = create_optimizer(model, OptimConfig(name="adamw", weight_decay=0.1, layer_decay=layer_decay))
    settings = [
        {id(p): (group["weight_decay"], group.get("lr_scale")) for group in each.param_groups for p in group["params"]}
        for each in (optimizer, other)
    ]
    assert settings[0] == settings[1]


@pytest.mark.parametrize("name", NAMES)
def test_each_experts_matrix_takes_the_step_of_a_matrix(name):
    model, config = vision(), OptimConfig(name=name, lr=0.1, weight_decay=0.1)
    optimizer = create_optimizer(model, config)
    stack = model.blocks[1].mlp.experts.fc1.weight
    alone = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    timms = timm.optim.create_optimizer_v2([{"params": alone}], name, lr=0.1, weight_decay=0.1)
    for step in range(3):
        gradients(model, step)
        stack.grad[2] = 0  # an expert without tokens
        for matrix, grad in zip(alone, stack.grad):
            matrix.grad = grad.clone()
        optimizer.step()
        timms.step()
        torch.testing.assert_close(stack.detach(), torch.stack(alone).detach(), rtol=0, atol=0)
    assert optimizer.state[stack]["momentum_buffer"].shape == stack.shape
    assert any(each is stack for group in optimizer.param_groups for each in group["params"])
    assert len(optimizer.state) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ["muon", "adamuon", "lookahead_muon"])
def test_a_state_that_was_saved_goes_on_alike(name):
    models = [vision(), vision()]
    config = OptimConfig(name=name, lr=0.1)
    first, second = (create_optimizer(model, config) for model in models)
    for step in range(2):
        gradients(models[0], step)
        first.step()
    models[1].load_state_dict(models[0].state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for model, optimizer in zip(models, (first, second)):
        gradients(model, 2)
        optimizer.step()
    for ours, theirs in zip(models[0].parameters(), models[1].parameters()):
        assert torch.equal(ours, theirs)


def test_a_loop_of_ones_own():
    model = vision(auxiliary_loss="attach")
    optimizer = Muon(parameter_groups(model, weight_decay=0.05, muon=True), lr=0.02)
    for parameter in model.blocks[1].mlp.experts.fc2.parameters():
        parameter.requires_grad_(False)  # after the groups were made: it gets no gradient
    before = copy.deepcopy(model.state_dict())

    def closure():
        optimizer.zero_grad()
        loss = model(torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses[-1] < losses[0]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == before.keys() - {f"blocks.1.mlp.experts.fc2.{kind}" for kind in ("weight", "bias")}
