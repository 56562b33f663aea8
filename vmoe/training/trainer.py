"""The training loop: `train` starts or continues a run, `Trainer` makes its steps, evaluates, saves and logs.

A step is a function of (config, step number, weights): its data depends on the seed and the step, and its random
numbers (router noise, drop path, mixup) are seeded again from both. So nothing depends on how often a run was stopped,
how often it evaluates, or how many workers read the data.
"""

import json
import math
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn

from vmoe.data import TrainLoader, train_loader
from vmoe.data.seeding import derive_seed, seed_process
from vmoe.distributed import process_group
from vmoe.distributed.mesh import make_meshes, mesh_size
from vmoe.distributed.parallelize import clip_grad_norm, parallelize, set_gradient_sync, synchronize_scalars
from vmoe.distributed.process_group import (
    SharedError,
    from_first,
    gather_lists,
    mean_over_processes,
    sum_over_processes,
)
from vmoe.evaluation.inference import arithmetic, attention_kernel, pick_device, pick_precision
from vmoe.evaluation.loaded_model import image_transform
from vmoe.models.flops import model_profile
from vmoe.models.manifest import list_checkpoints, step_of
from vmoe.models.serialization import WeightsError, checkpoint_weights
from vmoe.moe import RoutingRecord, record_routing, update_expert_bias
from vmoe.training.best import BestWatch
from vmoe.training.checkpoint import Checkpointer, CheckpointError, link_best, load_checkpoint
from vmoe.training.config import Config, flat_settings, to_yaml
from vmoe.training.curves import draw_curves
from vmoe.training.diagnosis import NonFiniteError, find_non_finite
from vmoe.training.distill import Distiller
from vmoe.training.large_batch import LargeBatch
from vmoe.training.logger import MetricsLog, expert_metrics, routing_metrics
from vmoe.training.objectives import create_task, with_steps
from vmoe.training.optim import carry_over_optimizer, choose_trained, create_ema, create_optimizer, create_schedule
from vmoe.training.progress import ProgressBar, final_table, say
from vmoe.training.run_dir import (
    check_same_settings,
    early_stopping,
    find_checkpoint,
    finished_summary,
    locked_folder,
)
from vmoe.training.signals import Stopped, StopRequest, interruptible
from vmoe.training.start import start_lines
from vmoe.training.wandb_logger import WandbLog, check_wandb
from vmoe.training.watches import CollapseWatch, DataWatch
from vmoe.utils.config import ConfigError
from vmoe.utils.files import atomic_file
from vmoe.utils.meta import meta_device
from vmoe.utils.tables import make_console
from vmoe.utils.world import world

# Steps in a row that the fp16 gradient scaler may skip; by then it has halved its scale to nothing.
MAX_SKIPPED_STEPS = 30


def train(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Trains a model, or continues a run that was stopped; returns the content of summary.json.

    Raises:
        ConfigError: settings that do not fit each other, the data, or the run in output_dir.
        NonFiniteError: the loss or gradient of a step is not finite; the message names the step and the layer.
        Stopped: a signal or the end of `train.max_minutes`; after a checkpoint, if a step was made.
        LostProcessError: another process of the job is gone.
    """
    minutes = config.train.max_minutes
    end = math.inf if minutes is None else time.monotonic() + 60 * minutes
    config.check()
    with interruptible() as stop:
        device = pick_device(config.device)
        with process_group.joined(device, config.parallel.timeout):
            check_same_settings(config)
            check_wandb(config.train.wandb)
            config = with_steps(config)
            # The first process prints and writes for all.
            console = console or make_console() if world()[0] == 0 else Console(quiet=True)
            run = Path(config.output_dir)
            checkpoint = find_checkpoint(run, config)
            step = 0 if checkpoint is None else step_of(checkpoint)
            if summary := finished_summary(run, step, config.train):
                length = "train.steps" if config.train.epochs is None else "train.epochs"
                larger = "train.patience" if "stopped_early" in summary else length
                remedy = f"a larger {larger} continues it, another output_dir starts a new one"
                steps = f"{summary['steps']} {'step' if summary['steps'] == 1 else 'steps'}"
                say(console, f"{run}: this run is finished ({steps}); {remedy}")
                return summary
            trainer = Trainer(config, device, console, checkpoint)
            if trainer.processes > 1:
                dist.barrier()  # all have looked for a run in the folder
            with locked_folder(run) if trainer.first else nullcontext():
                trainer.fit(stop, end)
            return trainer.finish()


class Trainer:
    """A run, in one process of the job.

    `model` holds the weights; training calls `forward`: the model or DDP around it, compiled if the config says so.
    """

    def __init__(self, config: Config, device: torch.device, console: Console, checkpoint: Path | None) -> None:
        self.config, self.device, self.console = config, device, console
        self.rank, self.processes = world()
        self.first = self.rank == 0
        self.run = Path(config.output_dir)
        sizes = (config.parallel.dp_replicate, config.parallel.dp_shard, config.parallel.ep)
        self.size = mesh_size(*sizes, self.processes)
        self.precision = pick_precision(config.train.precision, device)
        seed_everything(config.seed)
        self.task = create_task(config)
        self.best = BestWatch(config.train.keep_best, config.train.patience, self.task.metric_names)
        self.model = self._create_model(checkpoint)
        self.profile = model_profile(self.model)
        choose_trained(self.model, config)
        self.model.train()  # again: a locked tower stays in evaluation mode
        self.task.distiller = self._create_distiller()
        self._parallelize()
        self._create_optimizer(new=checkpoint is None)
        transform = image_transform(self.model, config.data.loader, config.data.augmentation)
        data, distiller = self.task.train_data, self.task.distiller
        tokenizer = getattr(distiller, "tokenizers", self.task.tokenizer)
        loader = train_loader(data, transform, tokenizer, config.data.loader, config.seed, device)
        self.step, self.progress = 0, {"seconds": 0.0, "loss": math.nan, "evaluation": {}, "evaluated": 0}
        if checkpoint is not None:
            state = load_checkpoint(checkpoint, self.model, self.ema and self.ema.module, self.optimizer)
            self.scaler.load_state_dict(state["scaler"])
            loader.load_state_dict(state["loader"])
            self.step, self.progress = state["step"], state["progress"]
            self.best.load(self.progress.get("best"))
            self.schedule.step_update(self.step)
            say(console, f"{self.run}: continuing after step {self.step}")
        self._check_same_teacher()
        if self.first:
            for line in start_lines(config, self.task, self.model, self.profile, device, self.precision):
                say(console, line)
        if distiller is not None:  # in all processes; the console of the first one alone prints
            say(console, distiller.describe(self.task.val_data if checkpoint is None else None))
        self.task.cache_images(console)
        self.batches = Prefetch(loader, config.train.accumulate_steps)
        self.skipped = 0  # consecutive steps that the fp16 gradient scaler skipped
        self.images, self.seconds, self.teacher_seconds = 0, 0.0, 0.0  # since the last logged step

    def _check_same_teacher(self) -> None:
        """ConfigError: the teacher or the super-classes are not those with which the run began."""
        train, distiller, superclasses = self.config.train, self.task.distiller, self.task.superclasses
        for name, key, now, what in (
            ("teacher", f"distill.teacher {train.distill.teacher}", distiller and distiller.fingerprint, "weights"),
            (
                "superclasses",
                f"superclasses.source {train.superclasses.source}",
                superclasses and superclasses.of_class,
                "groups",
            ),
        ):
            if self.progress.setdefault(name, now) != now:
                raise ConfigError(
                    f"train.{key} has other {what} than when {self.run} began; give those back, or choose another "
                    "output_dir"
                )

    def _create_model(self, checkpoint: Path | None) -> nn.Module:
        # A continued run has its model in the checkpoint; the file it started from may be gone.
        pretrained = self.config.model.pretrained if checkpoint is None else str(checkpoint_weights(checkpoint))
        try:
            # Where the weights are sharded, the other processes get their part from the first one.
            with nullcontext() if self.first or self.size.is_plain else meta_device():
                model = self.task.create_model(pretrained, continued=checkpoint is not None).train()
        except WeightsError as error:
            if checkpoint is None:
                raise
            raise CheckpointError(f"{error}; remove {checkpoint} to continue from the one before") from error
        if self.size.is_plain:
            model.to(self.device)
        if self.config.train.grad_checkpointing:
            model.set_grad_checkpointing()
        return model

    def _create_distiller(self) -> Distiller | None:
        if (settings := self.config.train.distill).teacher is None:
            return None
        return Distiller(settings, self.model, self.task.train_data, self.task.tokenizer, self.device)

    def _parallelize(self) -> None:
        shard = None
        if self.processes > 1:
            meshes = make_meshes(self.size, self.device)
            process_group.set_timeout([meshes.world, meshes.dense], self.config.parallel.timeout)
            shard = partial(parallelize, meshes=meshes, device=self.device)
        self.ema = None
        if self.config.train.ema_decay is not None:
            self.ema = create_ema(self.model, self.config.train.ema_decay, None if self.size.is_plain else shard)
        if self.task.distiller is not None:
            self.task.distiller.attach(self.model)
        self.forward = self.model if shard is None else shard(self.model)
        if self.config.train.compile:
            self.forward = torch.compile(self.forward)

    def _create_optimizer(self, new: bool) -> None:
        config = self.config
        self.optimizer = create_optimizer(self.model, config.optim)
        if new and config.model.pretrained_optimizer:
            carry_over_optimizer(config.model.pretrained, self.model, self.optimizer)
        self.schedule = create_schedule(self.optimizer, config.optim, config.train.steps)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def fit(self, stop: StopRequest, end: float = math.inf) -> None:
        """Makes the remaining steps, until time.monotonic() is `end`; logs, evaluates and saves in between."""
        train = self.config.train
        self.stop, self.end = stop, end
        logs: list[WandbLog] = []
        if train.wandb is not None:  # all processes learn of an error
            from_first(lambda: logs.append(WandbLog(train.wandb, self.run, flat_settings(self.config))))
        if self.first:
            with atomic_file(self.run / "config.yaml") as draft:
                draft.write_text(to_yaml(self.config), encoding="utf-8")
        self.metrics = MetricsLog(self.run if self.first else None, self.step, train.tensorboard, *logs)
        self.collapse_watch = CollapseWatch(train.collapse_after)
        can_cache = self.task.train_data.cache is None and "data.train" in self.task.cacheable()
        self.data_watch = DataWatch(self.config.data.loader.num_workers, can_cache)
        self.checkpointer = Checkpointer(self.run, train.keep_last, train.async_checkpoints)
        if self.first and self.best.step is not None:  # the run may have stopped before it was named
            link_best(self.run, self.best.step)
        every = {"evaluation": train.eval_every, "checkpoint": train.checkpoint_every}
        self.display = ProgressBar(self.console, self.step, train.steps, **every)
        try:
            with self.display, stop.between_steps():
                self._loop()
            self.checkpointer.wait()
            if train.eval_every and self.progress["evaluated"] != self.step:  # it failed when this step was made
                self.metrics.write(self.step, self.evaluate())
                self.save()  # names it the best, if it is
                self.checkpointer.wait()
        finally:
            self.metrics.close()
            self.checkpointer.close()

    def _loop(self) -> None:
        train = self.config.train
        while self.step < train.steps and not self.best.exhausted:
            metrics, record = self.train_step()
            last, logged = self.step == train.steps, {}
            if last or self.step % train.log_every == 0:
                logged |= self.log(metrics, record)
            del record  # it holds the graph of the auxiliary losses
            if train.eval_every and (last or self.step % train.eval_every == 0):
                logged |= self.evaluate()
                last |= self.best.exhausted
            if self.processes == 1 or self.progress["evaluated"] == self.step:  # an evaluation takes long: ask again
                self.stopping = mean_over_processes(self._stop_asked())
            if logged:
                self.metrics.write(self.step, logged)
            interrupted, planned = self.stopping
            stopping = (interrupted or planned) and not last
            if last or stopping or self.step == self.best.step or self.step % train.checkpoint_every == 0:
                self.save()
            if stopping:
                self.checkpointer.wait()
                message = f"stopped after step {self.step} of {train.steps}; the same command continues the run"
                raise Stopped(message, planned=not interrupted, agreed=True)

    def train_step(self) -> tuple[dict[str, float], RoutingRecord]:
        """Makes an optimizer step; its metrics, and the routing of its last batch. Weights stay finite."""
        train, started = self.config.train, time.perf_counter()
        batches, losses = self.batches.take(), []
        large_batch = self._large_batch(batches) if train.accumulate_features else None
        for part, batch in enumerate(batches):  # each gives its share of the gradient
            set_gradient_sync(self.forward, part == len(batches) - 1)
            total, parts, record = self._loss(batch, part, self.forward, large_batch)
            with attention_kernel(self.precision, self.device):
                self.scaler.scale(total / len(batches)).backward()
            losses.append(torch.stack([total.detach(), *parts.values()]))
        if not self.size.is_plain:
            synchronize_scalars(self.model)
        self.scaler.unscale_(self.optimizer)
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        grad_norm = clip_grad_norm(trainable, train.clip_grad_norm or math.inf)
        if self.step + 1 < train.steps:
            self.batches.fetch()  # while the device works

        # The one host synchronisation; the processes agree.
        own = [*torch.stack(losses).mean(0).tolist(), *self._stop_asked()]
        total, *values, interrupted, planned = mean_over_processes(own)
        self.stopping, parts, norm = [interrupted, planned], dict(zip(parts, values)), grad_norm.item()
        self._check_finite(total, norm, batches)
        lr = max(group["lr"] for group in self.optimizer.param_groups)  # that this step uses
        self._update_weights()
        seconds = time.perf_counter() - started
        self.progress |= {"seconds": self.progress["seconds"] + seconds, "loss": parts["task_loss"]}
        if self.task.distiller is not None:
            teacher_seconds = self.task.distiller.take_seconds()
            self.progress["teacher_seconds"] = self.progress.get("teacher_seconds", 0.0) + teacher_seconds
            self.teacher_seconds += teacher_seconds
        self.images += self.processes * sum(len(batch["index"]) for batch in batches)
        self.seconds += seconds
        self.display.step_done(self.step, seconds)
        return {"loss": total, **parts, "lr": lr, "grad_norm": norm}, record

    def _loss(
        self, batch: dict[str, Tensor], part: int, module: nn.Module, large_batch: LargeBatch | None = None
    ) -> tuple[Tensor, dict[str, Tensor], RoutingRecord]:
        """(loss with the auxiliary losses, the losses of task and teacher, routing record) of a batch of this step."""
        number = self._seed(part)
        with record_routing(self.model) as record, arithmetic(self.precision, self.device):
            if large_batch is None:
                loss = self.task.loss(module, batch, number)
            else:
                loss = large_batch.loss(part, self.task.outputs(module, batch))
        parts = {"task_loss": loss.detach()} if self.task.distiller is None else self.task.distiller.parts
        if (superclasses := self.task.superclasses) is not None:
            found = superclasses(record, self.task.target)
            loss = loss + superclasses.weight * found["superclass_loss"]
            parts = parts | {name: value.detach() for name, value in found.items()}
        return loss + record.auxiliary_loss().to(self.device), parts, record

    def _seed(self, part: int) -> int:
        """Seeds what is random in a batch of the present step; returns its number among those of all steps."""
        number = part * self.processes + self.rank  # among the parts of a step that all processes compute
        seed_everything(self.config.seed, self.step, number)
        return number + self.step * self.config.train.accumulate_steps * self.processes

    def _large_batch(self, batches: list[dict[str, Tensor]]) -> LargeBatch:
        """Compares the features of all batches of the step. It leaves no trace: running statistics move once a step."""
        outputs, buffers = [], [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        for part, batch in enumerate(batches):
            self._seed(part)
            with torch.no_grad(), record_routing(self.model), arithmetic(self.precision, self.device):
                outputs.append(self.task.outputs(self.forward, batch))
        for buffer, before in buffers:
            buffer.copy_(before)
        return LargeBatch(outputs, self.task.compare)

    def _update_weights(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        self.schedule.step_update(self.step)
        update_expert_bias(self.model)
        self.task.after_step(self.model)
        if self.ema is not None:
            self.ema.update(self.model, step=self.step)

    def _stop_asked(self) -> list[float]:
        """[interrupted, planned], as this process knows."""
        interrupted = self.stop.interrupted or self.stop.orphaned
        # Another step and checkpoint, as long as the longest so far, would not fit any more.
        used_up = time.monotonic() + sum(self.display.time_left.longest.values()) >= self.end
        return [float(interrupted), float(self.stop.planned or used_up)]

    def _check_finite(self, total: float, norm: float, batches: list[dict[str, Tensor]]) -> None:
        """Raises NonFiniteError, which names the first such value when the batches are repeated."""
        self.skipped = self.skipped + 1 if self.scaler.is_enabled() and not math.isfinite(norm) else 0
        if math.isfinite(total) and (math.isfinite(norm) or 0 < self.skipped <= MAX_SKIPPED_STEPS):
            return
        for part, batch in enumerate(batches):
            repeat = partial(lambda *given: self._loss(*given)[0], batch, part, self.model)
            where = find_non_finite(self.model, repeat, batch)
            if any(gather_lists([where])):
                where = where or "another process"
                break
        where = where or "no layer when repeated"
        what = "gradient" if math.isfinite(total) else f"loss ({total})"
        checkpoints = list_checkpoints(self.run)
        kept = f"the last good checkpoint is {checkpoints[-1]}" if checkpoints else "no checkpoint was saved yet"
        raise NonFiniteError(
            f"step {self.step + 1}: the {what} is not finite. The first such value is in {where}. The weights were not "
            f"changed by this step; {kept}. A lower optim.lr, a longer optim.warmup_steps, a smaller "
            "train.clip_grad_norm, or train.precision bf16 or float32 usually help"
        )

    def log(self, metrics: dict[str, float], record: RoutingRecord) -> dict[str, float]:
        """Shows the metrics of a step, and warns about the data and the routing; returns all metrics to log."""
        metrics["images_per_second"] = self.images / self.seconds
        metrics["data_wait_share"] = self.batches.waited / self.seconds
        if self.task.distiller is not None:
            metrics["teacher_share"] = self.teacher_seconds / self.seconds
        self.images, self.seconds, self.teacher_seconds, self.batches.waited = 0, 0.0, 0.0, 0.0
        self.data_watch.update(metrics, self.batches.loader.samples_per_second)
        if self.scaler.is_enabled():
            metrics["grad_scale"] = self.scaler.get_scale()
        metrics["bad_samples"] = self._position()["num_bad"]
        metrics |= {**self.task.metrics(self.model), **routing_metrics(record)}
        if self.config.train.tensorboard:
            metrics |= expert_metrics(record)
        self.collapse_watch.update(self.step, record.layers)
        self.display.show(self.step, metrics)
        return metrics

    def evaluate(self) -> dict[str, float]:
        """Evaluates on the validation data; returns the metrics to log."""
        try:
            with self.display.timing("evaluation"):
                results = self.task.evaluate(self._evaluated_model(), self.device)
                if self.config.train.tensorboard and self.step < self.config.train.steps:  # at the end `finish` does
                    self._draw_examples()
        except Exception as error:  # bad validation data must not cost the training up to here
            if self.processes == 1 or isinstance(error, SharedError):  # else the others cannot take part
                self.save()
            raise
        self.best.update(self.step, results)
        self.progress |= {"evaluation": results, "evaluated": self.step, "best": self.best.state}
        values = (f"{name} {value:.4f}" for name, value in results.items() if isinstance(value, float))
        say(self.console, f"step {self.step}: evaluation {', '.join(values)}")
        return {f"evaluation/{name}": value for name, value in results.items()}

    def save(self) -> None:
        """Writes a checkpoint."""
        state = {"step": self.step, "progress": self.progress}
        state |= {"scaler": self.scaler.state_dict(), "loader": self._position()}
        extra = {"class_names": self.task.class_names} if self.config.task == "classification" else {}
        if self.task.exif_orientation:
            extra["exif_orientation"] = True
        with self.display.timing("checkpoint"):
            average = self.ema and self.ema.module
            self.checkpointer.save(self.step, self.model, average, self.optimizer, state, extra, self.best.step)

    def _draw_examples(self) -> None:
        """Draws examples.png, which TensorBoard shows too until its files are closed."""
        file = self.run / "examples.png"
        if self.config.evaluate.examples and self.task.draw_examples(self._evaluated_model(), file):
            self.metrics.image(self.step, "examples", file)

    def _evaluated_model(self) -> nn.Module:
        return self.model if self.ema is None else self.ema.module

    def _position(self) -> dict[str, int]:
        """The loader's state after the steps done, with the counts of all processes, which call it together."""
        state = self.batches.position
        counts = sum_over_processes({name: torch.tensor(state[name]) for name in ("num_read", "num_bad")})
        return state | {name: int(count) for name, count in counts.items()}

    def finish(self) -> dict[str, Any]:
        """Writes summary.json, curves.png and examples.png, and prints the final table; returns the summary."""
        config, progress = self.config, self.progress
        images = self.step * self.batches.loader.batches.batch_size * config.train.accumulate_steps
        summary = {
            "model": config.model.name or config.model.pretrained,
            "task": config.task,
            "seed": config.seed,
            "steps": self.step,
            "precision": self.precision,
            **self.profile,
            "images_per_second": images / progress["seconds"],
            "train_seconds": progress["seconds"],
            "loss": progress["loss"],
            "evaluation": progress["evaluation"],
        }
        if config.train.distill.teacher is not None:
            share = progress.get("teacher_seconds", 0.0) / progress["seconds"]
            summary |= {"teacher": config.train.distill.teacher, "teacher_share": share}
        if self.best.state is not None:
            summary["best"] = self.best.state
        if self.best.exhausted and self.step < config.train.steps:
            summary["stopped_early"] = early_stopping(config.train)
            best = f"the best {self.best.metric} is that of step {self.best.step}"
            say(
                self.console,
                f"stopped early, after {self.best.state['since']} evaluations without a better one: {best}",
            )
        if self.first:
            with atomic_file(self.run / "summary.json") as draft:
                draft.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
            draw_curves(self.run, self.best.state)
        self.console.print(final_table(summary))
        self._draw_examples()
        say(self.console, f"results saved to {self.run}")
        return summary


class Prefetch:
    """Takes `number` batches of a loader for each step, and can fetch those of the next step earlier."""

    def __init__(self, loader: TrainLoader, number: int) -> None:
        self.loader, self.number = loader, number
        self.position = loader.state_dict()  # after the batches that were taken
        self.waited = 0.0  # seconds in `fetch` while the device had nothing to do; the reader resets it
        self._next: list[dict[str, Tensor]] | Exception | None = None

    def fetch(self) -> None:
        """Reads the batches of the next step; an error is raised when they are taken, after the present step."""
        began, done = time.perf_counter(), None
        if torch.device(self.loader.device).type == "cuda":
            done = torch.cuda.Event()
            done.record()  # after the work that the device has
        try:
            self._next = [next(self.loader) for _ in range(self.number)]
        except Exception as error:
            self._next = error
        if done is None or done.query():
            self.waited += time.perf_counter() - began

    def take(self) -> list[dict[str, Tensor]]:
        if self._next is None:
            self.fetch()
        batches, self._next = self._next, None
        if isinstance(batches, Exception):
            raise batches
        self.position = self.loader.state_dict()
        return batches


def seed_everything(*seed: int) -> None:
    """Seeds torch, on all devices, numpy and random from some integers."""
    seed_process(derive_seed(*seed))
    torch.manual_seed(derive_seed(*seed))
