"""One sparse model at several expert capacities: accuracy, cost and speed.

After V-MoE (arXiv 2106.05974, section 4). Batch-prioritized routing (BPR) keeps the tokens with the largest gates,
vanilla routing those that come first. Which tokens are dropped depends on who is routed together, so the routing group
is part of the measurement: `capacity.images_per_group` images, consecutive in the data, are one call and one group.

Shapes, by suffix: B images of a group, N samples, S settings, C classes, D width, R rows, E experts.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vmoe.distributed.process_group import gather_lists
from vmoe.evaluation.classification import right_classes, select_columns
from vmoe.evaluation.config import CapacityConfig
from vmoe.evaluation.inference import evaluating
from vmoe.evaluation.metrics import ranks, top_shares
from vmoe.evaluation.synchronized import gather_rows
from vmoe.models.flops import forward_flops
from vmoe.moe import SparseMoE
from vmoe.moe.record import LayerRouting, record_routing
from vmoe.utils.config import ConfigError
from vmoe.utils.world import world

Score = Callable[[Tensor], Tensor]  # images (B, 3, H, W) -> scores of the classes (B, C)


class Setting(NamedTuple):
    """What is set on every sparse layer."""

    num_selected_experts: int | None  # K; None for expert choice, which has none
    batch_priority: bool | None  # BPR; None where it changes nothing: without a limit, and for expert choice
    factor: float | None  # eval_capacity_factor; None: no limit

    @property
    def curve(self) -> str:
        """Name of its order of dispatch: "bpr", "vanilla" or "experts" (expert choice); "both" without a limit."""
        if self.num_selected_experts is None:
            return "experts"
        return {True: "bpr", False: "vanilla", None: "both"}[self.batch_priority]


@dataclass
class Point:
    """The results of one setting."""

    setting: Setting
    top1: float  # share of the images, 0..1
    top1_error: float  # its binomial standard error, sqrt(p (1 - p) / N)
    top5: float | None  # None with five classes or fewer
    share_dropped: float  # of the choices of an expert, over all layers; for expert choice, tokens that no expert took
    gflops_per_image: float  # 10^9 operations of the forward pass, counting the rows that the experts kept
    images_per_second: tuple[float, float, float] | None  # median, lower and upper quartile; None: not timed
    dropped_by_layer: dict[str, float]  # {layer: share_dropped}


class Gain(NamedTuple):
    """Top-1 of BPR less that of vanilla routing, on the same images."""

    num_selected_experts: int
    factor: float | None  # None: the mean over all factors below 1
    gain: float
    error: float  # standard error, from the differences of the single images


class Sweep(NamedTuple):
    """The result of :func:`sweep_capacity`."""

    points: list[Point]  # in the order of the settings
    gains: list[Gain]  # for each K and factor, and for each K in the mean below 1
    num_samples: int
    num_skipped: int


def sparse_image_layers(model: nn.Module, score: Score, images: Tensor, source: str) -> dict[str, SparseMoE]:
    """{name: layer} of the sparse layers that images (any, for example zeros) go through; call it inside `evaluating`.

    Raises:
        ConfigError: there are none, or they cannot be swept together; `source` names the model.
    """
    with record_routing(model) as record:
        score(images)
    modules = dict(model.named_modules())
    layers = {name: modules[name] for name in record.layers}
    kinds = {(layer.router_type, layer.num_selected_experts) for layer in layers.values()}
    if not layers:
        raise ConfigError(
            f"task 'capacity' needs experts that images go through, and {source} has none (a dense model): "
            "evaluate a sparse model"
        )
    if "soft" in {router for router, _ in kinds}:
        raise ConfigError(
            f"task 'capacity' has no meaning for {source}: soft routing drops nothing (router='soft'); "
            "evaluate a model with router='top_k' or 'expert_choice'"
        )
    if len(kinds) > 1:
        raise ConfigError(
            f"task 'capacity' needs sparse layers of one kind, and {source} has router and num_selected_experts of "
            f"{sorted(kinds)}"
        )
    return layers


def sweep_settings(config: CapacityConfig, layers: Mapping[str, SparseMoE]) -> list[Setting]:
    """The settings of a sweep, without repetition.

    Raises:
        ConfigError: a setting that the model's router has no use for, or K beyond the number of experts.
    """
    layer = next(iter(layers.values()))
    if layer.router_type == "expert_choice":
        if config.num_selected_experts is not None:
            raise ConfigError(
                f"capacity.num_selected_experts {config.num_selected_experts} is for router='top_k', and the model has "
                "'expert_choice', where the capacity says how many experts a token gets; leave it out"
            )
        if None in config.factors:
            raise ConfigError(
                "capacity.factors holds null (no limit), and the model has router='expert_choice', which always has a "
                "capacity: give numbers alone, such as --capacity.factors '[0.25, 0.5, 1, 2]'"
            )
        return [Setting(None, None, factor) for factor in config.factors]
    choices = config.num_selected_experts or [layer.num_selected_experts]
    if max(choices) > layer.num_experts:
        raise ConfigError(
            f"capacity.num_selected_experts must be 1..num_experts ({layer.num_experts}), got {max(choices)}"
        )
    return [
        Setting(K, priority, factor)
        for K in choices
        for factor in config.factors
        for priority in ([True, False] if factor is not None else [None])
    ]


@contextmanager
def limited(layers: Iterable[SparseMoE], setting: Setting) -> Iterator[None]:
    """The layers under a setting inside the block, as they were after it.

    All tokens of a call are one group, but expert choice keeps the model's groups (usually a group for each image).
    """
    before: list[tuple[nn.Module, str, Any]] = []

    def change(module: nn.Module, **changes: Any) -> None:
        for name, value in changes.items():
            before.append((module, name, getattr(module, name)))
            setattr(module, name, value)

    try:
        for layer in layers:
            change(layer, capacity=None, eval_capacity_factor=setting.factor)
            if setting.num_selected_experts is not None:
                change(layer, group_size=None, num_selected_experts=setting.num_selected_experts)
                change(layer.router, num_selected_experts=setting.num_selected_experts)
            if setting.batch_priority is not None:
                change(layer, batch_priority=setting.batch_priority)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def sweep_capacity(
    model: nn.Module,
    score: Score,
    loader: Iterable[dict[str, Tensor]],
    layers: Mapping[str, SparseMoE],
    settings: Sequence[Setting],
    *,
    device: torch.device | str,
    precision: str = "float32",
    class_columns: Sequence[Sequence[int]] | None = None,
    label_sets: Sequence[Sequence[int]] | None = None,
    timing_rounds: int = 0,
) -> Sweep:
    """Every setting on every batch, each a routing group; the layers are as they were afterwards, also after an error.

    `loader` gives "image", "label" and "index"; where torch.distributed runs, each process gives batches of its own.
    Each setting is timed `timing_rounds` times on the first batch. For the other arguments see `predict`.

    Raises:
        ValueError: a label is out of range, or there are no samples.
    """
    counts_S3 = {name: torch.zeros(len(settings), 3, dtype=torch.long) for name in layers}  # see `_count`
    index, found, first, num_classes = [torch.empty(0, dtype=torch.long)], [], None, 0
    speeds: list = [None] * len(settings)
    with evaluating(model, device, precision):
        for batch in loader:
            images = batch["image"].to(device)
            first = images if first is None else first
            rank_S = []
            for number, setting in enumerate(settings):
                with limited(layers.values(), setting), record_routing(model) as record:
                    scores_BC = select_columns(score(images), class_columns)
                for name, call in record.layers.items():
                    counts_S3[name][number] += torch.tensor(_count(call))
                num_classes = scores_BC.shape[1]
                right_BC = right_classes(batch["label"].to(device), batch["index"], num_classes, label_sets)
                rank_S.append(ranks(scores_BC, right_BC).cpu())
            index.append(batch["index"])
            found.append(torch.stack(rank_S, dim=1))
        flops = _flops(model, score, layers, settings[0], first) if first is not None else (0, {})
        if timing_rounds and world()[0] == 0 and first is not None:
            speeds = _time(score, layers, settings, first, timing_rounds)
    _, rows = gather_rows(torch.cat(index), rank=torch.cat(found) if found else torch.empty(0, 0))
    num_skipped = sum(gather_lists([int(getattr(loader, "num_skipped", 0))]))
    if not len(rows["rank"]):
        raise ValueError(f"nothing to evaluate: the data set gave no sample ({num_skipped} were skipped)")
    # Processes without a batch measured nothing; the first has one.
    fixed, per_row, speeds, num_classes = gather_lists([(*flops, speeds, num_classes)])[0]
    counts_S3 = {name: sum(gather_lists([count_S3])) for name, count_S3 in counts_S3.items()}
    points = []
    for number, (setting, rank_N, speed) in enumerate(zip(settings, rows["rank"].T, speeds)):
        own = {name: count_S3[number].tolist() for name, count_S3 in counts_S3.items()}
        points.append(_point(setting, rank_N, num_classes, own, fixed, per_row, speed))
    return Sweep(points, _gains(settings, rows["rank"] == 0), len(rows["rank"]), num_skipped)


def _count(call: LayerRouting) -> tuple[int, int, int]:
    """(choices asked for, those dropped, rows that the experts computed), see `Point.share_dropped`."""
    tokens, rows = int(call.mask.sum()), int(call.load.sum())
    if call.routing.per_token:
        asked = tokens * call.kept.shape[-1]
        return asked, asked - rows, rows
    return tokens, tokens - int((call.kept.any(-1) & call.mask).sum()), rows


def _point(
    setting: Setting,
    rank_N: Tensor,
    num_classes: int,
    counts: Mapping[str, Sequence[int]],
    fixed_flops: int,
    row_flops: Mapping[str, int],
    speed: tuple[float, float, float] | None,
) -> Point:
    N, shares = len(rank_N), top_shares(rank_N, num_classes)
    top1 = shares["top1"]
    return Point(
        setting,
        top1,
        (top1 * (1 - top1) / N) ** 0.5,
        shares.get("top5"),
        sum(dropped for _, dropped, _ in counts.values()) / sum(asked for asked, _, _ in counts.values()),
        (fixed_flops + sum(rows * row_flops[name] for name, (_, _, rows) in counts.items()) / N) / 1e9,
        speed,
        {name: dropped / asked for name, (asked, dropped, _) in counts.items()},
    )


def _flops(
    model: nn.Module, score: Score, layers: Mapping[str, SparseMoE], setting: Setting, images: Tensor
) -> tuple[int, dict[str, int]]:
    """Operations of one image outside the experts, and {layer: operations of one row of its experts}.

    Separately, since the number of rows depends on the images, and on some devices more are computed than were kept.
    """
    calls: dict[nn.Module, tuple[Tensor, ...]] = {}

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        calls[module] = args

    hooks = [layer.experts.register_forward_pre_hook(keep) for layer in layers.values()]
    try:
        with limited(layers.values(), setting._replace(batch_priority=None)):
            outside = forward_flops(lambda: score(images[:1]))
    finally:
        for hook in hooks:
            hook.remove()
    per_row = {}
    for name, layer in layers.items():
        x_RD, count_E, *_ = calls[layer.experts]
        outside -= forward_flops(partial(layer.experts, x_RD, count_E))
        one_E = torch.zeros_like(count_E)
        one_E[0] = 1
        per_row[name] = forward_flops(partial(layer.experts, x_RD.new_zeros(1, x_RD.shape[1]), one_E))
    return outside, per_row


def _time(
    score: Score, layers: Mapping[str, SparseMoE], settings: Sequence[Setting], images: Tensor, rounds: int
) -> list[tuple[float, float, float]]:
    """(median, lower and upper quartile) of the images per second of each setting.

    Each round times all settings, in a new order, so that other load on the machine affects them alike.
    """
    order, shuffle = list(range(len(settings))), random.Random(0).shuffle
    seconds = torch.zeros(rounds + 1, len(settings), dtype=torch.float64)
    for round_ in range(rounds + 1):  # the first warms up
        shuffle(order)
        for number in order:
            with limited(layers.values(), settings[number]):
                _synchronize(images.device)
                start = time.perf_counter()
                score(images)
                _synchronize(images.device)
                seconds[round_, number] = time.perf_counter() - start
    speed_RS = len(images) / seconds[1:]
    lower_S, median_S, upper_S = speed_RS.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), dim=0)
    return list(zip(median_S.tolist(), lower_S.tolist(), upper_S.tolist()))


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def _gains(settings: Sequence[Setting], hit_NS: Tensor) -> list[Gain]:
    """See `Sweep.gains`."""
    hit_of = dict(zip(settings, hit_NS.double().T))
    better = {
        setting: hit_N - hit_of[setting._replace(batch_priority=False)]
        for setting, hit_N in hit_of.items()
        if setting.batch_priority
    }
    gains = [_gain(setting.num_selected_experts, setting.factor, better_N) for setting, better_N in better.items()]
    for K in dict.fromkeys(setting.num_selected_experts for setting in better):
        below = [each for setting, each in better.items() if setting.num_selected_experts == K and setting.factor < 1]
        if below:
            gains.append(_gain(K, None, torch.stack(below).mean(0)))
    return gains


def _gain(num_selected_experts: int, factor: float | None, better_N: Tensor) -> Gain:
    error = float(better_N.std(correction=0) / len(better_N) ** 0.5)
    return Gain(num_selected_experts, factor, float(better_N.mean()), error)
