"""The images that a run draws: now and then where the patches go, and examples at its end."""

from __future__ import annotations

import logging
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image
from torch import nn

from vmoe.distributed.parallelize import is_sharded
from vmoe.distributed.process_group import any_process
from vmoe.inspection.maps import example_figure
from vmoe.moe import SparseMoE
from vmoe.training.config import Config
from vmoe.training.logger import MetricsLog
from vmoe.training.tasks import Task
from vmoe.utils.world import world

logger = logging.getLogger("vmoe.training")

NUM_IMAGES = 6


class RoutingImages:
    """Draws the routing of the same few images again and again, in evaluation mode, for TensorBoard."""

    def __init__(self, config: Config, task: Task, log: MetricsLog) -> None:
        train = config.train
        self.every = train.eval_every if train.routing_images_every is None else train.routing_images_every
        self.on = train.tensorboard and self.every > 0
        self.config, self.task, self.log = config, task, log

    def due(self, step: int) -> bool:
        return self.on and (step == self.config.train.steps or step % self.every == 0)

    def draw(self, step: int, model: nn.Module) -> None:
        """Writes the image of a step; after one that failed there is no other. All processes call it."""
        self.on = any(isinstance(module, SparseMoE) for module in model.modules())
        if self.on:
            with TemporaryDirectory() as folder:
                file = Path(folder, "patches.png")
                self.on = draw_examples(self.task, model, self.config, NUM_IMAGES, file, "image of the routing")
                if self.on and world()[0] == 0 and file.exists():
                    self.log.image(step, "routing/patches", np.asarray(Image.open(file).convert("RGB")))


def draw_examples(task: Task, model: nn.Module, config: Config, number: int, file: Path, what: str) -> bool:
    """Draws validation images, their most probable names, and the expert of each patch, into a file of process 0.

    All processes call it: they draw together if the model is sharded, else the first does. False: it failed in one of
    them; a warning says why there is no `what`, and training goes on without.
    """
    failed, first = False, world()[0] == 0
    try:
        samples = task.examples(number)
        names = task.example_names(samples)
        if samples and (first or is_sharded(model)):
            templates = config.evaluate.templates if task.tokenizer is not None else None
            with TemporaryDirectory() as unwanted:
                output = file if first else Path(unwanted, file.name)
                example_figure(model, samples, names, task.tokenizer, output, templates=templates)
    except Exception as error:
        logger.warning("no %s: %s", what, error or type(error).__name__)
        failed = True
    return not any_process(failed)
