"""One sparse model at several expert capacities: accuracy, cost and speed, after V-MoE (arXiv 2106.05974, section 4).

Batch-prioritized routing (BPR) keeps the tokens with the largest gates, vanilla routing those that come first. Which
tokens are dropped depends on the routing group: `capacity.images_per_group` images, consecutive in the data.

Shapes, by suffix: B images of a group, N samples, S settings, L layers, C classes, D width, R rows, E experts.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vmoe.distributed.process_group import gather_lists
from vmoe.evaluation.classification import num_skipped, right_classes, together
from vmoe.evaluation.config import CapacityConfig
from vmoe.evaluation.inference import changed
from vmoe.evaluation.metrics import ranks, top_shares
from vmoe.evaluation.synchronized import Rows
from vmoe.models.flops import forward_flops
from vmoe.moe import SparseMoE
from vmoe.moe.layer import routers_where
from vmoe.moe.record import LayerRouting, record_routing
from vmoe.utils.config import ConfigError
from vmoe.utils.world import world

Score = Callable[[Tensor], Tensor]  # images (B, 3, H, W) -> scores of the classes (B, C)


class Setting(NamedTuple):
    """What is set on every sparse layer."""

    curve: str  # order of dispatch: "bpr", "vanilla"; "both" without a limit, which gives the same; "experts" choose
    factor: float | None  # eval_capacity_factor; None: no limit


class Point(NamedTuple):
    """The results of one setting, whose curve and factor come first."""

    curve: str
    factor: float | None
    top1: float  # share of the images, 0..1
    top1_error: float  # its binomial standard error, sqrt(p (1 - p) / N)
    top5: float | None  # None with five classes or fewer
    share_dropped: float  # of the choices of an expert, over all layers; for expert choice, tokens that no expert took
    gflops_per_image: float  # 10^9 operations of the forward pass, counting the rows that the experts kept
    images_per_second: dict[str, float] | None  # "median", "lower_quartile", "upper_quartile"; None: not timed


class Gain(NamedTuple):
    """Top-1 of BPR less that of vanilla routing, on the same images."""

    factor: float | None  # None: the mean over all factors below 1
    gain: float
    error: float  # standard error, from the differences of the single images


class Sweep(NamedTuple):
    """The result of :func:`sweep_capacity`."""

    points: list[Point]  # in the order of the settings
    gains: list[Gain]  # for each factor, and in the mean below 1
    num_samples: int
    num_skipped: int


def sparse_image_layers(model: nn.Module, score: Score, images: Tensor, source: str) -> dict[str, SparseMoE]:
    """{name: layer} of the sparse layers that images (any, for example zeros) go through; call it inside `evaluating`.

    ConfigError: there are none, or they cannot be swept together; `source` names the model.
    """
    with record_routing(model) as record:
        score(images)
    modules = dict(model.named_modules())
    layers = {name: modules[name] for name in record.layers}
    routers = {layer.router_type for layer in layers.values()}
    if len(routers) != 1 or any(layer.soft for layer in layers.values()):  # soft routing drops nothing
        found = f"router {' and '.join(sorted(routers))}" if routers else "none (a dense model)"
        needed = f"task 'capacity' needs experts that images go through, with {routers_where('soft', False)}"
        raise ConfigError(f"{needed}, and {source} has {found}")
    return layers


def sweep_settings(config: CapacityConfig, layers: Mapping[str, SparseMoE]) -> list[Setting]:
    """The settings of a sweep; ConfigError: no limit for expert choice."""
    if next(iter(layers.values())).per_token:
        curves = {factor: ("both",) if factor is None else ("bpr", "vanilla") for factor in config.factors}
        return [Setting(curve, factor) for factor, own in curves.items() for curve in own]
    if None in config.factors:
        problem = "holds null (no limit), and the model has router='expert_choice', which always has a capacity"
        raise ConfigError(f"capacity.factors {problem}: give numbers alone, as in '[0.25, 0.5, 1, 2]'")
    return [Setting("experts", factor) for factor in config.factors]


def limited(layers: Iterable[SparseMoE], setting: Setting) -> AbstractContextManager[None]:
    """The layers under a setting inside the block.

    All tokens of a call are one group, but expert choice keeps the model's groups (usually a group for each image).
    """
    values = {"capacity": None, "eval_capacity_factor": setting.factor}
    if setting.curve != "experts":
        values["group_size"] = None
    if setting.curve in ("bpr", "vanilla"):
        values["batch_priority"] = setting.curve == "bpr"
    return changed(layers, **values)


def sweep_capacity(
    model: nn.Module,
    score: Score,
    loader: Iterable[dict[str, Tensor]],
    layers: Mapping[str, SparseMoE],
    settings: Sequence[Setting],
    device: torch.device | str,
    label_sets: Sequence[Sequence[int]] | None = None,
    timing_rounds: int = 0,
) -> Sweep:
    """Every setting on every batch, each a routing group; call it inside `evaluating`.

    `loader` gives "image", "label" and "index"; where torch.distributed runs, each process gives batches of its own.
    Each setting is timed `timing_rounds` times on the first batch. For `label_sets` see `right_classes`. ValueError: a
    label is out of range, or there are no samples.
    """
    counts_SL3 = torch.zeros(len(settings), len(layers), 3, dtype=torch.long)  # see `_count`
    rows, num_classes, flops, first, speeds = Rows(), 0, None, None, [None] * len(settings)
    for batch in loader:
        images, rank_S = batch["image"].to(device), []
        if first is None:
            first, flops = images, _flops(score, layers, images[:1])
        for number, setting in enumerate(settings):
            with limited(layers.values(), setting), record_routing(model) as record:
                scores_BC = together(score(images))
            counts_SL3[number] += torch.tensor([_count(record.layers[name]) for name in layers])
            num_classes = scores_BC.shape[1]
            right_BC = right_classes(batch["label"].to(device), batch["index"], num_classes, label_sets)
            rank_S.append(ranks(scores_BC, right_BC).cpu())
        rows.add(batch["index"], rank_NS=torch.stack(rank_S, dim=1))
    if timing_rounds and first is not None and world()[0] == 0:  # the others wait below
        speeds = _time(score, layers, settings, first, timing_rounds)
    index_N, columns = rows.gather()
    skipped = num_skipped(loader, len(index_N))
    # Processes without a batch know nothing of these; the first has one.
    (fixed_flops, row_flops_L), num_classes, speeds = gather_lists([(flops, num_classes, speeds)])[0]
    points = []
    for setting, rank_N, count_L3, speed in zip(
        settings, columns["rank_NS"].T, sum(gather_lists([counts_SL3])), speeds, strict=True
    ):
        asked, dropped, _ = count_L3.sum(0).tolist()
        flops = fixed_flops + int(count_L3[:, 2] @ row_flops_L) / len(rank_N)
        shares = top_shares(rank_N, num_classes)
        error = (shares["top1"] * (1 - shares["top1"]) / len(rank_N)) ** 0.5
        points.append(Point(*setting, shares["top1"], error, shares.get("top5"), dropped / asked, flops / 1e9, speed))
    return Sweep(points, _gains(settings, columns["rank_NS"] == 0), len(index_N), skipped)


def _count(call: LayerRouting) -> tuple[int, int, int]:
    """(choices asked for, those dropped, rows that the experts computed), see `Point.share_dropped`."""
    tokens, rows = int(call.mask.sum()), int(call.load.sum())
    if call.routing.per_token:
        asked = tokens * call.kept.shape[-1]
        return asked, asked - rows, rows
    return tokens, tokens - int((call.kept.any(-1) & call.mask).sum()), rows


def _compute_nothing(width: int, _run: Callable, x_RD: Tensor, *_) -> Tensor:
    """Takes the place of `Experts.exchange`."""
    return x_RD.new_zeros(len(x_RD), width)


def _flops(score: Score, layers: Mapping[str, SparseMoE], image_1CHW: Tensor) -> tuple[int, Tensor]:
    """Operations of one image outside the experts, and (L,) those of one row of each layer's experts.

    Separately, since the number of rows depends on the images, and on some devices more are computed than were kept.
    """
    row_flops = []
    with ExitStack() as stack:
        for layer in layers.values():
            x_1D = image_1CHW.new_zeros(1, layer.in_features)
            count_E = torch.eye(1, layer.num_experts, dtype=torch.long, device=x_1D.device)[0]
            row_flops.append(forward_flops(partial(layer.experts, x_1D, count_E)))
            stack.enter_context(changed([layer.experts], exchange=partial(_compute_nothing, layer.out_features)))
        return forward_flops(partial(score, image_1CHW)), torch.tensor(row_flops)


def _time(
    score: Score, layers: Mapping[str, SparseMoE], settings: Sequence[Setting], images: Tensor, rounds: int
) -> list[dict[str, float]]:
    """The speed of each setting; rounds of all in new orders, so that other load on the machine affects them alike."""
    seconds_RS = torch.zeros(rounds + 1, len(settings), dtype=torch.float64)
    orders = random.Random(0)
    for seconds_S in seconds_RS:  # the first round warms up
        for number in orders.sample(range(len(settings)), len(settings)):
            with limited(layers.values(), settings[number]):
                start = time.perf_counter()
                score(images).cpu()  # waits for the device
                seconds_S[number] = time.perf_counter() - start
    quantiles = {"median": 0.5, "lower_quartile": 0.25, "upper_quartile": 0.75}
    speeds_QS = (len(images) / seconds_RS[1:]).quantile(seconds_RS.new_tensor(list(quantiles.values())), dim=0)
    return [dict(zip(quantiles, speeds)) for speeds in speeds_QS.T.tolist()]


def _gains(settings: Sequence[Setting], hit_NS: Tensor) -> list[Gain]:
    """See `Sweep.gains`."""
    hit_of = dict(zip(settings, hit_NS.double().T))
    better_of = {
        setting.factor: hit_N - hit_of[Setting("vanilla", setting.factor)]
        for setting, hit_N in hit_of.items()
        if setting.curve == "bpr"
    }
    below = [better_N for factor, better_N in better_of.items() if factor < 1]
    if below:
        better_of[None] = torch.stack(below).mean(0)
    return [
        Gain(factor, float(better_N.mean()), float(better_N.std(correction=0) / len(better_N) ** 0.5))
        for factor, better_N in better_of.items()
    ]
