"""The model of a training config on the meta device, and its parameters in the units that FSDP2 gathers."""

import math
from dataclasses import dataclass

from torch import nn

from vmoe.distributed.mesh import MeshSize
from vmoe.models.factory import create_model, is_contrastive, named_weights
from vmoe.models.serialization import find_weights, read_pretrained_metadata
from vmoe.models.upcycle import block_mlps, upcycle_steps
from vmoe.moe.experts import Experts
from vmoe.training.config import Config
from vmoe.training.optim import freeze
from vmoe.training.upcycling import same_layers
from vmoe.utils.config import ConfigError
from vmoe.utils.meta import meta_device

FLOAT32 = 4  # bytes; weights and gradients are stored and sent so, whatever the precision of autocast


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP2 gathers together: a block, the experts of a layer, or (named "") the rest of the model."""

    name: str
    parameters: list[nn.Parameter]
    experts: bool

    def bytes(self, mesh: MeshSize, trained_only: bool = False) -> int:
        """Bytes in the process that holds most of them: FSDP2 cuts one dimension into `dp_shard` equal parts, so of a
        dimension of 1 (class token, position embedding) every process has the whole.
        """
        held = 0
        for parameter in self.parameters:
            if parameter.requires_grad or not trained_only:
                shape = list(parameter.shape) or [1]
                shape[0] //= mesh.ep if self.experts else 1
                # As in `vmoe.distributed.parallelize`: experts may be cut along their width.
                uneven = self.experts and shape[0] % mesh.dp_shard > 0 and shape[1] % mesh.dp_shard == 0
                cut = 1 if uneven or (self.experts and mesh.ep > 1) else 0
                shape[cut] = -(-shape[cut] // mesh.dp_shard)
                held += math.prod(shape)
        return FLOAT32 * held


def make_model(config: Config) -> tuple[nn.Module, list[str]]:
    """(the model of a config on the meta device in training mode, what the config leaves open); reads no weights."""
    if config.lora.targets:
        raise ConfigError("lora.targets cannot be planned; leave it out to plan the training of all weights")
    notes: list[str] = []
    name, kwargs, upcycled = config.model.name, dict(config.model.kwargs), [config.model.upcycle]
    if name is None and (named := named_weights(None, config.model.pretrained)):
        name = named[0]
    elif name is None:  # the file says which model it holds
        metadata = read_pretrained_metadata(find_weights(config.model.pretrained))
        name, kwargs = metadata["name"], {**metadata["kwargs"], **kwargs}
        upcycled = upcycled if any(upcycled) else upcycle_steps(metadata)
    if isinstance(kwargs.get("image"), dict):  # weights do not change the size
        kwargs["image"] = {key: value for key, value in kwargs["image"].items() if key != "pretrained"}
    try:
        with meta_device():
            model = create_model(name, **kwargs)
            for step in filter(None, upcycled):
                model = same_layers(model, step)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model: {error}") from error
    if is_contrastive(model) != (config.task == "contrastive"):
        needed = "an image-text model" if config.task == "contrastive" else "a classifier"
        raise ConfigError(f"task {config.task!r} needs {needed}, and {name} is none")
    if config.task == "classification" and "num_classes" not in kwargs:
        notes.append(f"num_classes comes from the data; {model.num_classes} are counted (set model.kwargs.num_classes)")
    freeze(model, config.train.freeze)
    return model.train(), notes


def model_units(model: nn.Module) -> list[Unit]:
    """All parameters in the units of `vmoe.distributed.parallelize`, in the order in which their forward passes end."""
    experts = [name for name, module in model.named_modules() if isinstance(module, Experts)]
    names = []
    for block in (mlp.removesuffix(".mlp") for mlp in block_mlps(model)):
        names += [*(name for name in experts if name.startswith(f"{block}.")), block]
    seen: set[int] = set()
    units = []
    for name in [*names, ""]:
        own = [parameter for parameter in model.get_submodule(name).parameters() if id(parameter) not in seen]
        seen.update(map(id, own))
        units.append(Unit(name, own, name in experts))
    return units
