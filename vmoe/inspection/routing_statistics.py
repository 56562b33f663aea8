"""Routing statistics: what the experts of a model do with the patches and text tokens of a data set.

Shapes, by suffix: B batch, T tokens of one modality, P patches, E experts, C classes, D width of the embeddings.
"""

from collections.abc import Sequence
from typing import Any

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
from vmoe.inspection.accumulate import Agreement, LayerSums
from vmoe.inspection.forward import Routed, name_images, patch_grid, routed, sparse_layers, token_decoder
from vmoe.inspection.results import RoutingStatistics, SampleRouting, evenly_spaced
from vmoe.moe import SparseMoE
from vmoe.utils.config import ConfigError


def gather_statistics(
    loaded: LoadedModel,
    dataset: ImageDataset,
    loader_config: LoaderConfig | None = None,
    *,
    num_images: int = 200,
    num_patches: int = 16,
    templates: Sequence[Template] | str | None = None,
    eval_capacity_factor: float | None = None,
    batch_priority: bool | None = None,
    data: str | None = None,
    console: Console | None = None,
) -> RoutingStatistics:
    """Runs a model over a data set and sums up its routing; of each labelled image E numbers are kept for each layer.

    Images go through the model with their captions, as in training; without captions an image-text model sees the
    images alone, and then the prompts of the class names, each once. ValueError: a dense model, unusable settings, or
    no readable image. BadSample: as the loader's `on_bad` says.

    Args:
        loader_config: batches and workers; None: 64 images, read by this process.
        num_images, num_patches: samples to keep, evenly spaced in the data, and typical patches for each expert.
        templates: prompts of class names, see `vmoe.evaluation.zero_shot.resolve_templates`.
        eval_capacity_factor, batch_priority: of all sparse layers in this call; None: as the model is set.
        data: the data set in short; None: the name of its class.
        console: shows a progress bar.
    """
    if num_images < 0 or num_patches < 0:
        raise ConfigError(f"num_images and num_patches must be >= 0, got {num_images} and {num_patches}")
    settings: dict[str, Any] = {} if batch_priority is None else {"batch_priority": batch_priority}
    if eval_capacity_factor is not None:
        if not eval_capacity_factor > 0:
            raise ConfigError(f"eval_capacity_factor must be > 0, got {eval_capacity_factor}")
        settings |= {"eval_capacity_factor": eval_capacity_factor, "capacity": None}  # a fixed one would override it
    tokenizer = loaded.tokenizer if dataset.has_captions else None
    config = loader_config or LoaderConfig(batch_size=64, num_workers=0)
    loader = eval_loader(dataset, loaded.transform, tokenizer, config, loaded.device)
    layers = sparse_layers(loaded)
    with changed(layers.values(), **settings), evaluating(loaded.model, loaded.device, loaded.precision):
        gatherer = _Gatherer(loaded, dataset, layers, num_images, num_patches)
        for batch in loader if console is None else Progress(loader, "routing", console):
            gatherer.add_batch(batch)
        statistics = gatherer.finish(templates, config.batch_size)
    statistics.num_skipped = loader.num_skipped
    statistics.data = statistics.data if data is None else data
    return statistics


def sample_routing(loaded: LoadedModel, image: Image.Image, text: str | None = None) -> SampleRouting:
    """The routing of one image, and of a text with it, in every sparse layer; a classifier also names the image.

    ValueError: a dense model, or a text for a classifier.
    """
    if text is not None and loaded.tokenizer is None:
        raise ValueError(f"{loaded.checkpoint} holds a classifier, which reads no text: leave the text out")
    sparse_layers(loaded)
    return route_images(loaded, [image], None if text is None else [text])[0]


def route_images(
    loaded: LoadedModel,
    images: Sequence[Image.Image],
    texts: list[str] | None = None,
    class_names: Sequence[str] | None = None,
    templates: Sequence[Template] | str | None = None,
) -> list[SampleRouting]:
    """The routing of some images in one pass (of a dense model: none).

    `class_names` are what they may be called, for `top_classes`, with `templates` as for `resolve_templates`; a
    classifier has its own, from its file. ValueError: names that do not fit the model.
    """
    image_BCHW = torch.stack([loaded.transform(to_rgb(image)) for image in images]).to(loaded.device)
    with evaluating(loaded.model, loaded.device, loaded.precision):
        found = routed(loaded, image_BCHW, None if texts is None else loaded.tokenizer(texts))
        samples = [found.sample(b) for b in range(len(images))]
        if class_names is not None or loaded.tokenizer is None:
            names = loaded.class_names if class_names is None else list(class_names)
            name_images(samples, loaded, found.output_BD, names, class_names is not None, templates=templates)
    for sample, text in zip(samples, texts or [], strict=bool(texts)):
        sample.caption = text
    return samples


class _Gatherer:
    """Streams batches through a model and keeps what `RoutingStatistics` needs."""

    def __init__(
        self,
        loaded: LoadedModel,
        dataset: ImageDataset,
        layers: dict[str, SparseMoE],
        num_images: int,
        num_patches: int,
    ) -> None:
        self.loaded, self.dataset, size = loaded, dataset, len(dataset)
        num_classes = None if dataset.classes is None else len(dataset.classes)
        decode = None if loaded.tokenizer is None else token_decoder(loaded.tokenizer)
        self.sums = {name: LayerSums(name, one, num_classes, num_patches, decode) for name, one in layers.items()}
        self.agreement = Agreement({name: layer.num_experts for name, layer in layers.items()})
        self.num_samples = 0
        self.samples: dict[int, SampleRouting] = {}  # by their index in the data set
        self._wanted = evenly_spaced(size, num_images)
        ids = dataset.image_ids or range(size)
        first = dict(zip(reversed(ids), reversed(range(size))))
        self._is_first = np.isin(np.arange(size), list(first.values()))  # not another caption of an earlier image
        self._outputs: list[Tensor] = []

    def add_batch(self, batch: dict[str, Tensor]) -> None:
        """Runs a batch of the loader; the wanted images are kept."""
        found = routed(self.loaded, batch["image"], batch.get("text"))
        index_B = batch["index"].cpu().numpy()
        self.num_samples += len(index_B)
        images = found.tokens.get("image", {})
        for name, own in images.items():
            done_BTE = self.sums[name].add("image", own, batch["label"].cpu().numpy() if "label" in batch else None)
            prefix, *grid = patch_grid(self.loaded.model, own.real_BT.shape[1])
            done_BPE = done_BTE[:, prefix:] * self._is_first[index_B][:, None, None]
            self.sums[name].add_patches(done_BPE, own.gate_BTE[:, prefix:], grid, index_B, found.pixels_BHWC)
        if images:
            self.agreement.add("image", images)
        self._add_text(found)
        for b in np.flatnonzero(np.isin(index_B, self._wanted)).tolist():
            sample, raw = found.sample(b), self.dataset[int(index_B[b])]
            sample.path, sample.label, sample.caption = raw.path, raw.label, raw.caption
            self.samples[int(index_B[b])] = sample
            self._outputs.append(found.output_BD[b].float())

    def _add_text(self, found: Routed) -> None:
        layers = found.tokens.get("text", {})
        for name, own in layers.items():
            self.sums[name].add("text", own, ids_BT=found.ids_BT.cpu().numpy())
        if layers:
            self.agreement.add("text", layers)

    def finish(self, templates: Sequence[Template] | str | None, batch_size: int) -> RoutingStatistics:
        """Runs the prompts of the class names if the data have no captions, and gives the statistics; call it once."""
        if not self.num_samples:
            raise ValueError("no image was read: the data set is empty or none of its images is readable")
        loaded, dataset, texts_from = self.loaded, self.dataset, None
        names = dataset.prompt_names or dataset.classes
        if loaded.tokenizer is not None and dataset.has_captions:
            texts_from = "captions"
        elif loaded.tokenizer is not None and names is not None:
            texts_from, prompts = "class names", resolve_templates(templates)
            texts = [prompt(name) for name in names for prompt in prompts]
            for start in range(0, len(texts), batch_size):
                self._add_text(routed(loaded, None, loaded.tokenizer(texts[start : start + batch_size])))
        self._name_images(templates)
        return RoutingStatistics(
            layers=[sums.finish() for sums in self.sums.values()],
            agreement=self.agreement.matrices(),
            class_names=dataset.classes,
            num_samples=self.num_samples,
            num_skipped=0,
            samples=list(self.samples.values()),
            sample_index=list(self.samples),
            texts_from=texts_from,
            checkpoint=loaded.checkpoint,
            weights_fingerprint=weights_fingerprint(loaded.weights),
            data=type(dataset).__name__,
            data_fingerprint=dataset.fingerprint(),
            versions=library_versions(),
        )

    def _name_images(self, templates: Sequence[Template] | str | None) -> None:
        """Names the kept images: by the data's classes or else the kept captions; with a classifier by its own classes,
        or those of the data where its file does not hold them and it has as many."""
        if not self.samples:
            return
        output_BD, classes = torch.stack(self._outputs), self.dataset.classes
        names, columns = classes, self.dataset.class_columns
        if self.loaded.tokenizer is not None:
            captions = dict.fromkeys(sample.caption for sample in self.samples.values() if sample.caption)
            names, columns = self.dataset.prompt_names or classes or list(captions), None
            templates = templates if classes else None
            if not names:
                return
        elif columns is None:
            fitting = classes is not None and len(classes) == output_BD.shape[1]
            names = self.loaded.class_names or (classes if fitting else None)
        of_data = classes is not None and names is not None and len(names) == len(classes)
        name_images(self.samples.values(), self.loaded, output_BD, names, of_data, columns, templates)
