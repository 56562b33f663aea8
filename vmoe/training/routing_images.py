"""A picture, now and then during training, of where the patches go."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vmoe.data import build_transform
from vmoe.distributed.parallelize import is_sharded
from vmoe.distributed.process_group import any_process
from vmoe.models.factory import preprocess_config
from vmoe.moe import SparseMoE
from vmoe.training.config import Config
from vmoe.training.logger import MetricsLog
from vmoe.training.tasks import Task
from vmoe.utils.world import world

logger = logging.getLogger("vmoe.training")

NUM_PICTURES = 6
DPI = 100


class RoutingPictures:
    """Draws the routing of the same few pictures again and again, in evaluation mode.

    It takes no random number and changes nothing of the model, so training is the same with and without it.

    Args:
        config: of the run.
        task: whose validation pictures are drawn (training pictures, without validation).
        log: where the pictures go.
    """

    def __init__(self, config: Config, task: Task, log: MetricsLog) -> None:
        every = config.train.routing_picture_every
        self.every = config.train.eval_every if every is None else every
        self.last = config.train.steps
        self.on = config.train.tensorboard and self.every > 0
        self.task, self.log, self.run = task, log, config.output_dir
        self._samples: list[Any] | None = None

    def due(self, step: int) -> bool:
        """Whether this step has a picture."""
        return self.on and (step == self.last or step % self.every == 0)

    def draw(self, step: int, model: nn.Module, device: torch.device) -> None:
        """Writes the picture of a step; where that fails, a warning says why, once, and training goes on without.

        All processes call it: they draw together if the model's weights lie in several of them, else the first does.
        """
        if not any(isinstance(module, SparseMoE) for module in model.modules()):
            self.on = False
            return
        failed = False
        try:
            if self._samples is None:
                self._samples = self.task.examples(NUM_PICTURES)
            if world()[0] == 0 or is_sharded(model):
                pixels = routing_picture(model, self._samples, self.task, device, self.run)
                self.log.picture(step, "routing/patches", pixels)
        except Exception as error:
            logger.warning("no pictures of the routing: %s", error or type(error).__name__)
            failed = True
        self.on = not any_process(failed)


def routing_picture(
    model: nn.Module, samples: list[Any], task: Task, device: torch.device, checkpoint: str
) -> np.ndarray:
    """Pictures beside the experts of their patches, (H, W, 3) uint8.

    Args:
        model: a sparse model.
        samples: of a data set.
        task: of the run.
        device: where the model is.
        checkpoint: the run, for messages.

    Raises:
        ValueError: no samples, or the model's sparse layers see no patches on a grid.
    """
    # Imported here: a run without pictures needs no matplotlib.
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from vmoe.evaluation.loaded_model import Subject
    from vmoe.inspection.plots import draw_maps, maps_to_draw, one_line_for_missing_glyphs
    from vmoe.inspection.routing_statistics import sample_routing, sparse_layers

    transform = build_transform(preprocess_config(model), None)
    subject = Subject(model, task.tokenizer, transform, device, "float32", checkpoint, Path(checkpoint))
    drawn = []
    for sample in samples:
        names = task.class_names if task.tokenizer is None else None
        routing = sample_routing(subject, sample.image, class_names=names)
        routing.path, routing.label, routing.caption = sample.path, sample.label, sample.caption
        drawn.append(routing)
    layers = {name: layer.num_experts for name, layer in sparse_layers(subject).items()}
    maps = maps_to_draw(drawn, layers)
    if not maps:
        raise ValueError("there are no pictures, or no sparse layer sees their patches")
    figure = draw_maps(drawn, maps, task.class_names)
    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    with one_line_for_missing_glyphs():
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
