"""All settings of an evaluation, as a dataclass: the YAML's keys, `--key.sub value`, and `--help`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vmoe.config_io import ConfigError
from vmoe.data.config import LoaderConfig, SourceConfig


@dataclass
class EvaluationConfig:
    """An evaluation.

    Attributes:
        checkpoint: What to evaluate: folder of a run (its last checkpoint) or of a checkpoint, or a .safetensors file.
        task: "classification": top-1 and top-5 of a classifier. "zero_shot": the same of an image-text model, by its
            similarity to class names. "retrieval": recall@1/5/10 of an image-text model, pictures to captions and back.
        data: The data to evaluate on.
        loader: Batches and worker processes. The result does not depend on them. on_bad "skip" leaves unreadable
            pictures out and counts them.
        class_names: zero_shot only: UTF-8 file with one class name per line, in the order of the labels; null takes the
            names of the data.
        templates: zero_shot only: texts with {} in the place of the class name (their embeddings are averaged), a file
            with one per line, "openai_imagenet" (the 80 of CLIP) or "simple_imagenet" (7 of them).
        precision: Arithmetic of the forward pass: float32, or autocast to bf16 or fp16.
        device: "auto" (CUDA, then MPS, then CPU) or a torch device such as "cuda:1".
        output: JSON file for the result; null: evaluation_TASK_DATA.json beside the checkpoint.
    """

    checkpoint: str
    task: Literal["classification", "zero_shot", "retrieval"]
    data: SourceConfig = field(default_factory=SourceConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    class_names: str | None = None
    templates: list[str] | str = field(default_factory=lambda: ["{}"])
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    device: str = "auto"
    output: str | None = None

    def __post_init__(self) -> None:
        if self.loader.on_bad == "replace":
            raise ConfigError("loader.on_bad must be 'fail' or 'skip' in an evaluation, got 'replace'")
        if self.task != "zero_shot" and self.class_names is not None:
            raise ConfigError(f"class_names is for task 'zero_shot', and task is {self.task!r}; leave it out")
