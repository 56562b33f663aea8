"""Routing statistics: what the experts of a model do with the patches and words of a data set.

Shapes, by suffix: B batch, T tokens of one modality, P patches, E experts, K choices of a token (K = E where experts or
slots choose), C classes, D width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from vmoe.data import ImageDataset, eval_loader
from vmoe.data.config import LoaderConfig
from vmoe.data.images import to_rgb
from vmoe.evaluation.inference import evaluating
from vmoe.evaluation.loaded_model import Subject, weights_fingerprint
from vmoe.evaluation.results_file import Progress, library_versions
from vmoe.evaluation.zero_shot import Template, resolve_templates
from vmoe.inspection.accumulate import Agreement, LayerSums, ModalityTokens
from vmoe.inspection.example_plot import patch_grid
from vmoe.inspection.forward import (
    checkpoint_classes,
    likeliest_names,
    routed,
    routing_settings,
    shown_pixels,
    sparse_layers,
)
from vmoe.inspection.results import (
    LayerStatistics,
    RoutingStatistics,
    SampleRouting,
    TokenRouting,
    TypicalPatch,
)
from vmoe.inspection.text_tokens import word_decoder
from vmoe.models.text import text_mask
from vmoe.moe import SparseMoE

__all__ = [
    "LayerStatistics",
    "RoutingStatistics",
    "SampleRouting",
    "TokenRouting",
    "TypicalPatch",
    "gather_statistics",
    "sample_routing",
]


def gather_statistics(
    subject: Subject,
    dataset: ImageDataset,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    on_bad: str = "fail",
    num_pictures: int = 200,
    num_patches: int = 16,
    templates: Sequence[Template] | str | None = None,
    eval_capacity_factor: float | None = None,
    batch_priority: bool | None = None,
    data: str | None = None,
    console: Console | None = None,
) -> RoutingStatistics:
    """Runs a model over a data set and sums up its routing.

    Memory does not grow with the data: there are running sums, the typical patches, and `num_pictures` samples. Where
    nothing is dropped the result does not depend on `batch_size`.

    Pictures go through the model together with their captions, as in training. Without captions an image-text model
    sees the pictures by themselves, and then the prompts of the class names, each once.

    Args:
        subject: a classifier or an image-text model with sparse layers.
        dataset: with labels, captions, both or neither.
        batch_size: pictures per forward pass.
        num_workers: processes that read pictures.
        on_bad: "fail" at the first unreadable picture, or "skip" and count them.
        num_pictures: samples to keep whole, spread evenly over the data.
        num_patches: typical patches to keep for each expert.
        templates: prompts of class names, see `vmoe.evaluation.zero_shot.resolve_templates`.
        eval_capacity_factor: room in the experts for this call, to see what is dropped with limited room as in
            training; None: as the model is set.
        batch_priority: whether important tokens go first, for this call; None: as the model is set.
        data: the data set in words; None: the name of its class.
        console: shows a progress bar; None: none.

    Raises:
        ValueError: a dense model, unusable settings, or no readable picture.
        BadSample: an unreadable picture, unless `on_bad` is "skip".
    """
    if num_pictures < 0 or num_patches < 0:
        raise ValueError(f"num_pictures and num_patches must be >= 0, got {num_pictures} and {num_patches}")
    gatherer = _Gatherer(subject, dataset, num_patches)
    captions = subject.tokenizer is not None and dataset.has_captions
    fingerprint = dataset.fingerprint()
    loader_config = LoaderConfig(batch_size=batch_size, num_workers=num_workers, on_bad=on_bad)
    tokenizer = subject.tokenizer if captions else None
    loader = eval_loader(dataset, subject.transform, tokenizer, loader_config, subject.device)
    wanted = np.linspace(0, len(dataset) - 1, min(num_pictures, len(dataset))).round().astype(int).tolist()
    with (
        routing_settings(subject.model, eval_capacity_factor, batch_priority),
        evaluating(subject.model, subject.device, subject.precision),
    ):
        for batch in loader if console is None else Progress(loader, "routing", console):
            gatherer.add_batch(batch, wanted)
        if not gatherer.num_samples:
            raise ValueError("no picture was read: the data set is empty or none of its pictures is readable")
        words_from = "captions" if captions else None
        names = dataset.prompt_names or dataset.classes
        if subject.tokenizer is not None and not captions and names is not None:
            words_from = "class names"
            prompts = resolve_templates(templates)
            texts = [t(name) if callable(t) else t.replace("{}", name) for name in names for t in prompts]
            for start in range(0, len(texts), batch_size):
                gatherer.add_texts(texts[start : start + batch_size])
        gatherer.name_pictures(templates)
        layers = [gatherer.layer_statistics(name) for name in gatherer.layers]
    return RoutingStatistics(
        layers=layers,
        agreement=gatherer.agreement.matrices(),
        agreement_left_out=gatherer.agreement.left_out,
        class_names=dataset.classes,
        num_samples=gatherer.num_samples,
        num_skipped=loader.num_skipped,
        samples=list(gatherer.samples.values()),
        sample_index=list(gatherer.samples),
        words_from=words_from,
        checkpoint=subject.checkpoint,
        weights_fingerprint=weights_fingerprint(subject.weights),
        data=type(dataset).__name__ if data is None else data,
        data_fingerprint=fingerprint,
        versions=library_versions(),
    )


def sample_routing(
    subject: Subject,
    image: Image.Image,
    text: str | None = None,
    *,
    class_names: Sequence[str] | None = None,
    templates: Sequence[Template] | str | None = None,
) -> SampleRouting:
    """The routing of one picture, and of a text with it, in every sparse layer.

    Args:
        subject: a classifier or an image-text model with sparse layers.
        image: of any size.
        text: for an image-text model; None: the picture alone.
        class_names: what the picture may be called, for `top_classes`. A classifier has its own, from its file; an
            image-text model without names gives none.
        templates: prompts of the class names, see `vmoe.evaluation.zero_shot.resolve_templates`.

    Raises:
        ValueError: a dense model, a text for a classifier, or class names that do not fit the model.
    """
    if text is not None and subject.tokenizer is None:
        raise ValueError(f"{subject.checkpoint} holds a classifier, which reads no text: leave the text out")
    layers = sparse_layers(subject)
    image_1CHW = subject.transform(to_rgb(image))[None].to(subject.device)
    ids_1T = None if text is None else subject.tokenizer([text])
    with evaluating(subject.model, subject.device, subject.precision):
        tokens, output_1D = routed(subject, image_1CHW, ids_1T)
        sample = _sample(subject, layers, tokens, 0, shown_pixels(subject, image_1CHW)[0], ids_1T)
        sample.caption = text
        names = None if class_names is None else list(class_names)
        if names is None and subject.tokenizer is None:
            names = checkpoint_classes(subject)
        if names is not None or subject.tokenizer is None:
            [top] = likeliest_names(subject, output_1D, names, None, templates)
            sample.top_classes = [(name, value) for _, name, value in top]
    return sample


def _sample(
    subject: Subject,
    layers: dict[str, SparseMoE],
    tokens: dict[str, dict[str, ModalityTokens]],
    b: int,
    pixels: np.ndarray,
    ids_BT: Tensor | None,
) -> SampleRouting:
    """Row `b` of a batch; path, label, caption and names are left open."""
    patches, text, words = [], [], []
    images, captions = tokens.get("image", {}), tokens.get("text", {})
    if ids_BT is not None:
        real_T = next(iter(captions.values())).real_BT[b] if captions else _real_words(subject, ids_BT[b])
        words = word_decoder(subject.tokenizer)(ids_BT[b][torch.from_numpy(real_T)].tolist())
        for name in layers:
            text.append(_token_routing(captions[name], b, real_T) if name in captions else None)
    for name in layers:
        own = images.get(name)
        if own is None:
            patches.append(None)
            continue
        prefix, rows, columns = patch_grid(subject.model, own.real_BT.shape[1])
        flat = _token_routing(own, b, slice(prefix, None))
        grid = (rows, columns, -1)
        patches.append(TokenRouting(flat.expert.reshape(grid), flat.weight.reshape(grid), flat.kept.reshape(grid)))
    return SampleRouting(pixels, "", None, None, words, patches, text, [])


def _real_words(subject: Subject, ids_T: Tensor) -> np.ndarray:
    """(T,) bool, up to the end of the text; for a model whose sparse layers see no words."""
    end = getattr(subject.tokenizer, "eot_token_id", None)
    return (ids_T != 0 if end is None else text_mask(ids_T[None], end)[0]).cpu().numpy()


def _token_routing(tokens: ModalityTokens, b: int, places) -> TokenRouting:
    return TokenRouting(*(array[b][places] for array in (tokens.expert_BTK, tokens.weight_BTK, tokens.kept_BTK)))


class _Gatherer:
    """Streams batches through a model and keeps what `RoutingStatistics` needs.

    Attributes:
        layers: {name: sparse layer}.
        sums: {layer name: running sums}.
        agreement: of all pairs of layers.
        num_samples: pictures read so far.
        samples: {place in the data set: a picture kept whole}.
    """

    def __init__(self, subject: Subject, dataset: ImageDataset, num_patches: int) -> None:
        self.subject, self.dataset = subject, dataset
        self.layers = sparse_layers(subject)
        num_classes = None if dataset.classes is None else len(dataset.classes)
        self.sums = {name: LayerSums(layer, num_classes, num_patches) for name, layer in self.layers.items()}
        self.agreement = Agreement({name: layer.num_experts for name, layer in self.layers.items()})
        self.num_samples = 0
        self.samples: dict[int, SampleRouting] = {}
        ids = dataset.image_ids or range(len(dataset))
        first = {own: place for place, own in reversed(list(enumerate(ids)))}
        self._first = np.zeros(len(dataset), bool)  # not yet another caption of a picture that was there before
        self._first[list(first.values())] = True
        self._outputs: dict[int, Tensor] = {}

    def add_batch(self, batch: dict[str, Tensor], wanted: list[int]) -> None:
        """Runs a batch of the loader; pictures whose places are in `wanted` are kept whole."""
        tokens, output_BD = routed(self.subject, batch["image"], batch.get("text"))
        index_B = batch["index"].cpu().numpy()
        self.num_samples += len(index_B)
        pixels_BHWC = shown_pixels(self.subject, batch["image"])
        for name, own in tokens.get("image", {}).items():
            sums = self.sums[name]
            done_BTE = sums.add("image", own)
            if "label" in batch and sums.expert_class is not None:
                sums.add_classes(done_BTE, batch["label"].cpu().numpy())
            self._add_patches(sums, own, done_BTE, index_B, pixels_BHWC)
        if "image" in tokens:
            self.agreement.add("image", tokens["image"])
        self._add_words(tokens.get("text", {}), batch.get("text"))
        for b in np.flatnonzero(np.isin(index_B, wanted)).tolist():
            place = int(index_B[b])
            sample = _sample(self.subject, self.layers, tokens, b, pixels_BHWC[b].copy(), batch.get("text"))
            raw = self.dataset[place]
            sample.path, sample.label, sample.caption = raw.path, raw.label, raw.caption
            self.samples[place] = sample
            self._outputs[place] = output_BD[b].float().cpu()

    def add_texts(self, texts: list[str]) -> None:
        """Runs texts without pictures."""
        ids_BT = self.subject.tokenizer(texts)
        tokens, _ = routed(self.subject, None, ids_BT)
        self._add_words(tokens.get("text", {}), ids_BT)

    def _add_words(self, layers: dict[str, ModalityTokens], ids_BT: Tensor | None) -> None:
        for name, own in layers.items():
            done_BTE = self.sums[name].add("text", own)
            self.sums[name].add_words(done_BTE, own.real_BT, ids_BT.cpu().numpy())
        if layers:
            self.agreement.add("text", layers)

    def _add_patches(
        self, sums: LayerSums, own: ModalityTokens, done_BTE: np.ndarray, index_B: np.ndarray, pixels_BHWC: np.ndarray
    ) -> None:
        prefix, rows, columns = patch_grid(self.subject.model, own.real_BT.shape[1])
        h, w = pixels_BHWC.shape[1] // rows, pixels_BHWC.shape[2] // columns

        def pixels(b: int, row: int, column: int) -> np.ndarray:
            return pixels_BHWC[b, row * h : (row + 1) * h, column * w : (column + 1) * w].copy()

        done_BPE = done_BTE[:, prefix:] * self._first[index_B][:, None, None]
        sums.add_patches(done_BPE, own.gate_BTE[:, prefix:], columns, index_B, pixels)

    def name_pictures(self, templates: Sequence[Template] | str | None) -> None:
        """Fills in the likeliest names of the kept pictures.

        Of an image-text model, names are those of the data's classes, or, without classes, the kept captions. Of a
        classifier they are its own; where its file does not hold them, those of the data if it has as many classes.
        """
        if not self.samples:
            return
        names, columns = self.dataset.classes, self.dataset.class_columns
        if self.subject.tokenizer is not None:
            captions = dict.fromkeys(sample.caption for sample in self.samples.values() if sample.caption)
            names, columns = self.dataset.prompt_names or names or list(captions), None
            templates = templates if self.dataset.classes else None
            if not names:
                return
        elif columns is None:
            num_outputs = next(iter(self._outputs.values())).shape[-1]
            fitting = names if names is not None and len(names) == num_outputs else None
            names = checkpoint_classes(self.subject) or fitting
        output_BD = torch.stack(list(self._outputs.values())).to(self.subject.device)
        found = likeliest_names(self.subject, output_BD, names, columns, templates)
        of_data = self.dataset.classes is not None and names is not None and len(names) == len(self.dataset.classes)
        for sample, top in zip(self.samples.values(), found, strict=True):
            sample.top_classes = [(name, value) for _, name, value in top]
            sample.top_labels = [c for c, _, _ in top] if of_data else []

    def layer_statistics(self, name: str) -> LayerStatistics:
        """The sums of a layer in their final form."""
        layer, sums = self.layers[name], self.sums[name]
        whole = (lambda array: array) if layer.router_type == "soft" else (lambda array: array.round().astype(np.int64))
        words: dict[str, np.ndarray] = {}
        if sums.expert_word:
            decode = word_decoder(self.subject.tokenizer)
            for word, done_E in zip(decode(list(sums.expert_word)), sums.expert_word.values(), strict=True):
                words[word] = words.get(word, 0) + done_E  # two ids may read the same
        sees_images = "image" in sums.tokens
        return LayerStatistics(
            name=name,
            num_experts=layer.num_experts,
            num_selected_experts=layer.num_selected_experts if layer.router_type == "top_k" else layer.num_experts,
            router=layer.router_type,
            eval_capacity_factor=layer.eval_capacity_factor,
            batch_priority=layer.batch_priority,
            capacity=layer.capacity,
            tokens=sums.tokens,
            asked={modality: whole(asked_E) for modality, asked_E in sums.asked.items()},
            kept={modality: whole(kept_E) for modality, kept_E in sums.kept.items()},
            importance=sums.importance,
            entropy=sums.entropy,
            share_dropped=sums.share_dropped,
            expert_class=whole(sums.expert_class) if sees_images and sums.expert_class is not None else None,
            expert_word={word: whole(done_E) for word, done_E in words.items()},
            typical_patches=[
                [TypicalPatch(sample, row, column, value, pixels) for value, sample, row, column, pixels in own]
                for own in sums.typical
            ],
        )
