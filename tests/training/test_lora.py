"""LoRA by PEFT: what is adapted, each expert by itself, and adapters in files and in runs of train.py."""

import copy
import re
import sys
from functools import partial

import pytest
import torch
from torch import nn

import vmoe
from vmoe.cli.evaluate import run as evaluate
from vmoe.evaluation.config import EvaluationConfig
from vmoe.models.factory import create_model, save_pretrained
from vmoe.models.manifest import list_checkpoints
from vmoe.moe import use_backend
from vmoe.training.trainer import train
from vmoe.utils.config import ConfigError

from .test_muon import clip

peft = pytest.importorskip("peft", reason="needs PEFT (pip install -e '.[test]')")

TINY = {"depth": 2, "num_heads": 2, "num_experts": 4}
IMAGE = {**TINY, "embed_dim": 32, "img_size": 16, "patch_size": 8}
TEXT = {**TINY, "width": 32, "vocab_size": 64, "context_length": 8}
EVERY = ("attention", "mlp", "experts", "router")
EXPERTS = r"blocks\.1\.mlp\.(experts\.fc[12]|router)"
BLOCKS = rf"blocks\.[01]\.attn\.(qkv|proj)|blocks\.0\.mlp\.fc[12]|{EXPERTS}"


def vision(**kwargs):
    model = create_model("vmoe_tiny_patch8_48", num_classes=3, **{**IMAGE, **kwargs})
    nn.init.normal_(model.head.weight, std=0.1)
    return model


CASES = {
    "vmoe": (lambda: vision(num_shared_experts=1), rf"({BLOCKS}|blocks\.1\.mlp\.shared\.fc[12])|head"),
    "learned noise": (lambda: vision(router_preset="noisy_topk"), rf"({BLOCKS})|head"),
    "expert choice": (lambda: vision(router="expert_choice"), rf"({BLOCKS})|head"),
    "limoe": (lambda: create_model("limoe_tiny_patch8_48", img_size=16, patch_size=8, embed_dim=16, **TEXT), BLOCKS),
    "two towers": (
        lambda: create_model("two_tower_tiny_patch8_48", image=IMAGE, text=TEXT, embed_dim=16),
        rf"(visual|text)\.({BLOCKS})",
    ),
    "upcycled CLIP": (
        clip,
        r"(visual\.)?transformer\.resblocks\.([01]\.attn(\.out_proj)?|0\.mlp\.(c_fc|c_proj)|"
        r"1\.mlp\.(experts\.fc[12]|router))",
    ),
}


def inputs(model):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 16, 16, generator=generator)
    return (images, torch.randint(1, 60, (4, 8), generator=generator)) if hasattr(model, "encode_text") else (images,)


def output(model, given):
    with torch.no_grad():
        result = model.eval()(*given)
    return result[0] * result[1].sum() if isinstance(result, tuple) else result


def adapted(model):
    """The names of what has trained parameters, without those that PEFT puts around them."""
    found = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    wrappers = r"base_model\.model\.|\.base_layer|\.(lora_[AB]|modules_to_save)\.default|\.(weight|bias)$"
    return {re.sub(wrappers, "", name) for name in found}


@pytest.mark.parametrize("case", CASES)
def test_adapters_are_trained_saved_merged_and_loaded(case, tmp_path):
    make, pattern = CASES[case]
    torch.manual_seed(0)
    base = make()
    given = inputs(base)
    before = output(base, given)
    config = vmoe.lora_config(base, EVERY, r=2, alpha=4)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    names = {name for name, _ in base.named_modules()}
    assert adapted(model) == {name for name in names if re.fullmatch(pattern, name)}
    torch.testing.assert_close(output(model, given), before)  # B starts with zeros

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):  # A has a gradient once B has moved
        optimizer.zero_grad()
        with vmoe.record_routing(model.train()) as record:
            result = model(*given)
            (result if len(given) == 1 else result[0] * result[1]).square().mean().backward()
        if record.auxiliary_loss().requires_grad:
            assert list(record.layers) == [f"base_model.model.{name}" for name in sparse_layers(base)]
        optimizer.step()
    still = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not [name for name in still if "logit" not in name and "router" not in name]
    after = output(model, given)
    assert not torch.allclose(after, before, atol=1e-3)

    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    torch.testing.assert_close(output(again, given), after)
    plain = again.merge_and_unload()
    assert type(plain) is type(base)
    torch.testing.assert_close(output(plain, given), after, rtol=1e-5, atol=1e-5)
    if case != "upcycled CLIP":  # not made by vmoe.create_model
        save_pretrained(plain, tmp_path / "merged.safetensors")
        loaded = create_model(pretrained=tmp_path / "merged.safetensors")
        torch.testing.assert_close(output(loaded, given), output(plain, given), rtol=0, atol=0)
        with pytest.raises(ValueError, match="adapters"):
            save_pretrained(model, tmp_path / "unmerged.safetensors")


def sparse_layers(model):
    return [name for name, module in model.named_modules() if isinstance(module, vmoe.SparseMoE)]


def test_each_expert_has_its_own_adapter():
    torch.manual_seed(0)
    base = vision()
    model = peft.get_peft_model(copy.deepcopy(base), vmoe.lora_config(base, ["experts"], r=2, alpha=6))
    layer = model.base_model.model.blocks[1].mlp.experts.fc1
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (A.shape, B.shape) == ((4 * 2, 32), (128, 2 * 4))
    nn.init.normal_(B)
    rows, before = A.detach().view(4, 2, 32), base.blocks[1].mlp.experts.fc1.weight
    merged = model.merge_and_unload().blocks[1].mlp.experts.fc1.weight
    for expert in range(4):
        delta = 6 / 2 * B.detach().view(128, 2, 4)[..., expert] @ rows[expert]
        torch.testing.assert_close(merged[expert], before[expert] + delta)


def test_what_cannot_be_adapted_is_named(monkeypatch):
    with pytest.raises(ValueError, match="no 'experts' to adapt; its targets are attention, mlp"):
        vmoe.lora_config(vision(num_experts=0))
    with pytest.raises(ValueError, match="no 'router' to adapt; its targets are attention, mlp, experts"):
        vmoe.lora_config(vision(router="soft"), ["router"])
    with pytest.raises(ValueError, match="no 'fc1' to adapt"):
        vmoe.lora_config(vision(), ["fc1"])
    assert vmoe.lora_config(vision(), "experts") == vmoe.lora_config(vision(), ["experts"])
    with pytest.raises(ValueError, match="targets must name some of attention"):
        vmoe.lora_config(vision(), [])
    model = vision()
    model = peft.get_peft_model(model, vmoe.lora_config(model))
    for change in (vmoe.densify, vmoe.upcycle, partial(vmoe.quantize_experts, kind="int8")):
        with pytest.raises(ValueError, match="the model has adapters beside its weights: merge them first"):
            change(model)
    with pytest.raises(ValueError, match="merge them first"):
        vmoe.prune_experts(model, 2, vmoe.measure_usage(model, [inputs(model)]))
    with use_backend("triton"), pytest.raises(ValueError, match="triton"):  # it would not see them
        model(*inputs(model))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"LoRA needs the package peft: pip install -e '\.\[lora\]' in a checkout"):
        vmoe.lora_config(vision())


def test_train_py_with_lora(make_config, tmp_path):
    base = make_config(**{"train.steps": 2})
    train(base)
    settings = {
        "model.pretrained": base.output_dir,
        "lora.targets": '["attention", "experts", "router"]',
        "lora.r": 2,
        "optim.lr": 0.02,
        "train.steps": 3,
        "train.eval_every": 3,
        "train.grad_checkpointing": True,
        "train.ema_decay": 0.5,
        "evaluate.examples": 2,
    }
    tuned = make_config(output_dir=tmp_path / "tuned", **settings)
    summary = train(tuned)
    before, after = create_model(pretrained=base.output_dir), create_model(pretrained=tuned.output_dir)
    changed = {name for name, p in after.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    names = {name for name, _ in before.named_parameters()}
    weights = {name for name in names if re.search(r"attn\.(qkv|proj)\.weight|fc[12]\.weight|router|head", name)}
    assert changed == weights - {f"blocks.0.mlp.{layer}.weight" for layer in ("fc1", "fc2")}
    # The moving average, merged, is what eval.py measures: nothing there knows of adapters.
    (checkpoint,) = list_checkpoints(tmp_path / "tuned")
    assert {"model.safetensors", "ema.safetensors", "adapted_model.safetensors", "adapted_ema.safetensors"} < {
        file.name for file in checkpoint.iterdir()
    }
    given = EvaluationConfig(task="classification", checkpoint=tuned.output_dir, data=tuned.data.val, device="cpu")
    results = evaluate(given)["results"]
    assert results["top1"] == summary["evaluation"]["top1"]
    assert summary["parameters_total"] == sum(p.numel() for p in after.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora.targets": '["expert"]'}, r"lora\.targets: the model has no 'expert' to adapt; its targets are"),
        ({"lora.targets": '["experts"]', "optim.name": "muon"}, "hold all experts in one matrix: use adamw"),
        (
            {"lora.targets": '["experts"]', "parallel.ep": 2},
            r"lora\.targets needs parallel\.dp_shard = parallel\.ep = 1",
        ),
        ({"lora.targets": '["experts"]', "lora.r": 0}, "lora.r must be >= 1"),
    ],
)
def test_mistakes_in_the_section_are_named(make_config, settings, message):
    with pytest.raises(ConfigError, match=message):
        train(make_config(**settings))
