"""One sparse model with more and less room in its experts: accuracy, cost and speed.

After V-MoE (arXiv 2106.05974, section 4). With little room an expert drops patches. Batch-prioritized routing lets
the patches with the largest gates go first, vanilla routing lets those go first that come first. Which patches are
dropped depends on who is routed together, so the routing group is part of the measurement: each call takes
`capacity.images_per_group` pictures, next to each other in the data, and their tokens are one group.

Shapes, by suffix: B pictures of a group, N samples, S settings, C classes, D width, R rows, E experts.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vmoe.evaluation.classification import right_classes, select_columns
from vmoe.evaluation.config import CapacityConfig
from vmoe.evaluation.gather import gather_lists, gather_rows
from vmoe.evaluation.inference import evaluating
from vmoe.evaluation.metrics import ranks, top_shares
from vmoe.models.flops import forward_flops
from vmoe.moe import SparseMoE
from vmoe.moe.record import LayerRouting, record_routing
from vmoe.utils.config import ConfigError
from vmoe.utils.world import world

Score = Callable[[Tensor], Tensor]  # pictures (B, 3, H, W) -> scores of the classes (B, C)


class Setting(NamedTuple):
    """What is set on every sparse layer.

    Attributes:
        num_selected_experts: K; None for expert choice, which has none.
        batch_priority: BPR; None where it changes nothing: without a limit, and for expert choice.
        factor: eval_capacity_factor; None: no limit.
    """

    num_selected_experts: int | None
    batch_priority: bool | None
    factor: float | None

    @property
    def curve(self) -> str:
        """Name of its order of dispatch: "bpr", "vanilla" or "experts" (expert choice); "both" without a limit."""
        if self.num_selected_experts is None:
            return "experts"
        return {True: "bpr", False: "vanilla", None: "both"}[self.batch_priority]


@dataclass
class Point:
    """What one setting gave.

    Attributes:
        setting: the setting.
        top1: share of the pictures, 0..1; so is top5, None with five classes or fewer.
        top1_error: its binomial standard error, sqrt(p (1 - p) / N).
        share_dropped: share of the choices of an expert that had no room, over all sparse layers; for expert choice, of
            tokens that no expert took.
        gflops_per_image: 10^9 operations of the forward pass, counting the rows that the experts kept.
        images_per_second: median over the rounds, with the quartiles around it; None: not timed.
        dropped_by_layer: {layer: share_dropped}.
    """

    setting: Setting
    top1: float
    top1_error: float
    top5: float | None
    share_dropped: float
    gflops_per_image: float
    images_per_second: tuple[float, float, float] | None
    dropped_by_layer: dict[str, float]


class Gain(NamedTuple):
    """Accuracy of BPR less that of vanilla routing, on the same pictures.

    Attributes:
        num_selected_experts: K.
        factor: the capacity factor; None: the mean over all factors below 1.
        gain: difference of top-1.
        error: its standard error, from the differences of the single pictures.
    """

    num_selected_experts: int
    factor: float | None
    gain: float
    error: float


class Sweep(NamedTuple):
    """The result of :func:`sweep_capacity`.

    Attributes:
        points: in the order of the settings.
        gains: of BPR over vanilla routing, for each K and factor, and for each K in the mean below 1.
        num_samples: N.
        num_skipped: samples that could not be read.
    """

    points: list[Point]
    gains: list[Gain]
    num_samples: int
    num_skipped: int


def sparse_image_layers(model: nn.Module, score: Score, images: Tensor, source: str) -> dict[str, SparseMoE]:
    """{name: layer} of the sparse layers that pictures go through; call it inside `evaluating`.

    Args:
        model: the model.
        score: runs it.
        images: any picture, (1, 3, H, W).
        source: name of the model for the messages.

    Raises:
        ConfigError: there are none, or they cannot be swept together.
    """
    with record_routing(model) as record:
        score(images)
    modules = dict(model.named_modules())
    layers = {name: modules[name] for name in record.layers}
    if not layers:
        raise ConfigError(
            f"task 'capacity' needs experts that pictures go through, and {source} has none (a dense model): "
            "evaluate a sparse model"
        )
    kinds = {layer.router_type for layer in layers.values()}
    if "soft" in kinds:
        raise ConfigError(
            f"task 'capacity' has no meaning for {source}: soft routing drops nothing (router='soft'); "
            "evaluate a model with router='top_k' or 'expert_choice'"
        )
    choices = {(layer.router_type, layer.num_selected_experts) for layer in layers.values()}
    if len(choices) > 1:
        raise ConfigError(
            f"task 'capacity' needs sparse layers of one kind, and {source} has router and num_selected_experts of "
            f"{sorted(choices)}"
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

    All tokens of a call are one group. Expert choice keeps the model's groups: each picture by itself, unless the model
    says otherwise.
    """
    before = []
    try:
        for layer in layers:
            changes = {"capacity": None, "eval_capacity_factor": setting.factor}
            if setting.num_selected_experts is not None:
                changes.update(group_size=None, num_selected_experts=setting.num_selected_experts)
                before.append((layer.router, "num_selected_experts", layer.router.num_selected_experts))
                layer.router.num_selected_experts = setting.num_selected_experts
            if setting.batch_priority is not None:
                changes["batch_priority"] = setting.batch_priority
            for name, value in changes.items():
                before.append((layer, name, getattr(layer, name)))
                setattr(layer, name, value)
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
    """Every setting on every batch; the layers are as they were afterwards, also after an error.

    Args:
        model: must be on `device`.
        score: runs `model`.
        loader: batches with "image", "label" and "index"; each batch is one routing group. Where torch.distributed
            runs, each process gives batches of its own.
        layers: see :func:`sparse_image_layers`.
        settings: see :func:`sweep_settings`.
        device: where the model runs.
        precision: "float32", "bf16" or "fp16".
        class_columns: see `vmoe.evaluation.classification.predict`; so is label_sets.
        timing_rounds: how often each setting is timed, on the first batch; 0: not at all.

    Raises:
        ValueError: a label is out of range, or there are no samples.
    """
    counts = {name: torch.zeros(len(settings), 3, dtype=torch.long) for name in layers}  # asked, dropped, rows
    index, found, first, num_classes = [], [], None, 0
    with evaluating(model, device, precision):
        for batch in loader:
            images, label_B = batch["image"].to(device), batch["label"].to(device)
            first = images if first is None else first
            rank_S = []
            for place, setting in enumerate(settings):
                with limited(layers.values(), setting), record_routing(model) as record:
                    scores_BC = select_columns(score(images), class_columns)
                for name, call in record.layers.items():
                    counts[name][place] += torch.tensor(_count(call))
                num_classes = scores_BC.shape[1]
                right_BC = right_classes(label_B, batch["index"], num_classes, label_sets)
                best_B = scores_BC.masked_fill(~right_BC, float("-inf")).amax(dim=1)
                rank_S.append(ranks(scores_BC, best_B, ~right_BC).cpu())
            index.append(batch["index"])
            found.append(torch.stack(rank_S, dim=1))
        fixed, per_row = _flops(model, score, layers, settings[0], first) if first is not None else (0, {})
        speeds: list = [None] * len(settings)
        if timing_rounds and world()[0] == 0 and first is not None:
            speeds = _time(score, layers, settings, first, timing_rounds)

    index = torch.cat(index) if index else torch.empty(0, dtype=torch.long)
    found = torch.cat(found) if found else torch.empty(0, len(settings), dtype=torch.long)
    index_N, rows = gather_rows(index, rank=found)
    num_skipped = sum(gather_lists([int(getattr(loader, "num_skipped", 0))]))
    N = len(index_N)
    if not N:
        raise ValueError(f"nothing to evaluate: the data set gave no sample ({num_skipped} were skipped)")
    # Processes without a batch measured nothing; the first has one.
    fixed, per_row, speeds, num_classes = gather_lists([(fixed, per_row, speeds, num_classes)])[0]
    counts = {name: sum(gather_lists([count_S3])) for name, count_S3 in counts.items()}
    points = []
    for place, setting in enumerate(settings):
        shares = top_shares(rows["rank"][:, place], num_classes)
        top1 = shares["top1"]
        own = {name: count_S3[place].tolist() for name, count_S3 in counts.items()}
        flops = fixed + sum(kept * per_row[name] for name, (_, _, kept) in own.items()) / N
        points.append(
            Point(
                setting,
                top1,
                (top1 * (1 - top1) / N) ** 0.5,
                shares.get("top5"),
                sum(dropped for _, dropped, _ in own.values()) / sum(asked for asked, _, _ in own.values()),
                flops / 1e9,
                speeds[place],
                {name: dropped / asked for name, (asked, dropped, _) in own.items()},
            )
        )
    return Sweep(points, _gains(settings, rows["rank"] == 0), N, num_skipped)


def _count(call: LayerRouting) -> tuple[int, int, int]:
    """(what was asked for, what of it was dropped, rows that the experts computed), see `Point.share_dropped`."""
    tokens, rows = int(call.mask.sum()), int(call.load.sum())
    if call.routing.per_token:
        asked = tokens * call.kept.shape[-1]
        return asked, asked - rows, rows
    return tokens, tokens - int((call.kept.any(-1) & call.mask).sum()), rows


def _flops(
    model: nn.Module, score: Score, layers: Mapping[str, SparseMoE], setting: Setting, images: Tensor
) -> tuple[int, dict[str, int]]:
    """Operations of one picture outside the experts, and {layer: operations of one row of its experts}.

    Counted apart, since how many rows the experts get depends on the pictures, and on some devices more are computed
    than were kept.
    """
    calls: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str):
        return lambda module, args: calls.__setitem__(name, args)

    hooks = [layer.experts.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    try:
        with limited(layers.values(), setting._replace(batch_priority=None)):
            total = forward_flops(lambda: score(images[:1]))
    finally:
        for hook in hooks:
            hook.remove()
    inside, per_row = 0, {}
    for name, layer in layers.items():
        x_RD, count_E, *_ = calls[name]
        inside += forward_flops(partial(layer.experts, x_RD, count_E))
        one_E = torch.zeros_like(count_E)
        one_E[0] = 1
        per_row[name] = forward_flops(partial(layer.experts, x_RD.new_zeros(1, x_RD.shape[1]), one_E))
    return total - inside, per_row


def _time(
    score: Score, layers: Mapping[str, SparseMoE], settings: Sequence[Setting], images: Tensor, rounds: int
) -> list[tuple[float, float, float]]:
    """(median, lower and upper quartile) of the pictures per second of each setting.

    Each round times all settings, in an order of its own, so that what else the machine does meets them alike.
    """
    order, shuffle = list(range(len(settings))), random.Random(0).shuffle
    seconds = torch.zeros(rounds + 1, len(settings), dtype=torch.float64)
    for round_ in range(rounds + 1):  # the first warms up
        shuffle(order)
        for place in order:
            with limited(layers.values(), settings[place]):
                _synchronize(images.device)
                start = time.perf_counter()
                score(images)
                _synchronize(images.device)
                seconds[round_, place] = time.perf_counter() - start
    speed_RS = len(images) / seconds[1:]
    lower_S, median_S, upper_S = speed_RS.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), dim=0)
    return list(zip(median_S.tolist(), lower_S.tolist(), upper_S.tolist()))


def _synchronize(device: torch.device) -> None:
    """Waits for what was started on a GPU."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def _gains(settings: Sequence[Setting], hit_NS: Tensor) -> list[Gain]:
    """See `Sweep.gains`."""
    place = {setting: index for index, setting in enumerate(settings)}
    pairs = [(s, hit_NS[:, i].double() - hit_NS[:, place[s._replace(batch_priority=False)]].double())
             for s, i in place.items() if s.batch_priority]  # fmt: skip
    gains = [Gain(s.num_selected_experts, s.factor, *_mean(better_N)) for s, better_N in pairs]
    for K in dict.fromkeys(s.num_selected_experts for s, _ in pairs):
        below = [better_N for s, better_N in pairs if s.num_selected_experts == K and s.factor < 1]
        if below:
            gains.append(Gain(K, None, *_mean(torch.stack(below).mean(0))))
    return gains


def _mean(values_N: Tensor) -> tuple[float, float]:
    """Mean and its standard error."""
    return float(values_N.mean()), float(values_N.std(correction=0) / len(values_N) ** 0.5)
