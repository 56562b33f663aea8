"""Routing statistics: what the experts of a model do with the patches and text tokens of a data set.

Shapes, by suffix: B batch, T tokens of one modality, P patches, E experts, K choices of a token (K = E where experts or
slots choose), C classes, D width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from vmoe.data import ImageDataset, eval_loader
from vmoe.data.config import LoaderConfig
from vmoe.data.images import to_rgb
from vmoe.evaluation.inference import changed, evaluating
from vmoe.evaluation.loaded_model import LoadedModel, weights_fingerprint
from vmoe.evaluation.results_file import Progress, library_versions
from vmoe.evaluation.zero_shot import Template, resolve_templates
from vmoe.inspection.accumulate import Agreement, LayerSums, ModalityTokens
from vmoe.inspection.forward import (
    likeliest_names,
    patch_grid,
    routed,
    shown_pixels,
    sparse_layers,
    text_routing,
    token_decoder,
)
from vmoe.inspection.results import RoutingStatistics, SampleRouting
from vmoe.moe import SparseMoE
from vmoe.utils.config import ConfigError


def gather_statistics(
    subject: LoadedModel,
    dataset: ImageDataset,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    on_bad: str = "fail",
    num_images: int = 200,
    num_patches: int = 16,
    templates: Sequence[Template] | str | None = None,
    eval_capacity_factor: float | None = None,
    batch_priority: bool | None = None,
    data: str | None = None,
    console: Console | None = None,
) -> RoutingStatistics:
    """Runs a model over a data set and sums up its routing.

    Memory does not grow with the data: there are running sums, the typical patches, and `num_images` samples. Where
    nothing is dropped the result does not depend on `batch_size`.

    Images go through the model together with their captions, as in training. Without captions an image-text model
    sees the images by themselves, and then the prompts of the class names, each once.

    Args:
        subject, dataset: a model with sparse layers; data with labels, captions, both or neither.
        batch_size, num_workers, on_bad: as in `vmoe.data.LoaderConfig`.
        num_images, num_patches: samples to keep, evenly spaced in the data, and typical patches for each expert.
        templates: prompts of class names, see `vmoe.evaluation.zero_shot.resolve_templates`.
        eval_capacity_factor, batch_priority: of all sparse layers in this call, to see what is dropped with the
            capacity of training; None: as the model is set.
        data: the data set in short; None: the name of its class.
        console: shows a progress bar.

    ValueError: a dense model, unusable settings, or no readable image. BadSample: as `on_bad` says.
    """
    if num_images < 0 or num_patches < 0:
        raise ConfigError(f"num_images and num_patches must be >= 0, got {num_images} and {num_patches}")
    settings = {} if batch_priority is None else {"batch_priority": batch_priority}
    if eval_capacity_factor is not None:
        if not eval_capacity_factor > 0:
            raise ConfigError(f"eval_capacity_factor must be > 0, got {eval_capacity_factor}")
        settings |= {"eval_capacity_factor": eval_capacity_factor, "capacity": None}  # a fixed one would override it
    tokenizer = subject.tokenizer if dataset.has_captions else None
    names = dataset.prompt_names or dataset.classes
    texts_from = "captions" if tokenizer is not None else None
    loader_config = LoaderConfig(batch_size=batch_size, num_workers=num_workers, on_bad=on_bad)
    loader = eval_loader(dataset, subject.transform, tokenizer, loader_config, subject.device)
    wanted = np.linspace(0, len(dataset) - 1, min(num_images, len(dataset))).round().astype(int).tolist()
    with (
        changed(sparse_layers(subject).values(), **settings),
        evaluating(subject.model, subject.device, subject.precision),
    ):
        gatherer = _Gatherer(subject, dataset, num_patches)
        for batch in loader if console is None else Progress(loader, "routing", console):
            gatherer.add_batch(batch, wanted)
        if not gatherer.num_samples:
            raise ValueError("no image was read: the data set is empty or none of its images is readable")
        if subject.tokenizer is not None and tokenizer is None and names is not None:
            texts_from = "class names"
            prompts = resolve_templates(templates)
            texts = [prompt(name) for name in names for prompt in prompts]
            for start in range(0, len(texts), batch_size):
                gatherer.add_texts(subject.tokenizer(texts[start : start + batch_size]))
        gatherer.name_images(templates)
        decode = token_decoder(subject.tokenizer) if subject.tokenizer is not None else None
        layers = [sums.finish(decode) for sums in gatherer.sums.values()]
    return RoutingStatistics(
        layers=layers,
        agreement=gatherer.agreement.matrices(),
        agreement_left_out=gatherer.agreement.left_out,
        class_names=dataset.classes,
        num_samples=gatherer.num_samples,
        num_skipped=loader.num_skipped,
        samples=list(gatherer.samples.values()),
        sample_index=list(gatherer.samples),
        texts_from=texts_from,
        checkpoint=subject.checkpoint,
        weights_fingerprint=weights_fingerprint(subject.weights),
        data=type(dataset).__name__ if data is None else data,
        data_fingerprint=dataset.fingerprint(),
        versions=library_versions(),
    )


def sample_routing(
    subject: LoadedModel,
    image: Image.Image,
    text: str | None = None,
    *,
    class_names: Sequence[str] | None = None,
    templates: Sequence[Template] | str | None = None,
) -> SampleRouting:
    """The routing of one image (of any size), and of a text with it, in every sparse layer.

    `class_names` are what it may be called, for `top_classes`, with `templates` as in
    `vmoe.evaluation.zero_shot.resolve_templates`; a classifier has its own, from its file. ValueError: a dense model, a
    text for a classifier, or class names that do not fit the model.
    """
    if text is not None and subject.tokenizer is None:
        raise ValueError(f"{subject.checkpoint} holds a classifier, which reads no text: leave the text out")
    sparse_layers(subject)
    texts = None if text is None else [text]
    _, [sample] = route_images(subject, [image], texts, class_names=class_names, templates=templates)
    return sample


def route_images(
    subject: LoadedModel,
    images: Sequence[Image.Image],
    texts: list[str] | None = None,
    *,
    class_names: Sequence[str] | None = None,
    templates: Sequence[Template] | str | None = None,
) -> tuple[dict[str, SparseMoE], list[SampleRouting]]:
    """({name: sparse layer}, the routing of some images in one pass); arguments as in `sample_routing`."""
    layers = sparse_layers(subject, required=False)
    image_BCHW = torch.stack([subject.transform(to_rgb(image)) for image in images]).to(subject.device)
    ids_BT = None if texts is None else subject.tokenizer(texts)
    names = None if class_names is None else list(class_names)
    with evaluating(subject.model, subject.device, subject.precision):
        tokens, output_BD = routed(subject, image_BCHW, ids_BT)
        pixels_BHWC = shown_pixels(subject, image_BCHW)
        found = [_sample(subject, layers, tokens, b, pixels_BHWC[b], ids_BT) for b in range(len(images))]
        if names is not None or subject.tokenizer is None:
            own = subject.class_names if names is None else names
            _name(found, likeliest_names(subject, output_BD, own, templates=templates), names is not None)
    for sample, text in zip(found, texts or [], strict=bool(texts)):
        sample.caption = text
    return layers, found


def _name(samples: Iterable[SampleRouting], tops: list[list[tuple[int, str, float]]], are_labels: bool) -> None:
    for sample, top in zip(samples, tops, strict=True):
        sample.top_classes = [(name, value) for _, name, value in top]
        sample.top_labels = [c for c, _, _ in top] if are_labels else []


def _sample(
    subject: LoadedModel,
    layers: Iterable[str],
    tokens: dict[str, dict[str, ModalityTokens]],
    b: int,
    pixels: np.ndarray,
    ids_BT: Tensor | None,
) -> SampleRouting:
    """Row `b` of a batch; path, label, caption and names are left open."""
    images, patches = tokens.get("image", {}), []
    text_tokens, texts = text_routing(subject, tokens.get("text", {}), ids_BT, b)
    for name in layers:
        patches.append(None)
        if name in images:
            prefix, *grid = patch_grid(subject.model, images[name].real_BT.shape[1])
            patches[-1] = images[name].routing(b, slice(prefix, None), grid)
    text = [texts.get(name) for name in layers] if texts else []
    return SampleRouting(pixels.copy(), "", None, None, text_tokens, patches, text, [])


class _Gatherer:
    """Streams batches through a model and keeps what `RoutingStatistics` needs."""

    def __init__(self, subject: LoadedModel, dataset: ImageDataset, num_patches: int) -> None:
        self.subject, self.dataset = subject, dataset
        layers = sparse_layers(subject)
        num_classes = None if dataset.classes is None else len(dataset.classes)
        self.sums = {name: LayerSums(name, layer, num_classes, num_patches) for name, layer in layers.items()}
        self.agreement = Agreement({name: layer.num_experts for name, layer in layers.items()})
        self.num_samples = 0
        self.samples: dict[int, SampleRouting] = {}  # by their index in the data set
        ids = dataset.image_ids or range(len(dataset))
        first = dict(zip(reversed(ids), reversed(range(len(dataset)))))
        self._first = np.zeros(len(dataset), bool)  # not another caption of an earlier image
        self._first[list(first.values())] = True
        self._outputs: list[Tensor] = []

    def add_batch(self, batch: dict[str, Tensor], wanted: list[int]) -> None:
        """Runs a batch of the loader; images whose indices are in `wanted` are kept."""
        tokens, output_BD = routed(self.subject, batch["image"], batch.get("text"))
        index_B = batch["index"].cpu().numpy()
        self.num_samples += len(index_B)
        pixels_BHWC = shown_pixels(self.subject, batch["image"])
        for name, own in tokens.get("image", {}).items():
            done_BTE = self.sums[name].add("image", own, batch["label"].cpu().numpy() if "label" in batch else None)
            prefix, *grid = patch_grid(self.subject.model, own.real_BT.shape[1])
            done_BPE = done_BTE[:, prefix:] * self._first[index_B][:, None, None]
            self.sums[name].add_patches(done_BPE, own.gate_BTE[:, prefix:], grid, index_B, pixels_BHWC)
        if "image" in tokens:
            self.agreement.add("image", tokens["image"])
        self._add_text(tokens.get("text", {}), batch.get("text"))
        for b in np.flatnonzero(np.isin(index_B, wanted)).tolist():
            sample = _sample(self.subject, self.sums, tokens, b, pixels_BHWC[b], batch.get("text"))
            raw = self.dataset[int(index_B[b])]
            sample.path, sample.label, sample.caption = raw.path, raw.label, raw.caption
            self.samples[int(index_B[b])] = sample
            self._outputs.append(output_BD[b].float())

    def add_texts(self, ids_BT: Tensor) -> None:
        """Runs texts without images."""
        self._add_text(routed(self.subject, None, ids_BT)[0].get("text", {}), ids_BT)

    def _add_text(self, layers: dict[str, ModalityTokens], ids_BT: Tensor | None) -> None:
        for name, own in layers.items():
            self.sums[name].add("text", own, ids_BT=ids_BT.cpu().numpy())
        if layers:
            self.agreement.add("text", layers)

    def name_images(self, templates: Sequence[Template] | str | None) -> None:
        """Fills in the likeliest names of the kept images: of the data's classes or else the kept captions; of a
        classifier its own, or those of the data where its file does not hold them and it has as many classes."""
        if not self.samples:
            return
        output_BD, classes = torch.stack(self._outputs), self.dataset.classes
        names, columns = classes, self.dataset.class_columns
        if self.subject.tokenizer is not None:
            captions = dict.fromkeys(sample.caption for sample in self.samples.values() if sample.caption)
            names, columns = self.dataset.prompt_names or classes or list(captions), None
            templates = templates if classes else None
            if not names:
                return
        elif columns is None:
            fitting = classes is not None and len(classes) == output_BD.shape[1]
            names = self.subject.class_names or (classes if fitting else None)
        tops = likeliest_names(self.subject, output_BD, names, columns, templates)
        of_data = classes is not None and names is not None and len(names) == len(classes)
        _name(self.samples.values(), tops, of_data)
