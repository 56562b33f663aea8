"""Accuracy under attack, and how much the attacks change the routing, after arXiv 2210.10253.

Shapes, by suffix: B images of a batch, T tokens, N samples, L sparse layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vmoe.data.seeding import derive_seed
from vmoe.distributed.process_group import gather_lists
from vmoe.evaluation.attacks import MOST_TARGETS, Logits, apgd, apgd_t, cross_entropy, hits, pgd
from vmoe.evaluation.classification import num_skipped
from vmoe.evaluation.config import AdversarialConfig
from vmoe.evaluation.inference import changed
from vmoe.evaluation.results_file import Outcome
from vmoe.evaluation.synchronized import Rows
from vmoe.moe.record import LayerRouting, record_routing


def random_starts(pixels: Tensor, index_B: Tensor, seed: int, count: int = MOST_TARGETS) -> Tensor:
    """(count, *pixels.shape), noise uniform in -1..1 of each image by its index in the data and the seed."""
    seeds = [derive_seed(seed, index) for index in index_B.tolist()]
    shape = (count, *pixels.shape[1:])
    draws = [torch.rand(shape, generator=torch.Generator().manual_seed(one)) for one in seeds]
    return torch.stack(draws, dim=1).to(pixels) * 2 - 1


def attacked_images(
    name: str, score: Logits, pixels: Tensor, label_B: Tensor, noise: Tensor, epsilon: float, config: AdversarialConfig
) -> Tensor:
    """Images, which are classified rightly, after an attack of `config.attacks`; call it inside `evaluating`.

    `noise` is that of `random_starts`: "apgd_t" begins with another one for each target.
    """
    start = (noise[0], epsilon, config.steps)
    if name == "pgd":
        step = epsilon * (2.5 / config.steps if config.step_size is None else config.step_size)
        return pgd(score, pixels, label_B, *start, step)
    if name == "apgd_t":
        return apgd_t(score, pixels, label_B, noise, epsilon, config.steps)
    return apgd(score, cross_entropy, pixels, label_B, label_B, *start)[0]


def evaluate_attacks(
    model: nn.Module, score: Logits, loader: Iterable[dict[str, Tensor]], config: AdversarialConfig, device: Any
) -> Outcome:
    """The outcome of all attacks at all epsilons; call it inside `evaluating`.

    `loader` gives "image" with pixels in 0..1, "label" and "index"; `score` takes such images. Images that are
    classified wrongly are not attacked, and count as wrong under every attack.
    """
    settings = [(name, text) for text in config.values for name in config.attacks]
    rows, layers = Rows(), []
    for batch in loader:
        pixels, label_B = batch["image"].to(device), batch["label"].to(device)
        with record_routing(model) as clean:
            hit_B = hits(score(pixels), label_B)
        layers, first_L = list(clean.layers), [_first_choices(call)[hit_B] for call in clean.layers.values()]
        hit_BS = hit_B[:, None].repeat(1, len(settings) + 1)
        moved_BSL = torch.full((len(label_B), len(settings), len(layers)), torch.nan, device=device)
        pixels, label, index = pixels[hit_B], label_B[hit_B], batch["index"].to(device)[hit_B]
        for number, (name, text) in enumerate(settings if len(index) else ()):
            with changed(model.parameters(), requires_grad=False):  # spares their gradients
                noise = random_starts(pixels, index, config.seed, MOST_TARGETS if name == "apgd_t" else 1)
                images = attacked_images(name, score, pixels, label, noise, config.values[text], config)
            with record_routing(model) as record:
                hit_BS[hit_B, number + 1] = hits(score(images), label)
            for layer, (first_BT, call) in enumerate(zip(first_L, record.layers.values(), strict=True)):
                moved_BSL[hit_B, number, layer] = (_first_choices(call) != first_BT).float().mean(dim=1)
        rows.add(batch["index"], label_N=label_B, hit_NS=hit_BS, moved_NSL=moved_BSL)
    index_N, columns = rows.gather()
    counts = {"num_samples": len(index_N), "num_skipped": num_skipped(loader, len(index_N))}
    names, hit_SN = ["top1", *map("_".join, settings)], columns["hit_NS"].T
    samples = {"index": index_N, "label": columns["label_N"], **dict(zip(names, hit_SN.int(), strict=True))}
    moved_SL = columns["moved_NSL"].nanmean(0).tolist()
    results, points = _results(settings, config.values, hit_SN, moved_SL, gather_lists([layers])[0])
    return Outcome(results | counts, {"points": points}, samples=samples)


def _first_choices(call: LayerRouting) -> Tensor:
    """(B, T), the first expert of each token; for other routers than top_k the one with the largest gate. Of an
    ensemble, those of all copies."""
    return call.by_image(call.expert_index[..., :1]).flatten(1)


def _results(
    settings: list[tuple[str, str]], values: dict[str, float], hit_SN: Tensor, moved_SL: list, layers: list[str]
) -> tuple[dict[str, float | int], list[dict[str, Any]]]:
    """Flat metrics, and all of each setting."""
    top1_S = hit_SN.double().mean(1).tolist()
    results, points = {"top1": top1_S[0]}, []
    for (name, text), top1, moved_L in zip(settings, top1_S[1:], moved_SL, strict=True):
        results[f"top1_{name}_{text}"] = top1
        error = (top1 * (1 - top1) / hit_SN.shape[1]) ** 0.5  # binomial
        point = {"attack": name, "epsilon": text, "epsilon_value": values[text], "top1": top1, "top1_error": error}
        shares = {layer: moved for layer, moved in zip(layers, moved_L, strict=True) if not math.isnan(moved)}
        points.append({**point, "routing_changed": shares})
    several = len({name for name, _ in settings}) > 1
    for text in values if several else ():
        own = [number + 1 for number, setting in enumerate(settings) if setting[1] == text]
        results[f"top1_all_{text}"] = float(hit_SN[own].all(0).double().mean())
    return results, points
