"""timm's and PyTorch's Muon on models with experts: who is orthogonalised, and each expert by itself."""

import copy
import re

import open_clip
import pytest
import timm.optim
import torch
from torch import nn

import vmoe
from vmoe.moe import GroupedLinear
from vmoe.training.config import OptimConfig
from vmoe.training.muon import Muon, TorchMuon
from vmoe.training.optim import create_optimizer

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


def loop_over_experts(model, optimizers, make_alone):
    """Three steps of the optimizers, and of those of single matrices that `make_alone` makes; the worst difference."""
    stacks = [module.weight for module in model.modules() if isinstance(module, GroupedLinear)]
    alone = [[nn.Parameter(matrix.clone()) for matrix in stack.detach()] for stack in stacks]
    loop = [make_alone([matrix]) for matrices in alone for matrix in matrices]
    for step in range(3):
        gradients(model, step)
        for stack, matrices in zip(stacks, alone):
            for matrix, grad in zip(matrices, stack.grad):
                matrix.grad = grad.clone()
        for optimizer in (*optimizers, *loop):
            optimizer.step()
    assert len(stacks) >= 2
    return max(
        (part - matrix).abs().max() for stack, matrices in zip(stacks, alone) for part, matrix in zip(stack, matrices)
    )


SPARSE = ["vmoe", "limoe", "two towers", "upcycled CLIP"]


@pytest.mark.parametrize("case", SPARSE)
def test_timms_muon_is_a_loop_over_experts(case):
    model = CASES[case][0]()
    optimizer = Muon(vmoe.param_groups(model, weight_decay=0.1, optimizer="muon"), lr=0.1)
    assert loop_over_experts(model, [optimizer], lambda p: timm.optim.Muon(p, lr=0.1, weight_decay=0.1)) <= 1e-6


@pytest.mark.parametrize("case", SPARSE)
def test_pytorchs_muon_is_a_loop_over_experts(case):
    model = CASES[case][0]()
    groups = vmoe.param_groups(model, weight_decay=0.1, optimizer="muon")
    hidden = [group for group in groups if not group.get("use_fallback")]
    rest = [group for group in groups if group.get("use_fallback")]
    optimizers = [TorchMuon(hidden, lr=0.1, adjust_lr_fn="match_rms_adamw"), torch.optim.AdamW(rest, lr=0.1)]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muons = {names[id(p)] for group in optimizers[0].param_groups for p in group["params"]}
    assert muons == {name for name in names.values() if re.fullmatch(CASES[case][1], name)}

    def alone(parameters):
        return torch.optim.Muon(parameters, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")

    before = copy.deepcopy(model)
    assert loop_over_experts(model, optimizers, alone) <= 1e-6
    # A copy continues alike from the saved state.
    state = copy.deepcopy(optimizers[0].state_dict())
    again = vmoe.param_groups(before, weight_decay=0.1, optimizer="muon")
    second = TorchMuon([group for group in again if not group.get("use_fallback")])
    second.load_state_dict(state)
    before.load_state_dict(model.state_dict())
    for each, optimizer in ((model, optimizers[0]), (before, second)):
        gradients(each, 3)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters()))
    with pytest.raises(ValueError, match="give them to AdamW"):
        TorchMuon(groups)


def test_timms_own_muon_leaves_experts_in_such_groups_to_adamw():
    model = vision()
    groups = vmoe.param_groups(model, optimizer="muon")
    optimizer = timm.optim.Muon(groups, lr=0.1)
    gradients(model)
    optimizer.step()
    assert by_muon(optimizer, model) == {
        name for name, _ in model.named_parameters() if re.fullmatch(BLOCKS, name) and "experts" not in name
    }


def test_groups_of_other_optimizers_are_timms():
    model = vision()
    groups = vmoe.param_groups(nn.DataParallel(model), weight_decay=0.1, layer_decay=0.5, optimizer="lion")
    expected = timm.optim.param_groups_layer_decay(model, 0.1, model.no_weight_decay(), layer_decay=0.5)
    assert [[*map(id, group.pop("params"))] for group in groups] == [[*map(id, g.pop("params"))] for g in expected]
    assert groups == expected
    with pytest.raises(ValueError, match="moun"):
        vmoe.param_groups(model, optimizer="moun")


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
    optimizer = Muon(vmoe.param_groups(model, weight_decay=0.05, optimizer="muon"), lr=0.02)
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
