"""What a new run takes over from an earlier one beside the weights: the state of its optimizer."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from vmoe.models.dense_mlp import UpcycleError
from vmoe.models.factory import create_model, find_weights
from vmoe.models.serialization import checkpoint_weights
from vmoe.models.upcycle_optimizer import upcycle_optimizer
from vmoe.training.checkpoint import TRAINER, load_checkpoint
from vmoe.training.config import Config
from vmoe.training.optim import create_optimizer, freeze
from vmoe.utils.config import ConfigError, read_config


def carry_over_optimizer(pretrained: str, model: nn.Module, optimizer: Optimizer) -> None:
    """Gives a new optimizer the state of the run (or checkpoint) whose folder is `pretrained`.

    `model` is upcycled from that run's, or has the same names.
    """
    checkpoint = find_weights(pretrained).parent
    run_config = checkpoint.parent.parent / "config.yaml"
    for file in (checkpoint / TRAINER, run_config):
        if not file.is_file():
            raise ConfigError(
                f"model.pretrained_optimizer needs model.pretrained to be a run's folder or checkpoint, and {file} "
                "does not exist; set it to false to start the optimizer from scratch"
            )
    before = read_config(Config, ["--config", str(run_config)])
    old_model = create_model(pretrained=checkpoint_weights(checkpoint))
    freeze(old_model, before.train.freeze)
    old_optimizer = create_optimizer(old_model, before.optim)
    load_checkpoint(checkpoint, old_model, None, old_optimizer)
    try:
        upcycle_optimizer(old_optimizer, old_model, model, optimizer)
    except UpcycleError as error:
        raise ConfigError(f"model.pretrained_optimizer: {error}") from error
