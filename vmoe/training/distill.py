"""Distillation (`train.distill`): a frozen teacher, and the losses by which the student learns from it.

The teacher sees the student's own images, after augmentation and mixup, resized and normalised as its preprocessing
says ("consistent teaching", arXiv 2106.05237). It is in every process, whole and in evaluation mode.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmoe.data import LoaderConfig, build_transform, eval_loader
from vmoe.data.dataset import ImageDataset
from vmoe.data.seeding import isolated_randomness
from vmoe.evaluation.class_names import class_columns
from vmoe.evaluation.classification import predict, select_columns
from vmoe.evaluation.loaded_model import stored_class_names, weights_fingerprint
from vmoe.evaluation.synchronized import SynchronizedBatches
from vmoe.models.factory import create_model, get_tokenizer, is_contrastive, named_weights, preprocess_config
from vmoe.models.serialization import find_weights
from vmoe.training.config import DistillConfig
from vmoe.utils.config import ConfigError
from vmoe.utils.world import world

PROJECTION = "distill_projection"  # a child of the student while it trains: its optimizer state lies with the others'
TEACHER_REMEDY = "give a teacher of these classes, or teach train.distill.features alone, with train.distill.weight 0"
PREVIEW = 200  # images of the validation data by which the teacher is judged at the start


def soft_loss(student_BC: Tensor, teacher_BC: Tensor, temperature: float) -> Tensor:
    """T² KL(teacher, student) between softmax(logits / T), mean over the rows (arXiv 1503.02531, 2012.12877)."""
    own, theirs = (F.log_softmax(logits / temperature, dim=1) for logits in (student_BC, teacher_BC))
    return temperature**2 * F.kl_div(own, theirs, reduction="batchmean", log_target=True)


def feature_loss(projected_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """1 - cosine, half the squared distance of normalised features; a projection as in FitNets (arXiv 1412.6550)."""
    return 1 - F.cosine_similarity(projected_BD.float(), teacher_BD.float(), dim=1).mean()


class Distiller:
    """The teacher of a run with what it is asked, and its cost.

    Attributes:
        fingerprint: SHA-256 of the teacher's weights, or None for weights that timm or open_clip download by a name.
        parts: the losses of the latest batch without a graph: "task_loss" of the labels or captions, "distill_loss"
            and, with features, "feature_loss".
    """

    def __init__(
        self,
        settings: DistillConfig,
        student: nn.Module,
        data: ImageDataset,
        tokenizer: Callable[[list[str]], Tensor] | None,
        device: torch.device,
    ) -> None:
        self.settings, self.device, self.parts = settings, device, {}
        self.own, self.columns, self._features, self._spans = preprocess_config(student), None, {}, []
        self.teacher = _create_teacher(settings, image_text=tokenizer is not None).to(device)
        weights = None if named_weights(None, settings.teacher) else find_weights(settings.teacher)
        self.fingerprint = weights and weights_fingerprint(weights)
        if settings.features:
            _keep_features(self.teacher, self._features, "teacher")
        self.theirs, outputs = _try_out(self.teacher, settings, self.own["input_size"][0], device)
        if tokenizer is not None:
            from open_clip.loss import ClipLoss

            rank, processes = world()  # as in the contrastive task: a process compares its own part with all
            local = {"local_loss": processes > 1, "gather_with_grad": True}
            self._similarities = ClipLoss(**local, rank=rank, world_size=processes).get_logits
            self.tokenizers = TwoTokenizers(tokenizer, get_tokenizer(self.teacher))
        elif settings.weight and not getattr(self.teacher, "num_classes", outputs):
            raise ConfigError(f"train.distill.teacher {settings.teacher} has no classifier: {TEACHER_REMEDY}")
        elif settings.weight:
            self.columns = _class_columns(settings.teacher, weights, outputs, data)
        if settings.features:
            self._project = self._create_projection(student)

    def _scores(self, images: Tensor) -> Tensor:
        """The teacher's logits (B, C), of the data's classes where it has a share in the loss."""
        return select_columns(self.teacher(images).float(), self.columns)

    def _create_projection(self, student: nn.Module) -> nn.Module:
        width = getattr(student.get_classifier(), "in_features", None) or student.head_hidden_size
        with isolated_randomness():
            projection = nn.Linear(width, self._features["teacher"].shape[1])
        projection.replicate = True  # it is called outside of the model, where FSDP2 would have it in parts
        return projection

    def attach(self, student: nn.Module) -> None:
        """Gives the student the projection of its features, if they are taught: after its average is made, and before
        it is made parallel."""
        if self.settings.features:
            _keep_features(student, self._features, "student")
            student.add_module(PROJECTION, self._project.to(next(student.parameters()).device))

    def adapt(self, images: Tensor) -> Tensor:
        """The student's images as the teacher takes them."""
        own, theirs = self.own, self.theirs
        if all(own[key] == theirs[key] for key in ("input_size", "mean", "std")):
            return images
        values = [images.new_tensor(each[key]).view(-1, 1, 1) for each in (own, theirs) for key in ("mean", "std")]
        pixels, size = images * values[1] + values[0], theirs["input_size"][1:]
        if tuple(pixels.shape[2:]) != tuple(size):
            mode = "bilinear" if theirs["interpolation"] == "bilinear" else "bicubic"
            pixels = F.interpolate(pixels, size, mode=mode, antialias=True).clamp(0, 1)  # bicubic overshoots
        return (pixels - values[2]) / values[3]

    def classification(self, loss: Tensor, images: Tensor, logits_BC: Tensor) -> Tensor:
        """The loss of the labels together with the teacher's, of the student's images and logits."""
        settings, parts = self.settings, {}
        with self._timed():
            teacher_BC = self._scores(self.adapt(images))
            copies = len(logits_BC) // len(images)  # of each image, if the student is an ensemble
            teacher_BC = teacher_BC.repeat_interleave(copies, dim=0)
        if settings.weight:
            parts["distill_loss"] = soft_loss(logits_BC, teacher_BC, settings.temperature)
        if settings.features:
            projected = self._project(self._features.pop("student"))
            teacher_BD = self._features["teacher"].unflatten(0, (len(images), -1)).mean(1)
            teacher_BD = teacher_BD.repeat_interleave(len(projected) // len(images), dim=0)
            parts["feature_loss"] = feature_loss(projected, teacher_BD)
        return self._together(loss, parts)

    def contrastive(self, loss: Tensor, outputs: dict[str, Tensor], ask: Callable[[nn.Module], dict]) -> Tensor:
        """The contrastive loss together with that of the teacher's similarities of images and captions, over all
        images and over all captions (TinyCLIP, arXiv 2309.12314; CLIP-KD, 2307.12732; open_clip's DistillClipLoss).

        `outputs` are the student's, and `ask` gives the teacher's.
        """
        with self._timed():
            teacher_outputs = ask(self.teacher)
        with torch.autocast(loss.device.type, enabled=False):
            names = ("image_features", "text_features", "logit_scale")
            own, theirs = (self._similarities(*(each[name] for name in names)) for each in (outputs, teacher_outputs))
            losses = [soft_loss(*pair, self.settings.temperature) for pair in zip(own, theirs)]
        return self._together(loss, {"distill_loss": sum(losses) / 2})

    def _together(self, loss: Tensor, parts: dict[str, Tensor]) -> Tensor:
        weights = {"distill_loss": self.settings.weight, "feature_loss": self.settings.features}
        self.parts = {name: part.detach() for name, part in {"task_loss": loss, **parts}.items()}
        return (1 - self.settings.weight) * loss + sum(weights[name] * part for name, part in parts.items())

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """No gradients, and the time of the device counts as the teacher's."""
        with torch.no_grad():
            began = self._now()
            yield
            self._spans.append((began, self._now()))

    def _now(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take_seconds(self) -> float:
        """The teacher's time since this was asked last, once the device has done that work."""
        spans, self._spans = self._spans, []
        if self.device.type != "cuda":
            return sum(end - began for began, end in spans)
        return sum(began.elapsed_time(end) for began, end in spans) / 1000

    @torch.no_grad()
    def describe(self, data: ImageDataset | None) -> str:
        """A line about the teacher, with its accuracy on some images of `data`, read by its own transform.

        All processes call it.
        """
        _, height, width = self.theirs["input_size"]
        mean, std = ([round(value, 3) for value in self.theirs[key]] for key in ("mean", "std"))
        millions = sum(parameter.numel() for parameter in self.teacher.parameters()) / 1e6
        text = f"teacher: {self.settings.teacher}, {millions:.2f} M parameters, sees {height} x {width} pixels, "
        text += f"mean {mean}, std {std}"
        if self.columns is not None:
            text += f", asked for {len(self.columns)} of ImageNet's classes"
        if data is None or data.classes is None or not self.settings.weight or hasattr(self, "tokenizers"):
            return text
        reading = LoaderConfig(batch_size=20, num_workers=0, on_bad="skip")
        loader = eval_loader(data, build_transform(self.theirs, None), None, reading, indices=data.spread(PREVIEW))
        found = predict(self._scores, SynchronizedBatches(loader, self.teacher), device=self.device)
        return f"{text}, top1 {found.results()['top1']:.3f} on {len(found.index_N)} images of data.val"


class TwoTokenizers(NamedTuple):
    """The student's token ids (B, L) and the teacher's side by side, as a batch carries them."""

    own: Callable[[list[str]], Tensor]
    theirs: Callable[[list[str]], Tensor]

    def __call__(self, texts: list[str]) -> Tensor:
        return torch.cat([self.own(texts), self.theirs(texts)], dim=1)

    def divide(self, tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
        """(the student's, the teacher's) token ids."""
        length = self.own([""]).shape[1]
        return tokens_BL[:, :length], tokens_BL[:, length:]


def _class_columns(teacher: str, weights: Path | None, outputs: int, data: ImageDataset) -> list[list[int]] | None:
    """`class_columns` of the teacher and the training data."""
    names = weights and stored_class_names(weights, outputs)
    try:
        return class_columns(f"train.distill.teacher {teacher}", outputs, names, "data.train", data)
    except ConfigError as error:
        raise ConfigError(f"{error}: {TEACHER_REMEDY}") from error


@contextmanager
def without_projection(model: nn.Module) -> Iterator[nn.Module | None]:
    """The model alone inside the block, as its files hold it; gives the projection of its features, or None."""
    projection = model._modules.pop(PROJECTION, None)
    try:
        yield projection
    finally:
        if projection is not None:
            model.add_module(PROJECTION, projection)


def _create_teacher(settings: DistillConfig, image_text: bool) -> nn.Module:
    try:
        with isolated_randomness():
            teacher = create_model(pretrained=settings.teacher)
    except ValueError as error:
        raise ConfigError(f"train.distill.teacher: {error}") from error
    if is_contrastive(teacher) != image_text:
        kinds = ("an image-text model", "a classifier")
        (needed, found), task = (kinds, "contrastive") if image_text else (kinds[::-1], "classification")
        raise ConfigError(f"train.distill.teacher {settings.teacher} is {found}, and task {task!r} needs {needed}")
    return teacher.requires_grad_(False).eval()


def _try_out(
    teacher: nn.Module, settings: DistillConfig, channels: int, device: torch.device
) -> tuple[dict[str, Any], int]:
    """(how images reach the teacher, its number of outputs), after it is changed for the size of the settings."""
    config, size = preprocess_config(teacher), settings.image_size
    own, *sizes = config["input_size"] if size is None else (config["input_size"][0], size, size)
    if channels not in (1, own):
        numbers = f"{own} channel{'s' * (own > 1)}, and the student's {channels}; they must agree"
        raise ConfigError(f"images of train.distill.teacher {settings.teacher} have {numbers}")
    try:
        if size is not None and hasattr(teacher, "set_input_size"):
            teacher.set_input_size(img_size=(size, size))
        with torch.no_grad():
            outputs = getattr(teacher, "encode_image", teacher)(torch.zeros(1, own, *sizes, device=device)).shape[1]
    except (ValueError, AssertionError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        pixels = f"cannot take images of {sizes[0]} x {sizes[1]} pixels ({reason}); change train.distill.image_size"
        raise ConfigError(f"train.distill.teacher {settings.teacher} {pixels}") from error
    return {**config, "input_size": (own, *sizes)}, outputs


def _keep_features(model: nn.Module, kept: dict[str, Tensor], name: str) -> nn.Module:
    """Keeps what the classifier gets, the pooled features (B, D), at each call; returns the classifier."""
    classifier = model.get_classifier()
    if not isinstance(classifier, nn.Module):
        raise ConfigError(
            f"train.distill.features needs one classifier, and the {name} has {type(classifier).__name__}"
        )

    def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        kept[name] = inputs[0].flatten(1)

    classifier.register_forward_pre_hook(keep)
    return classifier
