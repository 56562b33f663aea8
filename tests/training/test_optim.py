from itertools import pairwise

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vmoe.training.config import OptimConfig
from vmoe.training.optim import create_optimizer, create_schedule, freeze
from vmoe.utils.config import ConfigError


@pytest.fixture
def model():
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3
    )


def test_frozen_parameters_stay_as_they_are_and_the_others_move(model):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    frozen = freeze(model, ["patch_embed.*", "blocks.0.*"])
    assert frozen
    assert all(name.startswith(("patch_embed.", "blocks.0.")) for name in frozen)
    optimizer = create_optimizer(model, OptimConfig(weight_decay=0.5))
    model(torch.randn(2, 3, 16, 16)).square().sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, before[name]), name
    assert not torch.equal(model.head.weight, before["head.weight"])


def test_a_pattern_with_an_exclamation_mark_is_trained_all_the_same(model):
    frozen = freeze(model, ["*", "!*.mlp.*", "blocks.1.*"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"blocks.0.mlp.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")}
    assert trained.isdisjoint(frozen)
    with pytest.raises(ConfigError, match=r"'!\*.router.\*' matches no parameter"):
        freeze(model, ["*", "!*.router.*"])


def test_a_pattern_without_a_match_is_an_error_that_helps(model):
    with pytest.raises(ConfigError, match=r"'patch_embedding\.\*' matches no parameter.*patch_embed"):
        freeze(model, ["blocks.*", "patch_embedding.*"])


def test_freezing_everything_is_an_error(model):
    with pytest.raises(ConfigError, match="nothing to train"):
        freeze(model, ["*"])


def test_layer_decay_gives_lower_layers_smaller_steps(model):
    optimizer = create_optimizer(model, OptimConfig(lr=1.0, layer_decay=0.5))
    create_schedule(optimizer, OptimConfig(lr=1.0, layer_decay=0.5), steps=10)
    rate = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    head, block, stem = model.head.weight, model.blocks[0].attn.qkv.weight, model.patch_embed.proj.weight
    assert rate[id(head)] == 1.0
    assert rate[id(head)] > rate[id(block)] > rate[id(stem)]


def test_biases_and_norms_have_no_weight_decay(model):
    optimizer = create_optimizer(model, OptimConfig(weight_decay=0.1))
    decay = {id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    assert decay[id(model.head.bias)] == 0
    assert decay[id(model.norm.weight)] == 0
    assert decay[id(model.head.weight)] == 0.1


@pytest.mark.parametrize(
    ("name", "kwargs", "fused"),
    [
        ("adamw", {}, True),
        ("adam", {}, True),
        ("lookahead_adamw", {}, True),
        ("adamw", {"fused": False}, False),
        ("adamw", {"foreach": True}, False),
        ("sgd", {}, False),
        ("lion", {}, None),  # it has no such argument
    ],
)
def test_adam_is_fused_unless_set_otherwise(model, name, kwargs, fused):
    optimizer = create_optimizer(model, OptimConfig(name=name, kwargs=kwargs))
    assert {bool(group["fused"]) if "fused" in group else None for group in optimizer.param_groups} == {fused}


def test_an_unknown_optimizer_or_argument_is_named(model):
    with pytest.raises(ConfigError, match=r"adamx.*adam"):
        create_optimizer(model, OptimConfig(name="adamx"))
    with pytest.raises(ConfigError, match=r"optim\.kwargs.*flavour"):
        create_optimizer(model, OptimConfig(kwargs={"flavour": 1}))


@settings(deadline=None, max_examples=30)
@given(steps=st.integers(2, 200), share=st.floats(0, 0.9), lr=st.floats(1e-5, 1.0))
def test_cosine_warms_up_to_lr_and_falls_to_min_lr(steps, share, lr):
    warmup = int(share * (steps - 1))
    config = OptimConfig(lr=lr, warmup_steps=warmup, warmup_lr=0.0, min_lr=lr / 100)
    optimizer = create_optimizer(torch.nn.Linear(2, 2), config)
    schedule = create_schedule(optimizer, config, steps)
    rates = [optimizer.param_groups[0]["lr"]]
    for step in range(1, steps + 1):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert all(later > earlier for earlier, later in pairwise(rates[:warmup]))
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(rates[warmup:]))
    assert max(rates) <= lr * (1 + 1e-9)
    assert rates[-1] == pytest.approx(lr / 100)
    # A function of the step alone: a fresh schedule that jumps to a step agrees.
    fresh = create_optimizer(torch.nn.Linear(2, 2), config)
    create_schedule(fresh, config, steps).step_update(steps // 2)
    assert fresh.param_groups[0]["lr"] == rates[steps // 2]


def test_constant_schedule_stays_at_lr():
    config = OptimConfig(lr=0.3, schedule="constant", warmup_steps=2)
    optimizer = create_optimizer(torch.nn.Linear(2, 2), config)
    schedule = create_schedule(optimizer, config, steps=500)
    for step in (2, 90, 200, 500):
        schedule.step_update(step)
        assert optimizer.param_groups[0]["lr"] == 0.3


def test_a_wrong_schedule_argument_is_named():
    optimizer = create_optimizer(torch.nn.Linear(2, 2), OptimConfig())
    with pytest.raises(ConfigError, match=r"schedule_kwargs.*flavour"):
        create_schedule(optimizer, OptimConfig(schedule_kwargs={"flavour": 1}), 10)
