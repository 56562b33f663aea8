"""The images that a run draws: now and then where the patches go, and examples at its end."""

from __future__ import annotations

import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from vmoe.data import build_transform
from vmoe.distributed.parallelize import is_sharded
from vmoe.distributed.process_group import any_process
from vmoe.inspection.maps import draw_maps, example_figure, maps_to_draw
from vmoe.inspection.style import without_glyph_warnings
from vmoe.models.factory import preprocess_config
from vmoe.moe import SparseMoE
from vmoe.training.config import Config
from vmoe.training.logger import MetricsLog
from vmoe.training.tasks import Task
from vmoe.utils.world import world

logger = logging.getLogger("vmoe.training")

NUM_IMAGES = 6
DPI = 100


class RoutingImages:
    """Draws the routing of the same few images again and again, in evaluation mode, for TensorBoard."""

    def __init__(self, config: Config, task: Task, log: MetricsLog) -> None:
        every = config.train.routing_images_every
        self.every = config.train.eval_every if every is None else every
        self.last = config.train.steps
        self.on = config.train.tensorboard and self.every > 0
        self.task, self.log, self.run = task, log, config.output_dir
        self._samples: list[Any] | None = None

    def due(self, step: int) -> bool:
        return self.on and (step == self.last or step % self.every == 0)

    def draw(self, step: int, model: nn.Module, device: torch.device) -> None:
        """Writes the image of a step; where that fails, a warning says why, once, and training goes on without.

        All processes call it: they draw together if the model is sharded, else the first does.
        """
        if not any(isinstance(module, SparseMoE) for module in model.modules()):
            self.on = False
            return
        failed = False
        try:
            if self._samples is None:
                self._samples = self.task.examples(NUM_IMAGES)
            if world()[0] == 0 or is_sharded(model):
                pixels = routing_image(model, self._samples, self.task, device, self.run)
                self.log.image(step, "routing/patches", pixels)
        except Exception as error:
            logger.warning("no images of the routing: %s", error or type(error).__name__)
            failed = True
        self.on = not any_process(failed)


def routing_image(model: nn.Module, samples: list[Any], task: Task, device: torch.device, run: str) -> np.ndarray:
    """Images beside the experts of their patches, (H, W, 3) uint8; a ValueError if there are none."""
    # Imported here: a run without images needs no matplotlib.
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from vmoe.evaluation.loaded_model import LoadedModel
    from vmoe.inspection.routing_statistics import sample_routing, sparse_layers

    transform = build_transform(preprocess_config(model), None)
    subject = LoadedModel(model, task.tokenizer, transform, device, "float32", run, Path(run))
    names = task.class_names if task.tokenizer is None else None
    drawn = []
    for sample in samples:
        routing = sample_routing(subject, sample.image, class_names=names)
        routing.path, routing.label, routing.caption = sample.path, sample.label, sample.caption
        drawn.append(routing)
    maps = maps_to_draw(drawn, {name: layer.num_experts for name, layer in sparse_layers(subject).items()})
    if not maps:
        raise ValueError("there are no images, or no sparse layer sees their patches")
    figure = draw_maps(drawn, maps, task.class_names)
    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    with without_glyph_warnings():
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def draw_examples(task: Task, model: nn.Module, file: Path | None, config: Config) -> None:
    """The figure at the end of a run: images, their most probable names, and where their patches were routed.

    All processes call it. Those of a sharded model draw it together, and the one with a `file` keeps it.
    """
    try:
        samples = task.examples(config.evaluate.examples)
        names = task.example_names(samples)
        if samples and (file is not None or is_sharded(model)):
            templates = config.evaluate.templates if task.tokenizer is not None else None
            with TemporaryDirectory() as unwanted:
                output = file or Path(unwanted, "examples.png")
                example_figure(model, samples, names, task.tokenizer, output, templates=templates)
    except Exception as error:  # the run itself is finished and saved
        logger.warning("no examples.png: %s", error or type(error).__name__)
