"""Freezing, and timm's optimizers, schedules and moving averages."""

import copy
import dataclasses
import difflib
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import timm.optim
import torch
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from vmoe.distributed.parallelize import is_sharded, split_groups
from vmoe.models.dense_mlp import UpcycleError
from vmoe.models.factory import create_model, find_weights
from vmoe.models.serialization import checkpoint_weights
from vmoe.models.upcycle_optimizer import upcycle_optimizer
from vmoe.moe.experts import has_adapters
from vmoe.moe.record import unwrap
from vmoe.training.checkpoint import add_stored_projection, load_checkpoint
from vmoe.training.config import Config, OptimConfig
from vmoe.training.distill import PROJECTION
from vmoe.training.lora import add_lora
from vmoe.training.muon import Muon, divide_stacks, not_for_muon
from vmoe.utils.config import ConfigError, read_config

# timm's optimizers that take the same steps on sharded weights, with state that is sharded like them
# (tests/distributed/test_optimizers.py). Others need whole matrices, or operations that PyTorch's DTensor lacks.
SHARDABLE = (
    *("adabelief", "adagrad", "adam", "adamax", "adamw", "adan", "adanw", "adopt", "adoptw", "laprop", "lars", "lion"),
    *("madgrad", "momentum", "nadam", "nadamw", "nesterov", "radam", "rmsprop", "rmsproptf", "sgd", "sgdw"),
)


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Freezes the parameters whose names match a shell pattern, except those of later ones that begin with "!";
    returns their names.

    Running statistics of normalisations still update. A ConfigError: a pattern that matches no parameter, or nothing
    left to train.
    """
    names, frozen = [name for name, _ in model.named_parameters()], []
    for pattern in patterns:
        matching = [name for name in names if fnmatchcase(name, pattern.removeprefix("!"))]
        if not matching:
            nearest = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)[0]
            raise ConfigError(f"train.freeze: {pattern!r} matches no parameter; the nearest name is {nearest!r}")
        frozen = [name for name in frozen if name not in matching] if pattern.startswith("!") else frozen + matching
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"train.freeze {list(patterns)} leaves nothing to train")
    return frozen


def choose_trained(model: nn.Module, config: Config) -> None:
    """Adds the adapters of a config, and freezes what it freezes; a ConfigError if the model has no such part."""
    if (lora := config.lora).targets:
        try:
            add_lora(model, lora.targets, lora.r, lora.alpha)
        except ValueError as error:
            raise ConfigError(f"lora.targets: {error}") from error
    freeze(model, config.train.freeze)


def param_groups(
    model: nn.Module, weight_decay: float = 0.05, layer_decay: float | None = None, optimizer: str = "adamw"
) -> list[dict[str, Any]]:
    """Groups of a model's trainable parameters for an optimizer of timm or PyTorch.

    Args:
        weight_decay: for all but biases, norms and `model.no_weight_decay()`.
        layer_decay: factor on the learning rate ("lr_scale", which timm's schedulers apply) from each layer to the one
            below it.
        optimizer: timm's name of it. "muon" and its relatives (also for `torch.optim.Muon`) leave hidden matrices to
            Muon, those of experts in groups with "per_expert": True, which `vmoe.training.muon.Muon` and `TorchMuon`
            take; groups with "use_fallback": True are for AdamW.

    A ConfigError: Muon for weights that are sharded, or for adapters, whose experts lie in one matrix.
    """
    model = unwrap(model)  # the names are those of the model itself
    settings = {"weight_decay": weight_decay, "no_weight_decay_list": getattr(model, "no_weight_decay", set)()}
    muon = is_muon(optimizer)
    if muon:
        if is_sharded(model) or has_adapters(model):
            kind = "sharded weights" if is_sharded(model) else "adapters, which hold all experts in one matrix"
            raise ConfigError(f"{optimizer} orthogonalises whole matrices and cannot take {kind}: use adamw")
        settings["fallback_list"] = not_for_muon(model)
    if layer_decay is None:
        groups = timm.optim.param_groups_weight_decay(model, **settings)
    else:
        groups = timm.optim.param_groups_layer_decay(model, layer_decay=layer_decay, **settings)
    return divide_stacks(model, groups) if muon else groups


def is_muon(optimizer: str) -> bool:
    """Whether a name of timm's, without "lookahead_", is one of Muon's; a ValueError if timm does not have it."""
    return timm.optim.get_optimizer_info(optimizer).opt_class is timm.optim.Muon


def is_fused(config: OptimConfig) -> bool:
    """Whether a step is one kernel instead of ten passes over the weights: Adam's and AdamW's, unless kwargs forbid."""
    has_kernel = timm.optim.get_optimizer_info(base_name(config)).opt_class in (torch.optim.Adam, torch.optim.AdamW)
    return bool(config.kwargs.get("fused", has_kernel and not config.kwargs.get("foreach")))


def base_name(config: OptimConfig) -> str:
    """timm's name of an optimizer, without Lookahead."""
    return config.name.lower().removeprefix("lookahead_")


def create_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """The optimizer of a config for the trainable parameters, or a ConfigError."""
    name = base_name(config)
    if name not in timm.optim.list_optimizers():
        nearest = difflib.get_close_matches(name, timm.optim.list_optimizers(), n=1, cutoff=0.0)
        raise ConfigError(f"optim.name: timm has no optimizer {config.name!r}; the nearest is {nearest[0]!r}")
    if is_sharded(model) and config.name.lower() not in SHARDABLE:
        raise ConfigError(
            f"optim.name {config.name!r} does not work on sharded weights (parallel.dp_shard or parallel.ep above 1); "
            f"take one of {', '.join(SHARDABLE)}"
        )
    optional = {"betas": config.betas and tuple(config.betas), "eps": config.eps}
    kwargs = {name: value for name, value in optional.items() if value is not None} | config.kwargs
    create, info = timm.optim.create_optimizer_v2, timm.optim.get_optimizer_info(name)
    if is_fused(config):
        kwargs["fused"] = True
    if is_muon(name):  # made by timm, with our class
        registry = timm.optim.OptimizerRegistry()
        registry.register(dataclasses.replace(info, opt_class=Muon))
        create = registry.create_optimizer
    decay = {"weight_decay": config.weight_decay, "layer_decay": config.layer_decay}
    groups = partial(param_groups, **decay, optimizer=name)
    rates = {"lr": config.lr, "momentum": config.momentum}
    try:
        optimizer = create(model, opt=config.name, param_group_fn=groups, **rates, **kwargs)
    except TypeError as error:
        raise ConfigError(f"optim.kwargs do not suit the optimizer {config.name!r}: {error}") from error
    if is_sharded(model):
        split_groups(optimizer)
    return optimizer


def carry_over_optimizer(pretrained: str, model: nn.Module, optimizer: Optimizer) -> None:
    """Gives a new optimizer the state of a run (or checkpoint), from whose model `model` is upcycled, or a copy."""
    checkpoint = find_weights(pretrained).parent
    run_config = checkpoint.parent.parent / "config.yaml"
    if not run_config.is_file():
        raise ConfigError(
            f"model.pretrained_optimizer needs model.pretrained to be a run's folder or checkpoint, and {run_config} "
            "does not exist; set it to false to start the optimizer from scratch"
        )
    before = read_config(Config, ["--config", str(run_config)])
    old_model = create_model(pretrained=checkpoint_weights(checkpoint))
    freeze(old_model, before.train.freeze)
    add_stored_projection(checkpoint, old_model)
    old_optimizer = create_optimizer(old_model, before.optim)
    load_checkpoint(checkpoint, old_model, None, old_optimizer)
    old_model._modules.pop(PROJECTION, None)  # the new model's, if it has one, starts afresh
    try:
        upcycle_optimizer(old_optimizer, old_model, model, optimizer)
    except UpcycleError as error:
        raise ConfigError(f"model.pretrained_optimizer: {error}") from error


def create_schedule(optimizer: Optimizer, config: OptimConfig, steps: int) -> Scheduler:
    """The learning rate over the steps; a function of the step alone: call `.step_update(steps done)`."""
    name, kwargs = config.schedule, dict(config.schedule_kwargs)
    warmup = int(config.warmup_steps if config.warmup_steps >= 1 else config.warmup_steps * steps)
    if name == "constant":  # only the newest versions of timm have it
        name, kwargs = "step", {**kwargs, "decay_rate": 1.0}
    rates = {"warmup_lr": config.warmup_lr, "min_lr": config.min_lr}
    # timm's epochs are our steps.
    epochs = {"num_epochs": steps, "warmup_epochs": warmup, "step_on_epochs": False, "updates_per_epoch": 1}
    try:
        schedule, _ = create_scheduler_v2(optimizer, sched=name, **rates, **epochs, **kwargs)
    except TypeError as error:
        raise ConfigError(f"optim.schedule_kwargs do not suit the schedule {config.schedule!r}: {error}") from error
    return schedule


def create_ema(model: nn.Module, decay: float, shard: Callable[[nn.Module], object] | None = None) -> ModelEmaV3:
    """timm's moving average, with warm-up, of a model that is not sharded yet; `shard` shards the average too."""
    if shard is None:
        return ModelEmaV3(model, decay, use_warmup=True)
    average = copy.deepcopy(model).eval()
    shard(average)
    # timm copies its model, and a sharded one cannot be copied; foreach takes no tensors on several meshes.
    ema = ModelEmaV3(nn.Linear(1, 1), decay, use_warmup=True, foreach=False)
    ema.module = average
    return ema
