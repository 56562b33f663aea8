"""The training loop: build, continue, train, log, evaluate, save, finish. Read `train` top to bottom.

A step is a function of (config, step number, weights): its data is a function of the seed and the step, and its random
numbers (router noise, drop path, mixup) are seeded anew from both. So nothing depends on how often a run was stopped,
how often it evaluates, or how many workers read the data.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import random
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

import vmoe
from vmoe.data import TrainLoader, build_transform, train_loader
from vmoe.data.seeding import derive_seed
from vmoe.distributed.mesh import make_meshes, mesh_size
from vmoe.distributed.parallelize import (
    clip_grad_norm,
    is_sharded,
    parallelize,
    set_gradient_sync,
    split_groups,
    synchronize_numbers,
)
from vmoe.distributed.process_group import (
    SharedError,
    any_process,
    joined,
    mean_over_processes,
    set_timeout,
    sum_over_processes,
    wait_for_all,
)
from vmoe.evaluation.inference import arithmetic, attention_kernel, pick_device, pick_precision
from vmoe.inspection.plots import example_figure
from vmoe.models.factory import preprocess_config
from vmoe.models.flops import model_profile
from vmoe.models.serialization import WeightsError, checkpoint_weights
from vmoe.training.checkpoint import (
    Checkpointer,
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    remove_unfinished,
    step_of,
)
from vmoe.training.config import Config, to_yaml
from vmoe.training.config_check import check_same_settings
from vmoe.training.diagnosis import NonFiniteError, find_non_finite
from vmoe.training.logger import (
    CollapseWatch,
    DataWatch,
    MetricsLog,
    ProgressDisplay,
    expert_figures,
    final_table,
    routing_figures,
)
from vmoe.training.optim import create_ema, create_optimizer, create_schedule, freeze
from vmoe.training.pretrained import carry_over_optimizer
from vmoe.training.routing_images import RoutingPictures
from vmoe.training.run_dir import find_checkpoint, finished_summary, lock_folder, unlock_folder, write_text
from vmoe.training.signals import Stopped, StopRequest, TimeBudget, interruptible
from vmoe.training.tasks import Task, create_task
from vmoe.utils.config import ConfigError
from vmoe.utils.tables import make_console
from vmoe.utils.world import world

logger = logging.getLogger("vmoe.training")

# Steps in a row that the fp16 gradient scaler may skip; by then it has halved its scale to nothing.
MAX_SKIPPED_STEPS = 30


def train(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Trains a model, or continues a run that was stopped.

    Args:
        config: all settings.
        console: where progress and the final table are printed; None: standard output.

    Returns:
        The content of summary.json.

    Raises:
        ConfigError: settings that do not fit each other, the data, or the run in output_dir.
        NonFiniteError: the loss or gradient of a step is not finite; the message names the step and the layer.
        Stopped: a signal (see `interruptible`) or the end of `train.max_minutes`; if a step was made, after a
            checkpoint was saved.
        LostProcessError: another process of the job is gone, see `vmoe.distributed.process_group.joined`.
    """
    budget = TimeBudget(config.train.max_minutes)
    config.check()
    with interruptible() as stop:
        device = pick_device(config.device)
        with joined(device, config.parallel.timeout):
            check_same_settings(config)
            first = world()[0] == 0  # who speaks and writes for all processes
            return _train(config, device, console or make_console() if first else Console(quiet=True), budget, stop)


def _train(
    config: Config, device: torch.device, console: Console, budget: TimeBudget, stop: StopRequest
) -> dict[str, Any]:
    rank, processes = world()
    first = rank == 0
    parallel = config.parallel
    size = mesh_size(parallel.dp_replicate, parallel.dp_shard, parallel.ep, processes)
    run = Path(config.output_dir)
    checkpoint = find_checkpoint(run, config)
    if checkpoint is not None and (summary := finished_summary(run, step_of(checkpoint), config.train.steps)):
        console.print(
            f"{run}: this run is finished ({summary['steps']} steps). A larger train.steps continues it; another "
            "output_dir starts a new one.",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        return summary

    # ---- build
    precision = pick_precision(config.train.precision, device)
    if config.train.num_threads is not None:
        torch.set_num_threads(config.train.num_threads)
    seed_everything(config.seed)
    task = create_task(config)
    # A continued run finds its model in the checkpoint; the file it once started from need not exist any more.
    pretrained = config.model.pretrained if checkpoint is None else str(checkpoint_weights(checkpoint))
    try:
        # Where the weights are sharded, the others get their part of what the first process makes.
        with nullcontext() if first or size.is_plain else torch.device("meta"):
            model = task.create_model(pretrained, continued=checkpoint is not None).train()
    except WeightsError as error:
        if checkpoint is None:
            raise
        raise CheckpointError(f"{error}; remove {checkpoint} to continue from the one before") from error
    if size.is_plain:
        model.to(device)
    if config.train.grad_checkpointing:
        model.set_grad_checkpointing()
    freeze(model, config.train.freeze)
    model.train()  # now that it is known what is frozen: a locked tower stays in evaluation mode
    profile = model_profile(model)
    spread = None
    if processes > 1:
        meshes = make_meshes(size, device)
        set_timeout([meshes.whole, meshes.dense], parallel.timeout)
        spread = partial(parallelize, meshes=meshes, device=device)
    ema = None
    if config.train.ema_decay is not None:
        ema = create_ema(model, config.train.ema_decay, None if size.is_plain else spread)
    forward = model if spread is None else spread(model)  # what is called in training; `model` holds the weights
    if config.train.compile:
        forward = torch.compile(forward)
    sharded = is_sharded(model)
    if sharded and precision == "fp16":
        raise ConfigError(
            "train.precision fp16 needs parallel.dp_shard = parallel.ep = 1; use bf16, which needs no scaler"
        )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = create_optimizer(model, config.optim)
    if sharded:
        split_groups(optimizer)
    if checkpoint is None and config.model.pretrained_optimizer:
        if sharded:
            raise ConfigError("model.pretrained_optimizer needs parallel.dp_shard = parallel.ep = 1; set it to false")
        carry_over_optimizer(config.model.pretrained, model, optimizer)
    schedule = create_schedule(optimizer, config.optim, config.train.steps)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    transform = build_transform(preprocess_config(model), config.data.augmentation)
    loader = train_loader(task.train_data, transform, task.tokenizer, config.data.loader, config.seed, device)

    # ---- continue
    step, progress = 0, {"seconds": 0.0, "loss": math.nan, "evaluation": {}, "evaluated": 0}
    if checkpoint is not None:
        state = load_checkpoint(checkpoint, model, ema and ema.module, optimizer)
        scaler.load_state_dict(state["scaler"])
        loader.load_state_dict(state["loader"])
        step, progress = state["step"], state["progress"]
        schedule.step_update(step)
        console.print(f"{run}: continuing after step {step}", highlight=False, markup=False, soft_wrap=True)

    wait_for_all()  # nobody looks for a run in the folder any more
    lock = None
    if first:
        lock = lock_folder(run)
        remove_unfinished(run)
        write_text(run / "config.yaml", to_yaml(config))
    log = MetricsLog(run if first else None, step, config.train.tensorboard)
    pictures = RoutingPictures(config, task, log)
    watch = CollapseWatch(config.train.collapse_after)
    data_watch = DataWatch(config.data.loader.num_workers)
    skipped = 0  # by the fp16 gradient scaler, in a row
    interval = Interval()

    checkpointer = Checkpointer(
        run, config.train.keep_last, config.train.keep_every, config.train.async_checkpoints, dataclasses.asdict(size)
    )

    def save() -> None:
        trainer = {
            "step": step,
            "scaler": scaler.state_dict(),
            "loader": whole_position(loader),
            "rng": {"seed": config.seed, "next_step": step},  # all there is: see seed_everything
            "progress": progress,
        }
        extra = {"class_names": task.class_names} if config.task == "classification" else {}
        if task.exif_orientation:
            extra["exif_orientation"] = True
        with budget.saving(), display.timing("checkpoint"):
            checkpointer.save(step, model, ema and ema.module, optimizer, trainer, extra)

    def evaluate() -> None:
        with display.timing("evaluation"):
            progress["evaluation"] = task.evaluate(model if ema is None else ema.module, device)
        progress["evaluated"] = step

    def loss_of(batch: dict[str, torch.Tensor], part: int, module: nn.Module):
        """(loss with the routing's own, loss of the task, routing record) of a batch of the present step."""
        number = part * processes + rank  # among the parts of a step that all processes compute
        seed_everything(config.seed, step, number)
        with vmoe.record_routing(model) as record, arithmetic(precision, device):
            loss = task.loss(module, batch, step * config.train.accumulate_steps * processes + number)
        return loss + record.auxiliary_loss().to(device), loss, record

    # ---- train
    every = {"evaluation": config.train.eval_every, "checkpoint": config.train.checkpoint_every}
    display = ProgressDisplay(console, step, config.train.steps, **every)
    try:
        with display, stop.between_steps():

            def stop_asked() -> list[float]:
                return [float(stop.interrupted or stop.orphaned), float(stop.planned or budget.used_up())]

            while step < config.train.steps:
                budget.next_step()
                # Data.
                started = time.perf_counter()
                batches = [next(loader) for _ in range(config.train.accumulate_steps)]
                waited = time.perf_counter() - started

                # Forward and backward; each batch gives its share of the gradient.
                losses = []
                for part, batch in enumerate(batches):
                    set_gradient_sync(forward, part == len(batches) - 1)
                    total, loss, record = loss_of(batch, part, forward)
                    with attention_kernel(precision, device):
                        scaler.scale(total / len(batches)).backward()
                    losses.append(torch.stack([total.detach(), loss.detach()]))
                synchronize_numbers(model)
                scaler.unscale_(optimizer)
                grad_norm = clip_grad_norm(trainable, config.train.clip_grad_norm or math.inf)

                # The one place where the CPU waits for the device, and the processes agree: nothing that is not finite
                # reaches the weights.
                own = [*torch.stack(losses).mean(0).tolist(), *stop_asked()]
                total, loss, interrupted, planned = mean_over_processes(own)
                norm = grad_norm.item()
                skipped = skipped + 1 if scaler.is_enabled() and not math.isfinite(norm) else 0
                if not math.isfinite(total) or (not math.isfinite(norm) and not 0 < skipped <= MAX_SKIPPED_STEPS):
                    raise non_finite_error(model, loss_of, batches, step, total, run)

                # Step. `lr` is the rate that this step used.
                lr = max(group["lr"] for group in optimizer.param_groups)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                step += 1
                schedule.step_update(step)
                vmoe.update_expert_bias(model)
                task.after_step(model)
                if ema is not None:
                    ema.update(model, step=step)
                seconds = time.perf_counter() - started
                progress["seconds"] += seconds
                progress["loss"] = loss
                interval.add(processes * sum(len(batch["image"]) for batch in batches), seconds, waited)
                display.advance(step, seconds)

                # Log, evaluate, save.
                last, figures = step == config.train.steps, {}
                if last or step % config.train.log_every == 0:
                    figures = {"loss": total, "task_loss": loss, "lr": lr, "grad_norm": norm, **interval.figures()}
                    data_watch.update(figures, loader.samples_per_second)
                    if scaler.is_enabled():
                        figures["grad_scale"] = scaler.get_scale()
                    figures |= {"bad_samples": whole_position(loader)["num_bad"]}
                    figures |= {**task.figures(model), **routing_figures(record)}
                    if config.train.tensorboard:
                        log.tensorboard(step, expert_figures(record))
                    watch.update(step, record.layers)
                    display.show(step, figures)
                if config.train.eval_every and (last or step % config.train.eval_every == 0):
                    try:
                        evaluate()
                    except Exception as error:  # bad validation data must not cost the training up to here
                        if processes == 1 or isinstance(error, SharedError):  # else the others cannot take part
                            save()
                        raise
                    figures |= {f"evaluation/{name}": value for name, value in progress["evaluation"].items()}
                    values = (f"{k} {v:.4f}" for k, v in progress["evaluation"].items() if isinstance(v, float))
                    display.message(f"step {step}: evaluation {', '.join(values)}")
                if processes == 1 or progress["evaluated"] == step:  # that took long: somebody may have asked again
                    interrupted, planned = mean_over_processes(stop_asked())
                if figures:
                    log.write(step, figures)
                del record  # it holds the graph of the auxiliary losses
                stopping = interrupted or planned
                if last or stopping or step % config.train.checkpoint_every == 0:
                    save()
                if pictures.due(step):  # after the checkpoint: nothing of it is lost
                    pictures.draw(step, model if ema is None else ema.module, device)
                if stopping and not last:
                    checkpointer.wait()
                    raise Stopped(
                        f"stopped after step {step} of {config.train.steps}; the same command continues the run",
                        planned=not interrupted,
                        agreed=True,
                    )
            checkpointer.wait()
            if config.train.eval_every and progress["evaluated"] != step:  # it failed when this step was made
                evaluate()
                log.write(step, {f"evaluation/{name}": value for name, value in progress["evaluation"].items()})
    finally:
        log.close()
        checkpointer.close()
        if lock is not None:
            unlock_folder(lock)

    # ---- finish
    model = model if ema is None else ema.module
    summary = {
        "model": config.model.name or config.model.pretrained,
        "task": config.task,
        "seed": config.seed,
        "steps": step,
        "precision": precision,
        **profile,
        "images_per_second": step * config.data.loader.batch_size * config.train.accumulate_steps / progress["seconds"],
        "train_seconds": progress["seconds"],
        "loss": progress["loss"],
        "evaluation": progress["evaluation"],
    }
    if first:
        write_text(run / "summary.json", json.dumps(summary, indent=2) + "\n")
    console.print(final_table(summary))
    if config.evaluate.examples:
        draw_examples(task, model, run / "examples.png" if first else None, config)
    console.print(f"all of it in {run}", highlight=False, markup=False, soft_wrap=True)
    return summary


def seed_everything(*seed: int) -> None:
    """Seeds torch, numpy and random from some integers; other integers give unrelated random numbers."""
    number = derive_seed(*seed)
    torch.manual_seed(number)
    np.random.seed(number & 0xFFFFFFFF)
    random.seed(number)


class Interval:
    """Throughput since the last time that it was asked for."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.images, self.seconds, self.waited = 0, 0.0, 0.0

    def add(self, images: int, seconds: float, waited: float) -> None:
        """Counts a step: its pictures, the time it took, and how much of that went into waiting for data."""
        self.images += images
        self.seconds += seconds
        self.waited += waited

    def figures(self) -> dict[str, float]:
        """{"images_per_second", "data_wait_share" (0..1)} of the steps counted since the last call."""
        result = {"images_per_second": self.images / self.seconds, "data_wait_share": self.waited / self.seconds}
        self._reset()
        return result


def non_finite_error(model: nn.Module, loss_of, batches, step: int, loss: float, run: Path) -> NonFiniteError:
    """The error for a step whose loss or gradient is not finite: repeats its batches to find the first such value."""
    place, found = None, False
    for part, batch in enumerate(batches):
        if not found:
            place = find_non_finite(model, lambda b=batch, p=part: loss_of(b, p, model)[0], batch, any_process)
            found = any_process(place is not None)
    what = "gradient" if math.isfinite(loss) else f"loss ({loss})"
    checkpoints = list_checkpoints(run)
    kept = f"the last good checkpoint is {checkpoints[-1]}" if checkpoints else "no checkpoint was saved yet"
    if place is None:
        place = "another process" if found else "no layer when repeated"
    return NonFiniteError(
        f"step {step + 1}: the {what} is not finite. The first such value is in {place}. "
        f"The weights were not changed by this step; {kept}. A lower optim.lr, a longer optim.warmup_steps, a smaller "
        "train.clip_grad_norm, or train.precision bf16 or float32 usually help"
    )


def whole_position(loader: TrainLoader) -> dict[str, int]:
    """The loader's position, with the counts of all processes; all call it."""
    state = loader.state_dict()
    counts = sum_over_processes({name: torch.tensor(state[name]) for name in ("num_read", "num_bad")})
    return state | {name: int(count) for name, count in counts.items()}


def draw_examples(task: Task, model: nn.Module, file: Path | None, config: Config) -> None:
    """The figure at the end of a run: pictures, their most probable names, and where their patches were routed.

    All processes call it. Those of a sharded model draw it together, and one of them keeps it (`file`; None in the
    others).
    """
    try:
        samples = task.examples(config.evaluate.examples)
        names = task.example_names(samples)
        if samples and (file is not None or is_sharded(model)):
            templates = config.evaluate.templates if task.tokenizer is not None else None
            with TemporaryDirectory() as unwanted:
                place = file or Path(unwanted, "examples.png")
                example_figure(model, samples, names, task.tokenizer, place, templates=templates)
    except Exception as error:  # the run itself is finished and saved
        logger.warning("no examples.png: %s", error or type(error).__name__)
