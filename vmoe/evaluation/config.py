"""All settings of an evaluation, as a dataclass: the YAML's keys, `--key.sub value`, and `--help`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from vmoe.data.config import LoaderConfig, SourceConfig
from vmoe.utils.config import ConfigError, check_numbers, check_types

FEATURE_TASKS = ("few_shot", "linear_probe", "knn")


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
        positive = dict.fromkeys(("l2", "l2_penalties", "l2_range", "temperature"))
        check_numbers(self, {"shots": 1, "seeds": 0, "k": 1, **positive}, "features.")
        if self.l2_range[0] > self.l2_range[1]:
            raise ConfigError(f"features.l2_range must be the least and the greatest penalty, got {self.l2_range}")
        if not 0 < self.val_share < 1:
            raise ConfigError(f"features.val_share must be between 0 and 1, got {self.val_share}")


@dataclass
class CapacityConfig:
    """Task "capacity": one sparse model at several expert capacities, with and without batch-prioritized routing (BPR).

    Attributes:
        factors: Values of eval_capacity_factor; null is no limit.
        images_per_group: Images that are routed together and share the capacity, consecutive in the data; they are
            also the batch (loader.batch_size is not used). expert_choice keeps the model's own groups.
        timing_rounds: How often each setting is timed, in turn with the others; 0: not at all.
    """

    factors: list[float | None] = field(default_factory=lambda: [*(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.5, 2), None])
    images_per_group: int = 64
    timing_rounds: int = 20

    def __post_init__(self) -> None:
        check_types(self, "capacity.")
        check_numbers(self, {"factors": None, "images_per_group": 1, "timing_rounds": 0}, "capacity.")


@dataclass
class AdversarialConfig:
    """Task "adversarial": accuracy under white-box attacks that change each value of an image by at most epsilon.

    Attributes:
        attacks: "pgd", and AutoAttack's "apgd_ce" (cross-entropy) and "apgd_t" (targeted; four classes or more).
        epsilons: Bounds of the change, as shares of the range of a pixel: a fraction such as 8/255, or a number.
        steps: Steps of each attack, of "apgd_t" for each of its targets (nine, or all other classes).
        step_size: Of "pgd", as a share of epsilon; null: 2.5 / steps.
        max_samples: How many images are attacked, drawn at random by the seed; null: all.
        seed: Of the random starts, which depend on it and on the image's position in the data alone.
    """

    attacks: list[Literal["pgd", "apgd_ce", "apgd_t"]] = field(default_factory=lambda: ["pgd", "apgd_ce"])
    epsilons: list[str | float] = field(default_factory=lambda: ["1/255", "2/255", "4/255", "8/255"])
    steps: int = 40
    step_size: float | None = None
    max_samples: int | None = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self, "adversarial.")
        check_numbers(self, {"steps": 1, "step_size": None, "max_samples": 1, "seed": 0}, "adversarial.")
        if not self.attacks or len(set(self.attacks)) < len(self.attacks):
            raise ConfigError(f"adversarial.attacks must name at least one attack and none twice, got {self.attacks}")
        values = list(self.values.values())
        if not all(0 < value <= 1 for value in values) or not 0 < len(self.epsilons) == len(set(values)):
            wanted = "must be > 0 and <= 1, shares of the range of a pixel (8 of 255 is '8/255'), each once"
            raise ConfigError(f"adversarial.epsilons {wanted}, got {self.epsilons}")

    @property
    def values(self) -> dict[str, float]:
        """{an epsilon as it is written: its value}; NaN if it is no number."""
        return {str(epsilon): _number(str(epsilon)) for epsilon in self.epsilons}


def _number(text: str) -> float:
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        return math.nan


@dataclass
class EvaluationConfig:
    """An evaluation.

    Attributes:
        checkpoint: What to evaluate: folder of a run (its last checkpoint) or of a checkpoint, or a .safetensors file.
            A list, such as the runs of several seeds, gives the mean and the standard deviation of each metric.
        task: What is measured. "classification": top-1 and top-5 of a classifier. "zero_shot": the same of an
            image-text model, by class names. "retrieval": its recall@1/5/10, images to captions and back. "few_shot",
            "linear_probe" and "knn": classifiers on frozen features. "capacity": accuracy, cost and speed at several
            expert capacities. "adversarial": accuracy under attack.
        data: The data to evaluate on.
        train_data: few_shot, linear_probe and knn: the data that the classifier on the features learns from.
        loader: Batches and worker processes; on_bad "skip" skips and counts unreadable images.
        class_names: zero_shot, capacity and adversarial only: a shipped list ("imagenet", "cifar10", ...) or a UTF-8
            file with one class name per line, in the order of the labels; null takes the names of the data.
        templates: zero_shot, capacity and adversarial only: texts with {} for the class name (their embeddings are
            averaged), a file with one per line, "openai_imagenet", "simple_imagenet" or a shipped list's name; null:
            those published with the shipped list or with ImageNet, else the bare names.
        features: Tasks on frozen features.
        capacity: Task "capacity".
        adversarial: Task "adversarial".
        ensemble: Several checkpoints are one ensemble, whose probabilities are the means of theirs (deep ensembles,
            arXiv 1612.01474). "classification" only.
        ood_data: "classification" only: images of other kinds (without labels or with any), which the model should be
            less sure of; gives "auroc" and "fpr95" (arXiv 1610.02136).
        precision: Precision of the forward pass: float32, or autocast to bf16 or fp16.
        experts: Type of the experts' weights in memory, see docs/inference.md; null: as in the checkpoint.
        device: "auto" (CUDA, then MPS, then CPU) or a torch device such as "cuda:1".
        output: JSON file for the result; null: evaluation_TASK_DATA.json beside the (first) checkpoint,
            with a number behind the name if that file holds the result of other settings. A given file also gets
            tables beside it: FILE_per_class.csv, FILE_confusion.csv, FILE_confusion.png, FILE_samples.csv.
    """

    checkpoint: list[str] | str
    task: Literal[
        "classification", "zero_shot", "retrieval", "few_shot", "linear_probe", "knn", "capacity", "adversarial"
    ]
    data: SourceConfig = field(default_factory=SourceConfig)
    train_data: SourceConfig = field(default_factory=SourceConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    class_names: str | None = None
    templates: list[str] | str | None = None
    features: FeatureConfig = field(default_factory=FeatureConfig)
    capacity: CapacityConfig = field(default_factory=CapacityConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    ensemble: bool = False
    ood_data: SourceConfig = field(default_factory=SourceConfig)
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    experts: Literal["int8", "bfloat16"] | None = None
    device: str = "auto"
    output: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        self.loader.check_evaluation()
        if not self.checkpoints or len(set(self.checkpoints)) < len(self.checkpoints):
            raise ConfigError(f"checkpoint must name at least one checkpoint and none twice, got {self.checkpoint}")
        if self.ood_data.type is None and self.ood_data != SourceConfig():
            raise ConfigError("ood_data needs a type: set ood_data.type, such as image_folder")
        named, classified = ("zero_shot", "capacity", "adversarial"), ("classification",)
        for name, given, tasks in (
            ("class_names", self.class_names is not None, named),
            ("templates", self.templates is not None, named),
            ("features", self.features != FeatureConfig(), FEATURE_TASKS),
            ("train_data", self.train_data.type is not None, FEATURE_TASKS),
            ("capacity", self.capacity != CapacityConfig(), ("capacity",)),
            ("adversarial", self.adversarial != AdversarialConfig(), ("adversarial",)),
            ("loader.naflex", self.loader.naflex is not None, classified),
            ("ensemble", self.ensemble, classified),
            ("ood_data", self.ood_data.type is not None, classified),
        ):
            if given and self.task not in tasks:
                raise ConfigError(f"{name} is for task {', '.join(tasks)}, and task is {self.task!r}; leave it out")
        if self.task in FEATURE_TASKS and self.train_data.type is None:
            raise ConfigError(f"task {self.task!r} needs train_data: say what the classifier on features learns from")
        if self.task in FEATURE_TASKS and self.train_data == self.data:
            raise ConfigError("train_data and data are the same: test a classifier on data that it did not learn from")
        if self.ensemble and len(self.checkpoints) < 2:
            raise ConfigError(f"ensemble needs several checkpoints, got {self.checkpoint}; leave it out")
        if self.task == "adversarial" and self.precision == "fp16":
            raise ConfigError("precision must be float32 or bf16 for task 'adversarial': in fp16 gradients vanish")

    @property
    def checkpoints(self) -> list[str]:
        """The checkpoints as a list."""
        return [self.checkpoint] if isinstance(self.checkpoint, str) else self.checkpoint
