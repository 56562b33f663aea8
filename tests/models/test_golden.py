"""Whole V-MoEs against the reference's figures: logits, losses, and all gradients."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import vmoe

GOLDEN = Path(__file__).parents[1] / "golden"


def as_state_dict(arrays: dict[str, torch.Tensor], config: dict) -> dict[str, torch.Tensor]:
    """The reference's names and layouts -> timm's."""
    width, encoder = config["hidden_size"], config["encoder"]
    state = {
        "cls_token": arrays["cls"],
        "pos_embed": arrays["Encoder/posembed_input/pos_embedding"],
        "patch_embed.proj.weight": arrays["embedding/kernel"].permute(3, 2, 0, 1),
        "patch_embed.proj.bias": arrays["embedding/bias"],
        "norm.weight": arrays["Encoder/encoder_norm/scale"],
        "norm.bias": arrays["Encoder/encoder_norm/bias"],
        "head.weight": arrays["head/kernel"].T,
        "head.bias": arrays["head/bias"],
    }
    for i in range(encoder["num_layers"]):
        theirs, ours = f"Encoder/encoderblock_{i}", f"blocks.{i}"
        for n in (0, 1):
            state[f"{ours}.norm{n + 1}.weight"] = arrays[f"{theirs}/LayerNorm_{n}/scale"]
            state[f"{ours}.norm{n + 1}.bias"] = arrays[f"{theirs}/LayerNorm_{n}/bias"]
        attention = f"{theirs}/SelfAttention"
        parts = [f"{attention}/{name}" for name in ("query", "key", "value")]
        state[f"{ours}.attn.qkv.weight"] = torch.cat([arrays[f"{p}/kernel"].reshape(width, width).T for p in parts])
        state[f"{ours}.attn.qkv.bias"] = torch.cat([arrays[f"{p}/bias"].reshape(width) for p in parts])
        state[f"{ours}.attn.proj.weight"] = arrays[f"{attention}/out/kernel"].reshape(width, width).T
        state[f"{ours}.attn.proj.bias"] = arrays[f"{attention}/out/bias"]
        sparse = i in encoder["moe"]["layers"]
        mlp = f"{theirs}/Moe/Mlp" if sparse else f"{theirs}/Mlp"
        for n in (0, 1):
            name = f"{ours}.mlp.experts.fc{n + 1}" if sparse else f"{ours}.mlp.fc{n + 1}"
            state[f"{name}.weight"] = arrays[f"{mlp}/Dense_{n}/kernel"].transpose(-1, -2)
            state[f"{name}.bias"] = arrays[f"{mlp}/Dense_{n}/bias"]
        if sparse:
            state[f"{ours}.mlp.router.weight"] = arrays[f"{theirs}/Moe/Router/dense/kernel"].T
    return state


@pytest.mark.parametrize("name", ["vmoe_k2_vanilla", "vmoe_k1_bpr_c05"])
def test_logits_losses_and_gradients(name):
    config = json.loads((GOLDEN / f"{name}.json").read_text())
    with np.load(GOLDEN / f"{name}.npz") as file:
        figures = {key: torch.tensor(file[key]) for key in file}
    encoder, moe = config["encoder"], config["encoder"]["moe"]
    router, dispatcher = moe["router"], moe["router"]["dispatcher"]
    model = timm.create_model(
        "vmoe_tiny_patch8_48",
        img_size=config["image_size"],
        patch_size=config["patch_size"][0],
        embed_dim=config["hidden_size"],
        depth=encoder["num_layers"],
        num_heads=encoder["num_heads"],
        mlp_ratio=encoder["mlp_dim"] / config["hidden_size"],
        num_classes=config["num_classes"],
        moe_layers=moe["layers"],
        num_experts=moe["num_experts"],
        num_selected_experts=router["num_selected_experts"],
        group_size=moe["group_size"],
        eval_capacity_factor=dispatcher["capacity_factor"],
        batch_priority=dispatcher["batch_priority"],
        importance_loss=router["importance_loss_weight"],
        load_loss=router["load_loss_weight"],
    ).eval()

    def part(prefix):
        return {key.removeprefix(prefix): value for key, value in figures.items() if key.startswith(prefix)}

    model.load_state_dict(as_state_dict(part("params/"), config))
    images = figures["images_nhwc"].permute(0, 3, 1, 2).requires_grad_()
    with vmoe.record_routing(model) as record:
        logits = model(images)
        loss = logits.square().mean() + record.auxiliary_loss()
    loss.backward()

    torch.testing.assert_close(logits, figures["logits"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, figures["loss"], atol=1e-5, rtol=1e-5)
    for layer, routing in record.layers.items():
        reference = f"metrics/encoderblock_{layer.split('.')[1]}"
        for metric in ("importance_loss", "gshard_loss", "auxiliary_loss"):
            theirs = figures[f"{reference}/{metric}"].mean()  # one per group
            torch.testing.assert_close(routing.metrics[metric], theirs, atol=1e-5, rtol=1e-5)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()} | {"images": images.grad}
    expected = as_state_dict(part("grads/"), config) | {"images": figures["grad_images_nhwc"].permute(0, 3, 1, 2)}
    for name_, gradient in expected.items():
        assert (gradients[name_] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name_
