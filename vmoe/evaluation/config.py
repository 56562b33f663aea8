"""All settings of an evaluation, as a dataclass: the YAML's keys, `--key.sub value`, and `--help`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vmoe.config_io import ConfigError
from vmoe.data.config import LoaderConfig, SourceConfig

FEATURE_TASKS = ("few_shot", "linear_probe", "knn")


@dataclass
class FeatureConfig:
    """Tasks on frozen features: "few_shot", "linear_probe", "knn".

    Attributes:
        cache: Folder where features are kept, under a key of model and data; null: computed anew each time.
    """

    cache: str | None = None


@dataclass
class CapacityConfig:
    """Task "capacity": one model with more and less room in its experts.

    Attributes:
        factors: Values of eval_capacity_factor; null is no limit.
    """

    factors: list[float | None] = field(default_factory=lambda: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5, 2.0, None])


@dataclass
class EvaluationConfig:
    """An evaluation.

    Attributes:
        checkpoint: What to evaluate: folder of a run (its last checkpoint) or of a checkpoint, or a .safetensors file.
            A list, such as the runs of several seeds, gives the mean and the standard deviation of each figure.
        task: "classification": top-1 and top-5 of a classifier. "zero_shot": the same of an image-text model, by its
            similarity to class names. "retrieval": recall@1/5/10 of an image-text model, pictures to captions and back.
            "few_shot", "linear_probe" and "knn": classifiers on frozen features. "capacity": accuracy, cost and speed
            of a sparse model with more and less room in its experts.
        data: The data to evaluate on.
        train_data: few_shot, linear_probe and knn: the data that the classifier on the features learns from.
        loader: Batches and worker processes. The result does not depend on them. on_bad "skip" leaves unreadable
            pictures out and counts them.
        class_names: zero_shot and capacity only: a shipped list ("imagenet", "cifar10", ...) or a UTF-8 file with one
            class name per line, in the order of the labels; null takes the names of the data.
        templates: zero_shot and capacity only: texts with {} in the place of the class name (their embeddings are
            averaged), a file with one per line, "openai_imagenet" (the 80 of CLIP) or "simple_imagenet" (7 of them).
        features: Tasks on frozen features.
        capacity: Task "capacity".
        precision: Arithmetic of the forward pass: float32, or autocast to bf16 or fp16.
        device: "auto" (CUDA, then MPS, then CPU) or a torch device such as "cuda:1".
        output: JSON file for the result; null: evaluation_TASK_DATA.json beside the (first) checkpoint.
    """

    checkpoint: str | list[str]
    task: Literal["classification", "zero_shot", "retrieval", "few_shot", "linear_probe", "knn", "capacity"]
    data: SourceConfig = field(default_factory=SourceConfig)
    train_data: SourceConfig = field(default_factory=SourceConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    class_names: str | None = None
    templates: list[str] | str = field(default_factory=lambda: ["{}"])
    features: FeatureConfig = field(default_factory=FeatureConfig)
    capacity: CapacityConfig = field(default_factory=CapacityConfig)
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    device: str = "auto"
    output: str | None = None

    def __post_init__(self) -> None:
        if self.loader.on_bad == "replace":
            raise ConfigError("loader.on_bad must be 'fail' or 'skip' in an evaluation, got 'replace'")
        if self.task not in ("zero_shot", "capacity") and self.class_names is not None:
            raise ConfigError(f"class_names is for task 'zero_shot', and task is {self.task!r}; leave it out")
        if self.task not in FEATURE_TASKS and self.train_data.type is not None:
            raise ConfigError(f"train_data is for {', '.join(FEATURE_TASKS)}, and task is {self.task!r}; leave it out")

    @property
    def checkpoints(self) -> list[str]:
        """The checkpoints as a list."""
        return [self.checkpoint] if isinstance(self.checkpoint, str) else self.checkpoint
