"""The tasks of an evaluation: each takes (config, loaded model, dataset, console) and returns an `Outcome`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from rich.console import Console

from vmoe.data import ImageDataset, build_dataset, eval_loader
from vmoe.data.sources.folder import warn_of_text_order
from vmoe.distributed.process_group import gather_lists
from vmoe.evaluation.adversarial import evaluate_attacks
from vmoe.evaluation.capacity import Score, sparse_image_layers, sweep_capacity, sweep_settings
from vmoe.evaluation.capacity_report import flat_results, print_sweep, sweep_details
from vmoe.evaluation.class_names import IMAGENET, class_columns
from vmoe.evaluation.classification import (
    Predictions,
    checked_logits,
    confidences,
    predict,
    select_columns,
    together,
)
from vmoe.evaluation.config import EvaluationConfig
from vmoe.evaluation.confusion import MOST_CLASSES, confusion_matrix
from vmoe.evaluation.few_shot import few_shot
from vmoe.evaluation.inference import evaluating
from vmoe.evaluation.loaded_model import LoadedModel
from vmoe.evaluation.metrics import accuracy_per_class, separation
from vmoe.evaluation.probe import knn, linear_probe
from vmoe.evaluation.results_file import Outcome, Progress
from vmoe.evaluation.retrieval import evaluate_retrieval, retrieval_loader
from vmoe.evaluation.robustness import corruption_errors, missing_conditions
from vmoe.evaluation.zero_shot import Template, resolve_prompts
from vmoe.models.factory import preprocess_config
from vmoe.moe.quantize import experts_kept_as
from vmoe.moe.record import record_routing
from vmoe.utils.config import ConfigError

logger = logging.getLogger("vmoe.evaluation")


def classify(config: EvaluationConfig, loaded: LoadedModel, dataset: ImageDataset, console: Console) -> Outcome:
    """Tasks "classification" and "zero_shot": accuracy and calibration, also of each class and condition."""
    loader = eval_loader(dataset, loaded.transform, None, config.loader)
    # A mistake there comes first.
    ood_data = None if config.ood_data.type is None else build_dataset(config.ood_data, "ood_data")
    with evaluating(loaded.model, loaded.device, loaded.precision):
        score, batches = class_scores(config, loaded, dataset), Progress(loader, config.task, console)
        predictions = predict(score, batches, device=loaded.device, label_sets=dataset.label_sets)
        found = {}
        if ood_data is not None:
            batches = Progress(eval_loader(ood_data, loaded.transform, None, config.loader), "ood_data", console)
            confidence_N, skipped = confidences(score, batches, loaded.device)
            found = {**separation(predictions.confidence_N, confidence_N), "num_ood_skipped": skipped}
    outcome = classification_outcome(predictions, dataset, loader.skipped_paths, config.output is not None)
    return outcome._replace(results=outcome.results | found)


def class_scores(config: EvaluationConfig, loaded: LoadedModel, dataset: ImageDataset) -> Score:
    """images -> scores of the data's classes, of an ensemble those of each member; call it inside `evaluating`."""
    if loaded.tokenizer is not None:
        return loaded.scorer(*zero_shot_prompts(config, dataset))
    columns = columns_of(config, loaded, dataset)
    num_classes = len(dataset.classes) if columns is None else None
    return lambda images: select_columns(checked_logits(loaded.model, images, num_classes), columns)


def columns_of(config: EvaluationConfig, loaded: LoadedModel, dataset: ImageDataset) -> list[list[int]] | None:
    """`class_columns` of a classifier and the data of the config."""
    data = f"data of type {config.data.type!r}"
    return class_columns(loaded.checkpoint, loaded.model.num_classes, loaded.class_names, data, dataset)


def zero_shot_prompts(
    config: EvaluationConfig, dataset: ImageDataset
) -> tuple[list[str], Sequence[Template] | str | None]:
    """The names that images are compared with, one for each class of the data, and their templates.

    Unless the config has templates, they are those published with the names.
    """
    if config.class_names is None:
        published = None if dataset.prompt_names is None else IMAGENET
        templates = published if config.templates is None else config.templates
        return dataset.prompt_names or dataset.classes, templates
    try:
        return resolve_prompts(config.class_names, config.templates, dataset.classes)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def classification_outcome(
    predictions: Predictions, dataset: ImageDataset, skipped_paths: list[str], confusions: bool = False
) -> Outcome:
    """The metrics of all predictions, and of each class and condition; with the confusion matrix if it is wanted."""
    results, details, confusion_CC = predictions.results(), {}, None
    if dataset.label_sets is None:
        if confusions and predictions.num_classes > MOST_CLASSES:
            count = f"{predictions.num_classes:,} classes, more than {MOST_CLASSES:,}"
            logger.warning("%s: no tables of the classes and no confusion matrix are written", count)
        elif confusions:
            confusion_CC = confusion_matrix(predictions.label_N, predictions.predicted_N, predictions.num_classes)
        details["per_class"] = predictions.per_class(dataset.classes)
    else:
        del results["mean_per_class"]  # an image of several classes is of none alone
    if dataset.conditions is not None:
        condition_N = torch.tensor(dataset.condition_of)[predictions.index_N]
        accuracy_C, counts_C = accuracy_per_class(predictions.rank_N == 0, condition_N, len(dataset.conditions))
        rows = zip(dataset.conditions, accuracy_C.tolist(), counts_C.tolist(), strict=True)
        found = {name: {"top1": accuracy, "num_samples": count} for name, accuracy, count in rows if count}
        errors = {name: 1 - entry["top1"] for name, entry in found.items()}
        corrupted, missing = corruption_errors(errors), missing_conditions(errors)
        details |= {"conditions": found, "corruption_errors": corrupted, "missing_conditions": missing}
        results |= {name: value for name, value in corrupted.items() if name == "mce"}
    details["skipped"] = sorted(gather_lists(list(skipped_paths)))
    samples = {"index": predictions.index_N, "label": predictions.label_N, "predicted": predictions.predicted_N}
    return Outcome(results, details, confusion_CC, {**samples, "top1": (predictions.rank_N == 0).int()})


def retrieval(config: EvaluationConfig, loaded: LoadedModel, dataset: ImageDataset, console: Console) -> Outcome:
    """Task "retrieval": images to captions and back."""
    loader, image_of_caption = retrieval_loader(dataset, loaded.transform, config.loader)
    batches, where = Progress(loader, config.task, console), {"device": loaded.device, "precision": loaded.precision}
    results = evaluate_retrieval(loaded.model, loaded.tokenizer, batches, dataset.captions, image_of_caption, **where)
    return Outcome(results, {"skipped": sorted(gather_lists(list(loader.skipped_paths)))})


def capacity(config: EvaluationConfig, loaded: LoadedModel, dataset: ImageDataset, console: Console) -> Outcome:
    """Task "capacity": the accuracy of "classification" or "zero_shot" at several capacities of the images."""
    groups = replace(config.loader, batch_size=config.capacity.images_per_group)
    loader = eval_loader(dataset, loaded.transform, None, groups)
    with evaluating(loaded.model, loaded.device, loaded.precision):
        score = class_scores(config, loaded, dataset)
        image = torch.zeros(1, *preprocess_config(loaded.model)["input_size"], device=loaded.device)
        layers = sparse_image_layers(loaded.model, score, image, loaded.checkpoint)
        settings, rounds = sweep_settings(config.capacity, layers), config.capacity.timing_rounds
        batches, label_sets = Progress(loader, config.task, console), dataset.label_sets
        sweep = sweep_capacity(loaded.model, score, batches, layers, settings, loaded.device, label_sets, rounds)
    print_sweep(sweep, loaded.checkpoint, console)
    details = {**sweep_details(sweep), "skipped": gather_lists(list(loader.skipped_paths))}
    return Outcome(flat_results(sweep), details)


def adversarial(config: EvaluationConfig, loaded: LoadedModel, dataset: ImageDataset, console: Console) -> Outcome:
    """Task "adversarial": the accuracy of "classification" or "zero_shot" under attacks on the pixels."""
    settings, transform = config.adversarial, loaded.transform
    mean, std = transform.mean.to(loaded.device), transform.std.to(loaded.device)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(settings.seed))
    chosen = order[: settings.max_samples].sort().values.tolist()
    in_pixels = replace(transform, mean=torch.zeros_like(transform.mean), std=torch.ones_like(transform.std))
    loader = eval_loader(dataset, in_pixels, None, config.loader, indices=chosen)
    with evaluating(loaded.model, loaded.device, loaded.precision):
        score, batches = class_scores(config, loaded, dataset), Progress(loader, config.task, console)
        _check_independence(loaded, score)
        outcome = evaluate_attacks(
            loaded.model, lambda pixels: together(score((pixels - mean) / std)), batches, settings, loaded.device
        )
    return outcome._replace(details=outcome.details | {"skipped": sorted(gather_lists(list(loader.skipped_paths)))})


TASKS: dict[str, Callable[[EvaluationConfig, LoadedModel, ImageDataset, Console], Outcome]] = {
    "classification": classify,
    "zero_shot": classify,
    "retrieval": retrieval,
    "few_shot": few_shot,
    "linear_probe": linear_probe,
    "knn": knn,
    "capacity": capacity,
    "adversarial": adversarial,
}


def check_task(config: EvaluationConfig, loaded: LoadedModel, dataset: ImageDataset) -> None:
    """ConfigError unless task, model and data go together."""
    task, kind, contrastive = config.task, config.data.type, loaded.tokenizer is not None
    needed = {"classification": False, "zero_shot": True, "retrieval": True}.get(task, contrastive)
    if contrastive != needed:
        holds = "an image-text model: use zero_shot or retrieval" if contrastive else "a classifier: use classification"
        raise ConfigError(f"task {task!r} does not fit {loaded.checkpoint}, which holds {holds}")
    if task == "retrieval" and not dataset.has_captions:
        raise ConfigError(f"task 'retrieval' needs captions, and data of type {kind!r} has none")
    if task != "retrieval" and dataset.classes is None:
        raise ConfigError(f"task {task!r} needs labels, and data of type {kind!r} has none")
    if task == "adversarial":
        _check_attacks(config, loaded, dataset)
    if task in ("classification", "capacity", "adversarial") and not contrastive:
        columns = columns_of(config, loaded, dataset)
        if columns is None and loaded.class_names is None:
            warn_of_text_order(dataset.classes, f"{loaded.checkpoint}, which holds no class names,")


@torch.no_grad()
def _check_independence(loaded: LoadedModel, score: Score) -> None:
    """ConfigError: tokens of several images compete for an expert, so the attack on one changes the others."""
    with record_routing(loaded.model) as record:
        score(torch.zeros(1, *preprocess_config(loaded.model)["input_size"], device=loaded.device))
    for name, call in record.layers.items():
        layer, tokens = loaded.model.get_submodule(name), call.batch_shape[1] * call.groups.ensemble_size
        limited = not layer.per_token or layer.capacity or layer.eval_capacity_factor
        shared = tokens % layer.group_size if layer.group_size else layer.per_token
        if limited and shared:
            remedy = "create_model(pretrained=..., eval_capacity_factor=None, capacity=None, group_size=None)"
            raise ConfigError(
                f"task 'adversarial' attacks each image by itself, and layer {name} of {loaded.checkpoint} has one "
                f"limited capacity for the images of a batch: save the model of vmoe.{remedy} and attack that"
            )


def _check_attacks(config: EvaluationConfig, loaded: LoadedModel, dataset: ImageDataset) -> None:
    """ConfigError unless model and data have what task "adversarial" needs."""
    if (kind := experts_kept_as(loaded.model)) is not None:
        raise ConfigError(f"task 'adversarial' needs gradients, and experts kept as {kind} have none: use another file")
    if dataset.label_sets is not None:
        raise ConfigError(
            f"task 'adversarial' needs one class per image, and data of type {config.data.type!r} has more"
        )
    if "apgd_t" in config.adversarial.attacks and len(dataset.classes) < 4:
        problem = f"needs four classes, and the data has {len(dataset.classes)}"
        raise ConfigError(f"attack 'apgd_t' {problem}: leave it out of adversarial.attacks")
