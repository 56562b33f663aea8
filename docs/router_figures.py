"""Draws docs/images/routers/*.png: what each router does with the same 24 tokens. Run: python docs/router_figures.py"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

import vmoe
from vmoe.moe import PRESETS, SparseMoE

TOKENS, EXPERTS, WIDTH = 24, 6, 16
FOLDER = Path(__file__).parent / "images" / "routers"
BLUE, RED, GREY = "#1f5fa8", "#c23b22", "#8a8a8a"


def routed(preset: str):
    """(layer, its record) for tokens of three kinds, of which the first is the most frequent; in training."""
    generator = torch.Generator().manual_seed(3)
    kinds = torch.randn(3, WIDTH, generator=generator)
    kind = torch.tensor([0] * 12 + [1] * 8 + [2] * 4)[torch.randperm(TOKENS, generator=generator)]
    x = kinds[kind] + 0.7 * torch.randn(TOKENS, WIDTH, generator=generator)
    torch.manual_seed(3)
    experts = 16 if preset == "dbrx" else EXPERTS
    settings = {"num_slots": 2} if preset == "soft" else {}
    layer = SparseMoE(WIDTH, WIDTH, router_preset=preset, num_experts=experts, **settings).train()
    if preset == "noisy_topk":  # it starts at zero; here as after some training
        torch.nn.init.normal_(layer.router.weight, std=0.3)
    if preset == "deepseek":  # biases as after 300 steps on these tokens
        for _ in range(300):
            layer(x[None])
            vmoe.update_expert_bias(layer)
    with vmoe.record_routing(layer) as record:
        layer(x[None])
    return layer, record.layers[""], x


def matrices(routing) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(gates, combine weights of kept choices, dropped choices), each (experts, tokens)."""
    gates = routing.gates[0].detach()
    index, kept = routing.expert_index[0], routing.kept[0]
    weights = torch.zeros_like(gates).scatter(1, index, routing.combine_weights[0].detach() * kept)
    asked = torch.zeros_like(gates).scatter(1, index, 1.0)
    if not routing.routing.per_token:  # experts choose: what they pass over was not asked for
        asked = (weights > 0).float()
    dropped = (asked > 0) & (weights == 0)
    return gates.T.numpy(), weights.T.numpy(), dropped.T.numpy()


def draw_sparse(preset: str) -> None:
    layer, routing, _ = routed(preset)
    gates, weights, dropped = matrices(routing)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(8.2, 1.2 + 0.2 * len(gates)), width_ratios=[4, 1], sharey=True, layout="constrained"
    )
    left.imshow(gates, cmap="Greys", vmin=0, vmax=2.5 * gates.max(), aspect="auto")
    for expert, token in zip(*np.nonzero(weights)):
        side = 0.25 + 0.6 * weights[expert, token]
        left.add_patch(plt.Rectangle((token - side / 2, expert - side / 2), side, side, color=BLUE))
    expert, token = np.nonzero(dropped)
    left.plot(token, expert, "x", color=RED, markersize=5)
    left.set(xlabel="tokens", ylabel="experts", xticks=range(0, TOKENS, 4), yticks=range(len(gates)))
    right.barh(range(len(gates)), routing.load.numpy(), color=BLUE)
    right.barh(range(len(gates)), dropped.sum(1), left=routing.load.numpy(), color=RED)
    capacity, _ = layer._capacity().rows(TOKENS, layer.num_experts, layer.num_selected_experts, None)
    if capacity is not None:
        right.axvline(capacity, color=GREY, linestyle="--", linewidth=1)
    right.set(xlabel="rows", xlim=(0, None))
    figure.savefig(FOLDER / f"{preset}.png", dpi=110)
    plt.close(figure)


def draw_soft() -> None:
    layer, _, x = routed("soft")
    soft = layer.router(x[None])
    figure, axes = plt.subplots(1, 2, figsize=(8.2, 2.9), layout="constrained", sharey=True)
    for axis, weights, title in [
        (axes[0], soft.dispatch_GMNS[0, 0], "dispatch: each slot (row) averages the tokens"),
        (axes[1], soft.combine_GNS[0], "combine: each token (column) averages the slots"),
    ]:
        image = axis.imshow(weights.detach().T.numpy(), cmap="Blues", vmin=0, aspect="auto")
        axis.set(xlabel="tokens", title=title)
        axis.title.set_fontsize(9)
        figure.colorbar(image, ax=axis, shrink=0.8)
    axes[0].set(ylabel="slots, 2 per expert")
    figure.savefig(FOLDER / "soft.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in PRESETS:
        if name == "soft":
            draw_soft()
        elif name != "glam":  # the same as gshard
            draw_sparse(name)
