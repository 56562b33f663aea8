"""What a run trains for: the tasks with their data (both sets), tokenizer, loss and evaluation."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from vmoe.data import EvalLoader, ImageDataset, LoaderConfig, Transform, build_mixup, eval_loader
from vmoe.data.build import applies_orientation, build_dataset, with_orientation
from vmoe.data.cache import CacheTooSmall, cache_images
from vmoe.data.loader import batches_of
from vmoe.data.naflex import NaFlexTransform
from vmoe.data.workers import local_processes, own_cores
from vmoe.distributed.parallelize import is_sharded
from vmoe.distributed.process_group import from_first
from vmoe.evaluation import evaluate_classification, evaluate_retrieval, evaluate_zero_shot
from vmoe.evaluation.class_names import check_same_classes
from vmoe.evaluation.loaded_model import image_transform
from vmoe.evaluation.metrics import accuracy_names
from vmoe.evaluation.retrieval import RECALL_NAMES, retrieval_loader
from vmoe.evaluation.zero_shot import check_class_names, check_templates, resolve_templates
from vmoe.inspection.maps import example_figure
from vmoe.models.factory import create_model, get_tokenizer, is_contrastive
from vmoe.models.serialization import WeightsError, stored_name
from vmoe.models.spec import IMAGE_TEXT_NAMES
from vmoe.moe.quantize import experts_kept_as
from vmoe.training.config import STEPS, Config
from vmoe.training.distill import Distiller
from vmoe.training.progress import say
from vmoe.training.superclasses import SuperclassLoss
from vmoe.training.upcycling import make_sparse
from vmoe.utils.config import ConfigError
from vmoe.utils.world import world

logger = logging.getLogger("vmoe.training")

Batch = dict[str, Tensor]
MAX_LOGIT_SCALE = math.log(100)  # with CLIP's loss (arXiv 2103.00020, section 2.5); big_vision's SigLIP has no bound


def create_task(config: Config) -> Classification | Contrastive:
    """The task of a config, with its data sets opened, or a ConfigError."""
    return Classification(config) if config.task == "classification" else Contrastive(config)


def with_steps(config: Config) -> Config:
    """The config with its train.steps, which follow from train.epochs if it has those: all processes call it.

    ConfigError: it has other steps too.
    """
    train = config.train
    steps = train.steps or STEPS
    if train.epochs is not None:

        def count() -> int:
            """Batches of an epoch; the last, incomplete one is dropped."""
            dataset = build_dataset(config.data.train, "data.train")
            return batches_of(dataset, config.data.loader, config.seed).steps_per_epoch

        steps = max(1, math.ceil(train.epochs * from_first(count) / train.accumulate_steps))
        if train.steps not in (None, steps):
            found = f"{steps} {'step' if steps == 1 else 'steps'}"
            both = f"train.steps is {train.steps}, and train.epochs {train.epochs:g} makes {found}"
            raise ConfigError(f"{both}; give one of them, and null for the other (--train.steps null)")
    config = dataclasses.replace(config, train=dataclasses.replace(train, steps=steps))
    config.check()  # the warm-up against the steps
    return config


class Task:
    """What both tasks share. Each also has

    - `create_model(pretrained, continued)`: the config's model, with the weights of a file, or of the continued run;
    - `loss(model, batch, number)`: the float32 loss of a batch, without the auxiliary losses; `number` seeds what is
      random in it. It is averaged over the processes that share a batch;
    - `evaluate(model, device)`: metrics on the validation data, in float32 as by `eval.py`;
    - `metric_names()`: which metrics `evaluate` gives;
    - `example_names(samples)`: the names among which `draw_examples` ranks images.
    """

    tokenizer: Callable[[list[str]], Tensor] | None = None
    distiller: Distiller | None = None  # with a teacher; the trainer sets it
    superclasses: SuperclassLoss | None = None  # with super-classes
    target: Tensor  # of the latest batch: labels (B,), or the classes' shares in mixed images (B, C)

    def __init__(self, config: Config) -> None:
        self.config, self.name = config, config.model.name or config.model.pretrained
        if config.train.eval_every and config.data.val.type is None:
            raise ConfigError("data.val.type is missing: say what to evaluate on, or set train.eval_every to 0")
        self.train_data = build_dataset(config.data.train, "data.train")
        self.exif_orientation = applies_orientation(config.data.train)
        val = with_orientation(config.data.val) if self.exif_orientation else config.data.val
        self.val_data = build_dataset(val, "data.val") if config.train.eval_every else None
        self.class_names: list[str] | None = self.train_data.classes

    def cacheable(self) -> dict[str, ImageDataset]:
        """The data sets by their settings, whose images the run decodes again in each epoch."""
        train, sets = self.config.train, {"data.train": self.train_data, "data.val": self.val_data}
        epoch = batches_of(self.train_data, self.config.data.loader, self.config.seed).steps_per_epoch
        if train.steps * train.accumulate_steps < 2 * epoch:
            return {}
        return {name: images for name, images in sets.items() if images is not None and not images.decoded}

    def cache_images(self, console: Console) -> None:
        """Reads all images into memory, if the config says so; CacheTooSmall: they do not fit."""
        data, max_bytes = self.config.data, 1e9 * self.config.data.cache_gb
        if data.cache == "auto":
            sets, max_bytes = self.cacheable(), max_bytes / local_processes()
        else:
            sets = {"data.train": self.train_data, "data.val": self.val_data}
            sets = {name: images for name, images in sets.items() if images is not None}
        if data.cache is None or not sets:
            return
        began, hidden = time.monotonic(), not console.is_terminal  # to a file it would write an empty line
        shown = partial(track, description="images", console=console, transient=True, disable=hidden)
        try:
            workers = own_cores() if data.loader.num_workers else 0
            used = cache_images(sets, max_bytes, workers, shown) / 1e9
        except CacheTooSmall as error:
            if data.cache == "memory":
                raise
            say(console, f"cache: none, {error.reason}")
            return
        seconds, number = time.monotonic() - began, sum(map(len, sets.values()))
        say(console, f"cache: {number:,} decoded images, {used:.3g} GB, read in {seconds:.0f} s")

    def _build(self, pretrained: str | None, continued: bool, kwargs: dict[str, Any]) -> nn.Module:
        config = self.config.model
        if continued and config.upcycle:
            return create_model(pretrained=pretrained)  # the file's model is upcycled already
        try:
            model = create_model(config.name, pretrained=pretrained, **kwargs)
        except WeightsError as error:
            if continued or (stored := stored_name(pretrained)) in (None, config.name):
                raise
            raise ConfigError(
                f"model.pretrained {pretrained} holds {stored}, which does not fit model.name {config.name}: "
                "pass --model.name null to take the architecture of the file"
            ) from error
        if kept_as := experts_kept_as(model):
            raise ConfigError(
                f"model.pretrained {pretrained} keeps its experts as {kept_as}, for inference alone: "
                "give the file that was not quantized"
            )
        return make_sparse(model, config, self.train_data, kwargs) if config.upcycle else model

    def after_step(self, model: nn.Module) -> None:
        """Changes weights after an optimizer step."""

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """Further metrics for the log."""
        return {}

    def draw_examples(self, model: nn.Module, file: Path) -> bool:
        """Draws some of the validation (or training) data, the most probable names, and the expert of each patch.

        Returns whether it did; if it fails, a warning says why. All processes call it, and the first one writes the
        file: they draw together if the model is sharded.
        """
        first, evaluate = world()[0] == 0, self.config.evaluate
        try:
            data = self.val_data or self.train_data
            samples = from_first(lambda: list(data.examples(evaluate.examples)))  # process 0 reads them for all
            if samples and (first or is_sharded(model)):
                templates = evaluate.templates if self.tokenizer is not None else None
                names = self.example_names(samples)
                with TemporaryDirectory() as unwanted:
                    output = file if first else Path(unwanted, file.name)
                    example_figure(model, samples, names, self.tokenizer, output, templates=templates)
            return bool(samples)
        except Exception as error:
            logger.warning("no %s: %s", file.name, error or type(error).__name__)
            return False

    def _val_reading(self, model: nn.Module) -> tuple[Transform | NaFlexTransform, LoaderConfig]:
        evaluate = self.config.evaluate
        loader = dataclasses.replace(self.config.data.loader, batch_size=evaluate.batch_size, on_bad=evaluate.on_bad)
        return image_transform(model, loader), loader

    def _val_loader(self, model: nn.Module, device: torch.device) -> EvalLoader:
        transform, loader = self._val_reading(model)
        return eval_loader(self.val_data, transform, None, loader, device)


class Classification(Task):
    """Cross-entropy on labelled images, with timm's mixup and cutmix and label smoothing."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if self.class_names is None:
            raise ConfigError(f"task 'classification' needs labels, and data.train ({config.data.train.type}) has none")
        if self.val_data is not None:
            if self.val_data.classes is None:
                raise ConfigError("data.val has no labels; task 'classification' evaluates on labelled images")
            check_same_classes("data.train", self.class_names, "data.val", self.val_data.classes)
        self.mixup = build_mixup(config.data.augmentation, len(self.class_names), config.seed)

    def create_model(self, pretrained: str | None, continued: bool = False) -> nn.Module:
        kwargs = dict(self.config.model.kwargs)
        num_classes = kwargs.setdefault("num_classes", len(self.class_names))
        if num_classes != len(self.class_names):
            raise ConfigError(
                f"model.kwargs.num_classes is {num_classes}, but data.train has {len(self.class_names)} classes; "
                "leave num_classes out to take it from the data"
            )
        if self.config.model.name in IMAGE_TEXT_NAMES:
            raise ConfigError(f"task 'classification' needs a classifier, and {self.name} is an image-text model")
        model = self._build(pretrained, continued, kwargs)
        if self.config.train.superclasses.source is not None:
            self.superclasses = SuperclassLoss(self.config.train.superclasses, model, self.class_names)
        return model

    def loss(self, model: nn.Module, batch: Batch, number: int) -> Tensor:
        images, target, smoothing = batch["image"], batch["label"], self.config.data.augmentation.label_smoothing
        if self.mixup is not None:
            (images, target), smoothing = self.mixup(images, target, number), 0.0  # its targets are smoothed already
        self.target = target
        logits = model(images).float()
        target = target.repeat_interleave(len(logits) // len(target), dim=0)  # an ensemble's copies of each image
        loss = F.cross_entropy(logits, target, label_smoothing=smoothing)
        return loss if self.distiller is None else self.distiller.classification(loss, images, logits)

    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        loader = self._val_loader(model, device)
        return evaluate_classification(model, loader, device=device, num_classes=len(self.class_names))

    def metric_names(self) -> list[str]:
        return accuracy_names(len(self.class_names))

    def example_names(self, samples: list[Any]) -> list[str]:
        return self.class_names


class Contrastive(Task):
    """open_clip's softmax (CLIP) or sigmoid (SigLIP, arXiv 2303.15343) loss on images with captions."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        from open_clip.loss import ClipLoss, SigLipLoss

        for key, data in (("data.train", self.train_data), ("data.val", self.val_data)):
            if data is not None and not data.has_captions and (key == "data.train" or data.classes is None):
                raise ConfigError(f"task 'contrastive' needs captions, and {key} has none")
        rank, processes = world()
        if config.train.loss == "sigmoid":
            self.criterion = SigLipLoss(rank=rank, world_size=processes)
        else:  # each process compares its own images and captions with those of all
            self.criterion = ClipLoss(local_loss=processes > 1, gather_with_grad=True, rank=rank, world_size=processes)
            # open_clip gathers with a function that newer versions of PyTorch call deprecated.
            warnings.filterwarnings("ignore", message="torch.distributed.nn.functional", category=FutureWarning)
        self.evaluation = config.evaluate.task
        if self.val_data is not None:
            names = self.val_data.classes
            self.evaluation = self.evaluation or ("zero_shot" if names else "retrieval")
            if self.evaluation == "retrieval" and not self.val_data.has_captions:
                raise ConfigError("evaluate.task 'retrieval' needs captions, and data.val has none; use 'zero_shot'")
            if self.evaluation == "zero_shot" and not names:
                raise ConfigError("evaluate.task 'zero_shot' needs class names, and data.val has none; use 'retrieval'")
            if self.evaluation == "zero_shot":
                check_class_names(names)
                resolve_templates(config.evaluate.templates)

    def create_model(self, pretrained: str | None, continued: bool = False) -> nn.Module:
        model = self._build(pretrained, continued, self.config.model.kwargs)
        if not is_contrastive(model):
            raise ConfigError(f"task 'contrastive' needs an image-text model, and {self.name} is none")
        if self.config.train.loss == "sigmoid" and getattr(model, "logit_bias", None) is None:
            raise ConfigError("train.loss 'sigmoid' needs a logit bias; set model.kwargs.init_logit_bias (SigLIP: -10)")
        self.tokenizer = get_tokenizer(model)
        with torch.device("cpu"):  # where the weights are sharded, other processes build the model without values
            if self.evaluation == "zero_shot":
                check_templates(self.tokenizer, self.config.evaluate.templates)
            self.previous_scale = torch.tensor(from_first(lambda: model.logit_scale.item()))
        return model

    def loss(self, model: nn.Module, batch: Batch, number: int) -> Tensor:
        if self.distiller is None:
            return self.compare(self.outputs(model, batch))
        own, theirs = self.distiller.tokenizers.divide(batch["text"])
        outputs = self.outputs(model, batch | {"text": own})

        def ask(teacher: nn.Module) -> dict[str, Tensor]:
            return self.outputs(teacher, {"image": self.distiller.adapt(batch["image"]), "text": theirs})

        return self.distiller.contrastive(self.compare(outputs), outputs, ask)

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """What the loss compares, in float32: features of images and text (B, C), logit scale and bias."""
        output = model(batch["image"], batch["text"])
        if not isinstance(output, dict):
            output = dict(zip(("image_features", "text_features", "logit_scale", "logit_bias"), output))
        return {name: value.float() for name, value in output.items() if value is not None}

    def compare(self, outputs: dict[str, Tensor]) -> Tensor:
        """The loss of `outputs`, together with those of all processes."""
        with torch.autocast(outputs["image_features"].device.type, enabled=False):  # they need more than 8 bits
            return self.criterion(**outputs)

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        """Clamps the logit scale as CLIP does, but not a frozen one, nor one that has always been out of bounds."""
        scale = model.logit_scale
        if self.config.train.loss != "softmax" or not scale.requires_grad:
            return
        previous = self.previous_scale.to(scale.device)
        was_inside = (previous >= 0) & (previous <= MAX_LOGIT_SCALE)
        scale.copy_(torch.where(was_inside, scale.clamp(0, MAX_LOGIT_SCALE), scale))
        self.previous_scale = scale.clone()

    def metrics(self, model: nn.Module) -> dict[str, float]:
        bias = getattr(model, "logit_bias", None)
        metrics = {} if bias is None else {"logit_bias": bias.item()}
        return {"logit_scale": model.logit_scale.exp().item(), **metrics}

    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        if self.evaluation == "retrieval":
            loader, image_of_caption = retrieval_loader(self.val_data, *self._val_reading(model), device)
            captions = self.val_data.captions
            return evaluate_retrieval(model, self.tokenizer, loader, captions, image_of_caption, device=device)
        names, templates = self.val_data.prompt_names or self.val_data.classes, self.config.evaluate.templates
        loader = self._val_loader(model, device)
        return evaluate_zero_shot(model, self.tokenizer, loader, names, templates, device=device)

    def metric_names(self) -> list[str]:
        return RECALL_NAMES if self.evaluation == "retrieval" else accuracy_names(len(self.val_data.classes))

    def example_names(self, samples: list[Any]) -> list[str]:
        data = self.val_data or self.train_data
        if data.classes:
            return data.classes
        captions = [sample.caption for sample in samples] + data.read_captions(range(min(1000, len(data))))
        return [caption for caption in dict.fromkeys(captions) if caption.strip()]
