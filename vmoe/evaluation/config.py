"""All settings of an evaluation, as a dataclass: the YAML's keys, `--key.sub value`, and `--help`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from vmoe.data.config import LoaderConfig, SourceConfig
from vmoe.utils.config import ConfigError, check_types

FEATURE_TASKS = ("few_shot", "linear_probe", "knn")


def check_numbers(name: str, value: Any, least: int | None = None) -> None:
    """ConfigError unless a number (or None), or each of a list of different ones, is >= `least` (None: > 0, finite)."""
    if value is None:
        return
    values = value if isinstance(value, (list, tuple)) else [value]
    fitting = [0 < one < math.inf if least is None else one >= least for one in values]
    if not all(fitting) or not values or len(set(values)) < len(values):
        bound = "> 0 and finite" if least is None else f">= {least}"
        raise ConfigError(f"{name} must be {bound}{'' if values is not value else ', each once'}, got {value}")


@dataclass
class FeatureConfig:
    """Tasks on frozen features: "few_shot", "linear_probe", "knn".

    Attributes:
        cache: Folder that caches features, under a key of model and data; "auto": `features` in $VMOE_CACHE or
            ~/.cache/vmoe; null: no cache.
        shots: few_shot only: examples per class. A class with fewer gives all that it has.
        seeds: few_shot only: the examples are drawn once with each of these seeds, and the mean is reported.
        l2: few_shot and linear_probe: the penalty, fixed; null: it is chosen, see docs/evaluation.md.
        l2_penalties: few_shot only: the penalties to choose from.
        l2_range: linear_probe only: the least and the greatest penalty to choose from.
        val_share: linear_probe only: share of the training data on which penalties are compared, in 0..1.
        k: knn only: numbers of neighbours.
        temperature: knn only: a neighbour votes with the weight exp(cosine / temperature).
    """

    cache: str | None = "auto"
    shots: list[int] = field(default_factory=lambda: [1, 5, 10, 25])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    l2: float | None = None
    l2_penalties: list[float] = field(default_factory=lambda: [2.0**power for power in range(-10, 20)])
    l2_range: tuple[float, float] = (1e-6, 1e6)
    val_share: float = 0.2
    k: list[int] = field(default_factory=lambda: [10, 20, 100, 200])
    temperature: float = 0.07

    def __post_init__(self) -> None:
        check_types(self, "features.")
        for name, least in {"shots": 1, "seeds": 0, "k": 1}.items():
            check_numbers(f"features.{name}", getattr(self, name), least)
        for name in ("l2", "l2_penalties", "l2_range", "temperature"):
            check_numbers(f"features.{name}", getattr(self, name))
        if self.l2_range[0] > self.l2_range[1]:
            raise ConfigError(f"features.l2_range must be the least and the greatest penalty, got {self.l2_range}")
        if not 0 < self.val_share < 1:
            raise ConfigError(f"features.val_share must be between 0 and 1, got {self.val_share}")


@dataclass
class CapacityConfig:
    """Task "capacity": one sparse model at several expert capacities, with and without batch-prioritized routing (BPR).

    Of an image-text model only the images are limited; no token of a class name is dropped.

    Attributes:
        factors: Values of eval_capacity_factor; null is no limit.
        num_selected_experts: Values of K (router top_k only); null: the model's own.
        images_per_group: Images that are routed together and share the capacity, consecutive in the data; they are
            also the batch (loader.batch_size is not used). Fewer make the limit coarser, since an expert's capacity is
            rounded up, and leave BPR less to choose from; expert_choice keeps the model's own groups.
        timing_rounds: How often each setting is timed, in turn with the others; 0: not at all.
    """

    factors: list[float | None] = field(default_factory=lambda: [*(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.5, 2), None])
    num_selected_experts: list[int] | None = None
    images_per_group: int = 64
    timing_rounds: int = 20

    def __post_init__(self) -> None:
        check_types(self, "capacity.")
        fitting = [factor is None or 0 < factor < math.inf for factor in self.factors]
        if not self.factors or not all(fitting) or len(set(self.factors)) < len(self.factors):
            raise ConfigError(
                f"capacity.factors must be > 0 and finite (null: no limit), each once, got {self.factors}"
            )
        for name in ("num_selected_experts", "images_per_group"):
            check_numbers(f"capacity.{name}", getattr(self, name), 1)
        check_numbers("capacity.timing_rounds", self.timing_rounds, 0)


@dataclass
class EvaluationConfig:
    """An evaluation.

    Attributes:
        checkpoint: What to evaluate: folder of a run (its last checkpoint) or of a checkpoint, or a .safetensors file.
            A list, such as the runs of several seeds, gives the mean and the standard deviation of each metric.
        task: "classification": top-1 and top-5 of a classifier. "zero_shot": the same of an image-text model, by its
            similarity to class names. "retrieval": recall@1/5/10 of an image-text model, images to captions and back.
            "few_shot", "linear_probe" and "knn": classifiers on frozen features. "capacity": accuracy, cost and speed
            of a sparse model at several expert capacities.
        data: The data to evaluate on.
        train_data: few_shot, linear_probe and knn: the data that the classifier on the features learns from.
        loader: Batches and worker processes. The result does not depend on them. on_bad "skip" skips and counts
            unreadable images.
        class_names: zero_shot and capacity only: a shipped list ("imagenet", "cifar10", ...) or a UTF-8 file with one
            class name per line, in the order of the labels; null takes the names of the data.
        templates: zero_shot and capacity only: texts with {} for the class name (their embeddings are averaged), a
            file with one per line, "openai_imagenet" (the 80 of CLIP), "simple_imagenet" (7 of them) or a shipped
            list's name; null: those published with the shipped list or with ImageNet, else the bare names.
        features: Tasks on frozen features.
        capacity: Task "capacity".
        precision: Precision of the forward pass: float32, or autocast to bf16 or fp16.
        experts: How the weights of a sparse model's experts are stored in memory, see docs/inference.md: "int8" with a
            scale for each expert and output, or "bfloat16"; null: as in the checkpoint.
        device: "auto" (CUDA, then MPS, then CPU) or a torch device such as "cuda:1".
        output: JSON file for the result; null: evaluation_TASK_DATA.json beside the (first) checkpoint,
            with a number behind the name if that file holds the result of other settings.
    """

    checkpoint: list[str] | str
    task: Literal["classification", "zero_shot", "retrieval", "few_shot", "linear_probe", "knn", "capacity"]
    data: SourceConfig = field(default_factory=SourceConfig)
    train_data: SourceConfig = field(default_factory=SourceConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    class_names: str | None = None
    templates: list[str] | str | None = None
    features: FeatureConfig = field(default_factory=FeatureConfig)
    capacity: CapacityConfig = field(default_factory=CapacityConfig)
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    experts: Literal["int8", "bfloat16"] | None = None
    device: str = "auto"
    output: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        if self.loader.on_bad == "replace":
            raise ConfigError("loader.on_bad must be 'fail' or 'skip' in an evaluation, got 'replace'")
        if not self.checkpoints or len(set(self.checkpoints)) < len(self.checkpoints):
            raise ConfigError(f"checkpoint must name at least one checkpoint and none twice, got {self.checkpoint}")
        named = ("zero_shot", "capacity")
        for name, is_set, tasks in (
            ("class_names", self.class_names is not None, named),
            ("templates", self.templates is not None, named),
            ("capacity", self.capacity != CapacityConfig(), ("capacity",)),
            ("features", self.features != FeatureConfig(), FEATURE_TASKS),
            ("train_data", self.train_data.type is not None, FEATURE_TASKS),
        ):
            if is_set and self.task not in tasks:
                raise ConfigError(f"{name} is for task {', '.join(tasks)}, and task is {self.task!r}; leave it out")
        if self.task in FEATURE_TASKS and self.train_data.type is None:
            raise ConfigError(f"task {self.task!r} needs train_data: say what the classifier on features learns from")
        if self.task in FEATURE_TASKS and self.train_data == self.data:
            raise ConfigError("train_data and data are the same: test a classifier on data that it did not learn from")

    @property
    def checkpoints(self) -> list[str]:
        """The checkpoints as a list."""
        return [self.checkpoint] if isinstance(self.checkpoint, str) else self.checkpoint
