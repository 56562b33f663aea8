"""All settings of a training run: the sections of the YAML, `--key.sub value`, and the text of `--help`."""

import dataclasses
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import yaml

from vmoe.data.config import AugmentationConfig, LoaderConfig, SourceConfig
from vmoe.utils.config import ConfigError, check_numbers, check_types, parse_config, read_config

# Settings that may change when a run continues: they do not change what a step computes.
CHANGEABLE = (
    *("output_dir", "resume", "device", "data.val", "data.cache", "data.cache_gb"),
    *("evaluate", "parallel"),
    *(f"data.loader.{key}" for key in ("num_workers", "pin_memory", "max_bad_share")),
    *(f"train.{key}" for key in ("steps", "log_every", "eval_every", "checkpoint_every", "keep_last", "max_minutes")),
    *(f"train.{key}" for key in ("epochs", "keep_best", "patience", "wandb")),
    *(f"train.{key}" for key in ("async_checkpoints", "collapse_after", "compile", "tensorboard")),
)

STEPS = 1000  # of a run with neither train.steps nor train.epochs

# As `check_numbers` takes them.
RANGES = {
    **dict.fromkeys([f"optim.{key}" for key in ("warmup_steps", "warmup_lr", "min_lr", "weight_decay")], 0),
    **dict.fromkeys(("seed", "train.eval_every", "train.collapse_after", "evaluate.examples"), 0),
    **dict.fromkeys([f"train.{key}" for key in ("steps", "accumulate_steps", "log_every", "checkpoint_every")], 1),
    **dict.fromkeys(("train.keep_last", "evaluate.batch_size", "lora.r"), 1),
    **dict.fromkeys(("train.epochs", "optim.lr", "lora.alpha", "data.cache_gb", "train.superclasses.weight"), None),
    "train.patience": (1, None, "; null never stops early"),
    "optim.layer_decay": (None, 1, "; null gives all layers the same learning rate"),
    "train.clip_grad_norm": (None, None, "; null does not clip"),
    "train.ema_decay": (None, 1, "; null keeps no moving average"),
    "train.max_minutes": (None, None, "; null sets no limit"),
    "train.distill.weight": (0, 1, ""),
    "train.distill.temperature": None,
    "train.distill.features": 0,
    "train.distill.image_size": (1, None, "; null takes the teacher's own"),
    "parallel.timeout": (1, 30 * 24 * 3600, ""),
}


@dataclass
class ModelConfig:
    """The model.

    Attributes:
        name: A LIMoE ("limoe_tiny_patch8_48"), a two-tower model ("two_tower_tiny_patch8_48") or any name of timm
            ("vmoe_tiny_patch8_48", "vit_small_patch16_224") or open_clip ("ViT-B-32"); null takes name and kwargs from
            `pretrained`.
        pretrained: Weights to start from: a .safetensors file of vmoe; the folder of a run, of a checkpoint, or of
            timm's or open_clip's hub; or what is downloaded: "hf-hub:ORG/NAME", "vit_base_patch16_224.augreg_in21k",
            a tag of open_clip's model `name`, "ViT-B-32:openai". The head is new if the number of classes differs;
            position embeddings are resized to the new image size.
        kwargs: Arguments of the model: routing settings (num_experts, moe_layers, capacity_factor, ...), img_size,
            drop_path_rate, ... A two-tower model has those of its towers below image and text; image.pretrained names
            a file, or a run's folder, with the image tower.
        upcycle: Make the dense model sparse before training: arguments of vmoe.upcycle (num_experts, layers, tower,
            num_selected_experts, granularity, expert_noise, reinit, cluster_energy, routing settings); empty leaves it
            dense. `others`: more dense models, as `pretrained` takes them, which differ in the MLPs alone and give
            experts too. `clusters`: examples of data.train whose clusters give routers and experts their start.
        pretrained_optimizer: Also take the optimizer's state of the run `pretrained`; experts get that of their MLP.
    """

    name: str | None = None
    pretrained: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    upcycle: dict[str, Any] = field(default_factory=dict)
    pretrained_optimizer: bool = False


@dataclass
class DataConfig:
    """Training and validation data.

    Attributes:
        train: Data to train on.
        val: Data for the periodic and the final evaluation; unused if train.eval_every is 0.
        cache: "memory" keeps all images of both decoded in memory, 3 bytes for a pixel: they are read once, before the
            first step, and batches are the same. "auto" does so if the run takes two epochs or more and the images fit
            into `cache_gb`. null: images are read from their files in each epoch.
        cache_gb: Most memory of the cache in GB: with "memory" in each process, where data that need more are an error;
            with "auto" in all processes of a machine together.
    """

    train: SourceConfig = field(default_factory=SourceConfig)
    val: SourceConfig = field(default_factory=SourceConfig)
    cache: Literal["auto", "memory"] | None = "auto"
    cache_gb: float = 4.0
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)


@dataclass
class DistillConfig:
    """Learning from a teacher as well as from the data (docs/training.md#distillation).

    Attributes:
        teacher: A model with weights, as model.pretrained takes it: a saved run, a file, "hf-hub:ORG/NAME",
            "local-dir:FOLDER", a name of timm's weights, or for contrastive runs "ViT-B-32:openai". null: no teacher.
        weight: Share of the teacher in the loss; the labels or captions have the rest. 1: the teacher alone.
        temperature: Both models' logits are divided by it; above 1, unlikely classes count more (often 1 to 4).
        features: Weight of a loss that a learned projection of the student's pooled features has the direction of the
            teacher's; classification alone. Needs no common classes where weight is 0.
        image_size: Size of the teacher's images, instead of its own; smaller is faster. Classification alone.
    """

    teacher: str | None = None
    weight: float = 0.5
    temperature: float = 1.0
    features: float = 0.0
    image_size: int | None = None


@dataclass
class SuperclassConfig:
    """Teaching the gates to send each class to the expert of its super-class (docs/training.md#super-classes).

    Attributes:
        source: A confusion matrix that eval.py wrote (FILE_confusion.csv): classes that are confused get the same
            expert. Or a JSON file {class: number of its expert}. null: gates are not taught so.
        weight: Of the cross-entropy of the gates, mean over the sparse layers, beside the loss of the labels.
    """

    source: str | None = None
    weight: float = 0.3


@dataclass
class TrainConfig:
    """The training loop.

    Attributes:
        steps: Optimizer steps of the whole run; null: those of `epochs`, or 1000.
        epochs: Length of the run in passes over data.train instead of steps, also 0.5. The run's config.yaml has both.
        precision: float32, or autocast to bf16 or fp16 (with a gradient scaler); routers are always float32. "auto" is
            bf16 on GPUs since Ampere, else float32.
        accumulate_steps: Batches per optimizer step. A contrastive loss compares within one of them.
        accumulate_features: Compare the images and captions of all accumulated batches with each other, for the memory
            of one batch and a second forward pass (GradCache; open_clip's accum_freq).
        clip_grad_norm: Largest norm of the whole gradient; null does not clip.
        loss: Contrastive loss, open_clip's softmax (CLIP) or sigmoid (SigLIP); classification uses cross-entropy.
        freeze: Patterns (`*`, `?`) of parameter names to freeze, such as "patch_embed.*" or "*.router.*". A tower that
            is frozen as a whole ("visual.*") is locked, as in LiT: its outputs do not change. A pattern after "!" is
            trained all the same: ["*", "!*.router.*"] trains the routers alone.
        ema_decay: Decay of a moving average of the weights (timm's ModelEmaV3), which is evaluated; null keeps none.
        compile: Use torch.compile.
        grad_checkpointing: Recompute activations in the backward pass to save memory.
        log_every: Steps between two lines of metrics.jsonl (and points in TensorBoard).
        eval_every: Steps between two evaluations on data.val; the last step always has one. 0 never evaluates.
        checkpoint_every: Steps between two checkpoints; the last step always has one.
        keep_last: Checkpoints to keep.
        keep_best: Also keep the checkpoint of the best evaluation, which OUTPUT_DIR/best names: a metric of the
            evaluation, such as top1. Higher is better, except for ece.
        patience: Stop after so many evaluations in a row without a better keep_best; null never stops early.
        async_checkpoints: Copy the state to CPU memory, and write it while training goes on.
        max_minutes: Time for this start of the command: training stops when another step and a checkpoint, as long as
            the longest so far, would not fit any more (leave time for the first ones); null sets no limit.
        collapse_after: Warn of a layer whose routing stays collapsed (one expert is asked for by most tokens, or some
            by none) for this many steps; 0 never warns.
        wandb: Also log to this project of Weights & Biases (extra `wandb`); WANDB_MODE=offline needs no account.
        tensorboard: Also write OUTPUT_DIR/tensorboard: every metric, and the load and importance of each expert.
    """

    steps: int | None = None
    epochs: float | None = None
    precision: Literal["auto", "float32", "bf16", "fp16"] = "float32"
    accumulate_steps: int = 1
    accumulate_features: bool = False
    clip_grad_norm: float | None = 1.0
    loss: Literal["softmax", "sigmoid"] = "softmax"
    freeze: list[str] = field(default_factory=list)
    ema_decay: float | None = None
    compile: bool = False
    grad_checkpointing: bool = False
    log_every: int = 10
    eval_every: int = 0
    checkpoint_every: int = 100
    keep_last: int = 2
    keep_best: str | None = None
    patience: int | None = None
    async_checkpoints: bool = False
    max_minutes: float | None = None
    collapse_after: int = 100
    tensorboard: bool = True
    wandb: str | None = None
    distill: DistillConfig = field(default_factory=DistillConfig)
    superclasses: SuperclassConfig = field(default_factory=SuperclassConfig)


@dataclass
class LoraConfig:
    """Adapters of low rank beside frozen weights (LoRA), by PEFT, the extra `lora`.

    Attributes:
        targets: What to adapt: attention, mlp (dense MLPs), experts (each its own), router. Empty: train all weights.
            A classifier, and the scale and bias of a contrastive loss are trained whole.
        r: Rank of the adapters.
        alpha: They are multiplied by alpha / r.
    """

    targets: list[str] = field(default_factory=list)
    r: int = 8
    alpha: float = 16.0


@dataclass
class OptimConfig:
    """Optimizer and schedule, of timm.

    Attributes:
        name: Any name of timm.optim.list_optimizers(): adamw, sgd, lamb, lion, muon, ...
        lr: Largest learning rate.
        weight_decay: Weight decay; not applied to biases, norms and what the model's no_weight_decay() lists.
        betas: Betas of Adam-like optimizers; null takes the optimizer's own.
        eps: Epsilon of Adam-like optimizers; null takes the optimizer's own.
        momentum: Momentum, for optimizers that have one.
        layer_decay: Factor on the learning rate from each layer to the one below, as in BEiT; null: all the same.
        kwargs: Further arguments of the optimizer. adam and adamw are fused, unless there is {fused: false}.
        schedule: One of timm's schedulers; "constant" stays at lr after the warm-up.
        warmup_steps: Steps of linear warm-up, part of train.steps; below 1 a share of train.steps.
        warmup_lr: Learning rate of the first warm-up step.
        min_lr: Learning rate at the end of schedules that decay to one (cosine, tanh, poly).
        schedule_kwargs: Further arguments of timm.scheduler.create_scheduler_v2 (decay_epochs, ...); epochs are steps.
    """

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] | None = None
    eps: float | None = None
    momentum: float = 0.9
    layer_decay: float | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    schedule: Literal["cosine", "tanh", "poly", "step", "multistep", "constant"] = "cosine"
    warmup_steps: float = 0
    warmup_lr: float = 1e-6
    min_lr: float = 0.0
    schedule_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class EvaluateConfig:
    """Evaluation during and at the end of training.

    Attributes:
        task: What a contrastive run measures on data.val. null: "zero_shot" if it has class names, else "retrieval".
        batch_size: Images per forward pass.
        templates: Texts around a class name for zero-shot, such as "a photo of a {}".
        on_bad: An unreadable image or empty caption: "fail" stops and names it, "skip" skips and counts it.
        examples: Images in examples.png, drawn at the end of a run, and for TensorBoard at each evaluation; 0: none.
    """

    task: Literal["zero_shot", "retrieval"] | None = None
    batch_size: int = 256
    templates: list[str] = field(default_factory=lambda: ["{}"])
    on_bad: Literal["fail", "skip"] = "fail"
    examples: int = 8


@dataclass
class ParallelConfig:
    """Several processes (`torchrun`), over which weights are sharded; the three sizes multiply to their number.

    Attributes:
        dp_replicate: Replicas of everything; -1: the processes that the other two leave.
        dp_shard: Processes over which all weights, gradients and optimizer states are sharded (FSDP2).
        ep: Processes over which the experts are sharded (all-to-all); must divide the number of experts.
        timeout: Seconds (1 to 2592000) that a process waits for another one before the job ends and names it.
    """

    dp_replicate: int = -1
    dp_shard: int = 1
    ep: int = 1
    timeout: float = 600.0


@dataclass
class Config:
    """A training run.

    Attributes:
        output_dir: Folder of the run: config.yaml, metrics.jsonl, checkpoints/, tensorboard/, summary.json,
            curves.png, examples.png, best (with train.keep_best).
        task: "contrastive" trains image-text models on images with captions, "classification" on labelled images.
        resume: If output_dir holds a run: "auto" continues it, "never" is an error.
        seed: Seed of weights, data order, augmentation and router noise. A run is reproducible bit by bit on a CPU.
        device: "auto" (CUDA, then MPS, then CPU) or a torch device such as "cuda:1".
    """

    output_dir: str
    task: Literal["contrastive", "classification"]
    resume: Literal["auto", "never"] = "auto"
    seed: int = 0
    device: str = "auto"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def check(self) -> None:
        """Raises ConfigError on the first setting that is out of range or does not go with another one."""
        check_types(self)
        if self.model.name is None and self.model.pretrained is None:
            raise ConfigError("model.name is missing: give a model's name, or model.pretrained to take it from a file")
        check_numbers(self, RANGES)
        for message, wrong in (self._conflicts() | self._task_conflicts()).items():
            if wrong:
                raise ConfigError(message)

    def _conflicts(self) -> dict[str, Any]:
        """{what is wrong and the remedy: whether it is so} of settings that do not go together in any task."""
        model, train, distill, betas = self.model, self.train, self.train.distill, self.optim.betas
        warmup, sharded = self.optim.warmup_steps, max(self.parallel.dp_shard, self.parallel.ep) > 1
        steps = train.steps or (math.inf if train.epochs else STEPS)  # those of epochs follow from the data
        conflicts = {
            f"optim.betas must be in [0, 1), got {betas}": betas and not all(0 <= beta < 1 for beta in betas),
            f"optim.warmup_steps must be < train.steps ({steps}), got {warmup}": warmup >= steps,
            "train.precision fp16 needs parallel.dp_shard = parallel.ep = 1; use bf16, which needs no scaler": (
                train.precision == "fp16" and sharded
            ),
            "model.pretrained_optimizer needs model.pretrained, the folder of a run, and parallel.dp_shard = "
            "parallel.ep = 1; set it to false": model.pretrained_optimizer and (model.pretrained is None or sharded),
            "model.pretrained_optimizer has the state of one model, and model.upcycle.others are more; set it to "
            "false": model.pretrained_optimizer and model.upcycle.get("others"),
            "lora.targets needs parallel.dp_shard = parallel.ep = 1 and model.pretrained_optimizer false": (
                self.lora.targets and (sharded or model.pretrained_optimizer)
            ),
            "train.distill.teacher is missing: give a model with weights, or leave the other settings of "
            "train.distill": distill.teacher is None and distill != DistillConfig(),
            "train.distill compares within a batch, and train.accumulate_features over several; set that to false": (
                distill.teacher is not None and train.accumulate_features
            ),
            "train.distill.weight and train.distill.features are 0, so the teacher teaches nothing; raise one of "
            "them": distill.teacher is not None and not (distill.weight or distill.features),
            "train.keep_best needs evaluations; set train.eval_every": (
                train.keep_best is not None and not train.eval_every
            ),
            "train.patience needs train.keep_best, the metric that must get better, such as top1": (
                train.patience is not None and train.keep_best is None
            ),
            "train.superclasses.weight needs train.superclasses.source, which says what the super-classes are": (
                train.superclasses.source is None and train.superclasses != SuperclassConfig()
            ),
        }
        sections = {"kwargs": model.kwargs, "upcycle": model.upcycle}
        sections |= {f"kwargs.{tower}": model.kwargs.get(tower) for tower in ("image", "text")}
        for key, kwargs in sections.items():
            message = (
                f"model.{key}.auxiliary_loss must be 'record' here: the loop adds the auxiliary losses itself; "
                "'attach' would add them twice"
            )
            conflicts[message] = isinstance(kwargs, dict) and kwargs.get("auxiliary_loss", "record") != "record"
        return conflicts

    def _task_conflicts(self) -> dict[str, Any]:
        """As `_conflicts`, of the settings that belong to one of the two tasks, or to images of one size."""
        train, loader, augmentation = self.train, self.data.loader, self.data.augmentation
        contrastive, naflex = self.task == "contrastive", loader.naflex is not None
        mixes = augmentation.mixup or augmentation.cutmix
        conflicts = {}
        for key in ("distill.features", "distill.image_size", "superclasses.source"):
            conflicts[f"train.{key} needs task 'classification'"] = contrastive and attrgetter(key)(train)
        conflicts[f"evaluate.task {self.evaluate.task!r} needs task 'contrastive'"] = (
            self.evaluate.task is not None and not contrastive
        )
        for key in ("mixup", "cutmix", "label_smoothing"):
            message = f"data.augmentation.{key} mixes labels, and a contrastive run has none; set it to 0"
            conflicts[message] = contrastive and getattr(augmentation, key)
        conflicts[
            "train.accumulate_features needs task 'contrastive' and train.accumulate_steps above 1; set it to false"
        ] = train.accumulate_features and (not contrastive or train.accumulate_steps == 1)
        conflicts["data.loader.naflex needs task 'classification'; leave it out"] = naflex and contrastive
        for key, given in {
            "data.augmentation.mixup or cutmix": mixes,
            "train.distill": train.distill.teacher,
            "data.augmentation.crop_padding": augmentation.crop_padding is not None,
        }.items():
            message = f"{key} needs images of one size, and data.loader.naflex has others; leave it out"
            conflicts[message] = naflex and given
        message = f"data.loader.batch_size must be even for mixup and cutmix, got {loader.batch_size}"
        return conflicts | {message: mixes and loader.batch_size % 2}


def load_config(argv: Sequence[str] | None = None) -> Config:
    """The configuration of a command line (None: that of this process); exits with a sentence about a mistake."""
    description = "Train a model; the same command again continues a stopped run."
    argv = with_one_length(sys.argv[1:] if argv is None else argv)
    config = parse_config(Config, argv, prog="vmoe-train", description=description)
    try:
        config.check()
    except ConfigError as error:
        print(f"vmoe-train: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    return config


def with_one_length(argv: Sequence[str]) -> list[str]:
    """A command line whose train.steps or train.epochs replaces both of a file: the config.yaml of a run has both."""
    words, argv = {}, list(argv)
    for word, following in zip(argv, [*argv[1:], ""]):
        key, equals, value = word.partition("=")
        words[key] = value if equals else following
    for given, other in (("--train.steps", "--train.epochs"), ("--train.epochs", "--train.steps")):
        if other not in words and words.get(given, "null").lower() not in ("null", "~", ""):
            return [*argv, other, "null"]
    return argv


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML, which `--config` reads back."""
    return yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True)


def _plain(config: Config) -> dict[str, Any]:
    """All settings; tuples as lists and paths as text, which settings made in Python may hold."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=os.fspath))


def flat_settings(config: Config) -> dict[str, Any]:
    """{"train.steps": 1000, ...}"""
    return flatten(_plain(config))


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; without empty dicts."""
    flat = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def changed_settings(file: Path, config: Config) -> dict[str, tuple[Any, Any]]:
    """{key: (value in the run's config.yaml, value in config)} of the settings that a continued run may not change."""
    before, now = flat_settings(read_config(Config, ["--config", str(file)])), flat_settings(config)
    changed = {}
    for key in {**before, **now}:
        fixed = not any(key == free or key.startswith(f"{free}.") for free in CHANGEABLE)
        if fixed and before.get(key) != now.get(key):
            changed[key] = (before.get(key, "not set"), now.get(key, "not set"))
    return changed
