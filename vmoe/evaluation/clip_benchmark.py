"""Zero-shot and retrieval metrics by the code of LAION's CLIP_benchmark (extra `benchmark`), beside ours."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vmoe.data import ImageDataset, build_dataset
from vmoe.evaluation.config import EvaluationConfig
from vmoe.evaluation.loaded_model import LoadedModel, load_model
from vmoe.evaluation.tasks import TASKS, check_task, zero_shot_prompts
from vmoe.evaluation.zero_shot import resolve_templates
from vmoe.utils.config import ConfigError
from vmoe.utils.optional import import_optional

TOLERANCE = 1e-6
CUTOFFS = [1, 5, 10]
NEEDED = ("benchmark", "CLIP_benchmark's metrics need")  # the extra, for `import_optional`
# Theirs name the direction by what is found, ours by from what to what.
THEIR_NAMES = {
    "top1": "acc1",
    "top5": "acc5",
    "mean_per_class": "mean_per_class_recall",
    **{f"text_to_image_recall@{k}": f"image_retrieval_recall@{k}" for k in CUTOFFS},
    **{f"image_to_text_recall@{k}": f"text_retrieval_recall@{k}" for k in CUTOFFS},
}


def agree(rows: Sequence[tuple[str, float, float]]) -> bool:
    """Whether there are metrics and each is equal to theirs within the tolerance; NaN is equal to nothing."""
    return bool(rows) and all(abs(ours - theirs) <= TOLERANCE for _, ours, theirs in rows)


def compare(config: EvaluationConfig, console: Console) -> list[tuple[str, float, float]]:
    """[(measure, our metric, theirs)] of one checkpoint.

    Raises:
        ConfigError: a task that CLIP_benchmark is not asked for here, several checkpoints, data or settings that it
            counts otherwise, or model, task and data that do not go together.
        BadSample: an unreadable image.
        ModuleNotFoundError: CLIP_benchmark is not installed.
    """
    import_optional("clip_benchmark.metrics", *NEEDED)  # if it is missing, this is said before the work is done
    if config.task not in ("zero_shot", "retrieval") or not isinstance(config.checkpoint, str):
        raise ConfigError("the comparison is for one checkpoint and the tasks zero_shot and retrieval")
    if config.data.type is None:
        raise ConfigError("data.type is missing: say what to compare on")
    if config.loader.on_bad == "skip":
        raise ConfigError("loader.on_bad 'skip' cannot be compared, as CLIP_benchmark skips nothing: leave it out")
    dataset = build_dataset(config.data, "data")
    for name, what in (("label_sets", "several right labels"), ("conditions", "several conditions")):
        if getattr(dataset, name) is not None:
            raise ConfigError(f"data of type {config.data.type!r} has {what}, and CLIP_benchmark has no such metrics")
    loaded = load_model(config.checkpoint, config.device, config.precision, dataset.crop_pct)
    check_task(config, loaded, dataset)
    ours = TASKS[config.task](config, loaded, dataset, console).results
    if config.task == "zero_shot":
        names, templates = zero_shot_prompts(config, dataset)
        theirs = their_zero_shot(loaded, dataset, names, resolve_templates(templates), config.loader.batch_size)
        if "top5" not in ours:
            del theirs["acc5"]  # not a number for fewer than five classes, and 1 for five
            whose = "CLIP_benchmark" if len(names) < 5 else "vmoe"
            console.print(f"top5 is left out: {whose} has none for {len(names)} classes")
    else:
        theirs = their_retrieval(loaded, dataset, config.loader.batch_size)
    return [(name, ours[name], theirs[their]) for name, their in THEIR_NAMES.items() if their in theirs]


def their_zero_shot(
    loaded: LoadedModel,
    dataset: ImageDataset,
    names: Sequence[str],
    templates: Sequence[Callable[[str], str]],
    batch_size: int,
) -> dict[str, float]:
    """`clip_benchmark.metrics.zeroshot_classification.evaluate` of a data set with labels."""
    from clip_benchmark.metrics import zeroshot_classification

    samples = _Samples(len(dataset), lambda index: _image_and_label(loaded, dataset, index))
    samples.classes = list(names)
    with _accuracy_for_new_numpy():
        return zeroshot_classification.evaluate(
            loaded.model,
            DataLoader(samples, batch_size=batch_size),
            loaded.tokenizer,
            list(names),
            [_their_template(template) for template in templates],
            device=loaded.device.type,
            amp=loaded.precision != "float32",
        )


def their_retrieval(loaded: LoadedModel, dataset: ImageDataset, batch_size: int) -> dict[str, float]:
    """`clip_benchmark.metrics.zeroshot_retrieval.evaluate` of images, each with all of its captions."""
    from clip_benchmark.metrics import zeroshot_retrieval

    captions: dict[object, list[str]] = {}
    first: dict[object, int] = {}
    for index, caption in enumerate(dataset.captions):
        identity = index if dataset.image_ids is None else dataset.image_ids[index]
        captions.setdefault(identity, []).append(caption)
        first.setdefault(identity, index)
    images = list(first)
    samples = _Samples(
        len(images), lambda index: (loaded.transform(dataset[first[images[index]]].image), captions[images[index]])
    )
    return zeroshot_retrieval.evaluate(
        loaded.model,
        DataLoader(samples, batch_size=batch_size, collate_fn=_collate),
        loaded.tokenizer,
        device=loaded.device.type,
        amp=loaded.precision != "float32",
        recall_k_list=[k for k in CUTOFFS if k <= len(images)],
    )


def their_command(argv: Sequence[str]) -> int:
    """Runs `clip_benchmark` with these arguments; `--model_type vmoe --pretrained RUN` stands for a checkpoint."""
    cli, models = (import_optional(f"clip_benchmark.{name}", *NEEDED) for name in ("cli", "models"))

    def load(model_name: str, pretrained: str, cache_dir: str | None, device: str) -> tuple:
        loaded = load_model(pretrained, device)
        return loaded.model, loaded.transform, loaded.tokenizer

    models.TYPE2FUNC["vmoe"] = load
    if "vmoe" not in models.MODEL_TYPES:
        models.MODEL_TYPES.append("vmoe")  # the choices of their --model_type
    with _accuracy_for_new_numpy(), patch.object(sys, "argv", ["clip_benchmark", *argv]):
        cli.main()
    return 0


@contextmanager
def _accuracy_for_new_numpy() -> Iterator[None]:
    """Their `accuracy` (1.6.2) makes a float of an array of shape (1,), which NumPy refuses since 2.4."""
    from clip_benchmark.metrics import zeroshot_classification

    own = zeroshot_classification.accuracy

    def accuracy(output: Tensor, target: Tensor, topk: tuple[int, ...] = (1,)) -> list[float]:
        try:
            return own(output, target, topk)
        except TypeError:
            top = output.topk(max(topk)).indices
            return [(top[:, :k] == target[:, None]).any(dim=1).double().mean().item() for k in topk]

    with patch.object(zeroshot_classification, "accuracy", accuracy):
        yield


class _Samples(Dataset):
    def __init__(self, length: int, get: Callable[[int], tuple]) -> None:
        self.length, self.get = length, get

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple:
        return self.get(index)


def _image_and_label(loaded: LoadedModel, dataset: ImageDataset, index: int) -> tuple[Tensor, int]:
    sample = dataset[index]
    return loaded.transform(sample.image), sample.label


def _collate(samples: list[tuple[Tensor, list[str]]]) -> tuple[Tensor, list[list[str]]]:
    images, captions = zip(*samples)
    return torch.stack(images), list(captions)


def _their_template(template: Callable[[str], str]) -> str:
    """Theirs are for str.format, with {c} for the name."""
    return template("\0").replace("{", "{{").replace("}", "}}").replace("\0", "{c}")
