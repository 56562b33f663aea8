"""The model of a training config on the meta device, and its parameters in the units that FSDP2 gathers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from vmoe.distributed.mesh import MeshSize
from vmoe.models.factory import create_model, is_contrastive
from vmoe.models.flops import count_parameters
from vmoe.models.serialization import find_weights, read_pretrained_metadata
from vmoe.models.upcycle import block_mlps, upcycle
from vmoe.moe import SparseMoE
from vmoe.moe.experts import Experts
from vmoe.training.config import Config
from vmoe.training.optim import freeze
from vmoe.utils.config import ConfigError

FLOAT32 = 4  # bytes; weights and gradients are stored and sent so, whatever the precision of autocast


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP2 gathers together: a block, the experts of a layer, or (named "") the rest of the model."""

    name: str
    parameters: list[nn.Parameter]
    experts: bool

    @property
    def size(self) -> int:
        """Number of parameters in the whole model."""
        return sum(parameter.numel() for parameter in self.parameters)

    def bytes(self, mesh: MeshSize, trained_only: bool = False) -> int:
        """Bytes in the process that holds most of them, FSDP2's padding included.

        FSDP2 cuts one dimension into `dp_shard` equal parts, so of a dimension of 1 (class token, position embedding)
        every process has the whole.
        """
        held = 0
        for parameter in self.parameters:
            shape = list(parameter.shape) or [1]
            if self.experts:
                shape[0] //= mesh.ep
            cut = self._cut(shape, mesh) if parameter.ndim else 0
            shape[cut] = -(-shape[cut] // mesh.dp_shard) if parameter.ndim else 1
            held += math.prod(shape) if parameter.requires_grad or not trained_only else 0
        return FLOAT32 * held

    def is_cut_along_width(self, mesh: MeshSize) -> bool:
        """FSDP2 cuts the second dimension, for which it copies what it gathers once more."""
        return mesh.dp_shard > 1 and any(self._cut(list(p.shape), mesh) for p in self.parameters)

    def _cut(self, shape: list[int], mesh: MeshSize) -> int:
        """The dimension that FSDP2 cuts, as in `vmoe.distributed.parallelize` (compared in tests/planning)."""
        return int(self.experts and (mesh.ep > 1 or (shape[0] % mesh.dp_shard > 0 and shape[1] % mesh.dp_shard == 0)))


@dataclass(frozen=True)
class ModelPlan:
    """A model to plan for.

    Attributes:
        model: on the meta device, in training mode.
        units: all parameters in the units of `vmoe.distributed.parallelize`, in the order in which their forward passes
            end: experts, their block, ..., the rest of the model.
        total: number of parameters.
        active: of those, how many a token passes through.
        num_experts: of each sparse layer.
        expert_widths: sizes along which FSDP2 cuts experts that are also divided by expert parallelism.
        notes: what the config leaves open, and what is assumed.
    """

    model: nn.Module
    units: list[Unit]
    total: int
    active: int
    num_experts: list[int]
    expert_widths: set[int]
    notes: list[str]


def make_model_plan(config: Config) -> ModelPlan:
    """Builds the model of a config on the meta device; reads neither data nor weights.

    Raises:
        ConfigError: a setting does not suit the model, or the model does not suit the task.
    """
    notes: list[str] = []
    name, kwargs = config.model.name, dict(config.model.kwargs)
    upcycled = dict(config.model.upcycle)
    if name is None:  # the file says which model it holds
        metadata = read_pretrained_metadata(find_weights(config.model.pretrained))
        name, kwargs = metadata["name"], {**metadata["kwargs"], **kwargs}
        upcycled = upcycled or metadata.get("upcycle") or {}
    if isinstance(kwargs.get("image"), dict):  # weights do not change the size
        kwargs["image"] = {key: value for key, value in kwargs["image"].items() if key != "pretrained"}
    try:
        with torch.device("meta"):
            model = create_model(name, **kwargs)
            if upcycled:
                model = upcycle(model, **upcycled)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model: {error}") from error
    if is_contrastive(model) != (config.task == "contrastive"):
        needed = "an image-text model" if config.task == "contrastive" else "a classifier"
        raise ConfigError(f"task {config.task!r} needs {needed}, and {name} is none")
    if config.task == "classification" and "num_classes" not in kwargs:
        notes.append(f"num_classes comes from the data; {model.num_classes} are counted (set model.kwargs.num_classes)")
    freeze(model, config.train.freeze)
    model.train()
    total, active = count_parameters(model)
    layers = [layer.num_experts for layer in model.modules() if isinstance(layer, SparseMoE)]
    widths = {parameter.shape[1] for parameter in expert_parameters(model)}
    return ModelPlan(model, model_units(model), total, active, layers, widths, notes)


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The stacked parameters of all experts."""
    return [parameter for layer in model.modules() if isinstance(layer, Experts) for parameter in layer.parameters()]


def model_units(model: nn.Module) -> list[Unit]:
    """The units of a model, see `ModelPlan`."""
    experts = [name for name, module in model.named_modules() if isinstance(module, Experts)]
    names: list[tuple[str, bool]] = []
    for mlp in block_mlps(model):
        block = mlp.removesuffix(".mlp")
        names += [(name, True) for name in experts if name.startswith(block + ".")]
        names.append((block, False))
    seen: set[int] = set()
    units = []
    for name, is_experts in [*names, ("", False)]:
        own = [parameter for parameter in model.get_submodule(name).parameters() if id(parameter) not in seen]
        seen.update(map(id, own))
        units.append(Unit(name, own, is_experts))
    return units
