"""What is planned: the model of a training config on the meta device, and its parameters by where they will lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
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


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP2 gathers together.

    Attributes:
        name: of the module; "" for what no other unit has.
        parameters: on the meta device.
        experts: they belong to the experts of one layer.
    """

    name: str
    parameters: list[nn.Parameter]
    experts: bool

    @property
    def size(self) -> int:
        """Number of parameters in the whole model."""
        return sum(parameter.numel() for parameter in self.parameters)

    def held(self, mesh: MeshSize, trained_only: bool = False) -> int:
        """Number of parameters in the process that has most of them, with what FSDP2 fills up.

        FSDP2 cuts one dimension into `dp_shard` parts of equal size, so that of a dimension of 1 (class token,
        positions) every process has the whole.
        """
        return sum(_held(one, self.experts, mesh) for one in self.parameters if one.requires_grad or not trained_only)

    def cut(self, mesh: MeshSize) -> int:
        """The dimension that FSDP2 cuts."""
        return max(_cut(parameter.shape, self.experts, mesh) for parameter in self.parameters)

    def gathered(self, mesh: MeshSize, trained_only: bool = False) -> int:
        """Number of parameters while a process has all parts, with what FSDP2 fills up."""
        return self.held(mesh, trained_only) * mesh.dp_shard


def _cut(shape: Sequence[int], experts: bool, mesh: MeshSize) -> int:
    """The dimension that FSDP2 cuts as `vmoe.distributed.parallelize` says (compared in tests/planning)."""
    return int(experts and (mesh.ep > 1 or (shape[0] % mesh.dp_shard > 0 and shape[1] % mesh.dp_shard == 0)))


def _held(parameter: nn.Parameter, experts: bool, mesh: MeshSize) -> int:
    shape = list(parameter.shape)
    if not shape:
        return 1
    if experts:
        shape[0] //= mesh.ep
    cut = _cut(shape, experts, mesh)
    shape[cut] = -(-shape[cut] // mesh.dp_shard)
    return math.prod(shape)


def unit_names(model: nn.Module) -> list[tuple[str, bool]]:
    """(name of a unit's module, it is a layer's experts), in the order in which their forward passes end."""
    experts = [name for name, module in model.named_modules() if isinstance(module, Experts)]
    names: list[tuple[str, bool]] = []
    for mlp in block_mlps(model):
        block = mlp.removesuffix(".mlp")
        names += [(name, True) for name in experts if name.startswith(block + ".")]
        names.append((block, False))
    return [*names, ("", False)]


@dataclass(frozen=True)
class Subject:
    """A model to plan for.

    Attributes:
        model: on the meta device, in training mode.
        units: all parameters, in the units of `vmoe.distributed.parallelize`.
        total: number of parameters.
        active: of those, how many a token goes through.
        num_experts: of each sparse layer.
        expert_widths: sizes along which FSDP2 would cut the experts' weights when they are spread as well.
        notes: what the config leaves open, and what was taken.
    """

    model: nn.Module
    units: list[Unit]
    total: int
    active: int
    num_experts: list[int]
    expert_widths: set[int]
    notes: list[str]


def make_subject(config: Config) -> Subject:
    """The model of a config on the meta device; reads neither data nor weights.

    Raises:
        ConfigError: a setting does not suit the model, or the model does not suit the task.
    """
    notes: list[str] = []
    name, kwargs = config.model.name, dict(config.model.kwargs)
    upcycled = dict(config.model.upcycle)
    if name is None:  # all that is known of the model is in the file
        metadata = read_pretrained_metadata(find_weights(config.model.pretrained))
        name, kwargs = metadata["name"], {**metadata["kwargs"], **kwargs}
        upcycled = upcycled or metadata.get("upcycle") or {}
    if isinstance(kwargs.get("image"), dict):  # weights, which say nothing about size
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
    stacked = [layer for layer in model.modules() if isinstance(layer, Experts)]
    widths = {parameter.shape[1] for layer in stacked for parameter in layer.parameters()}
    return Subject(model, _units(model), total, active, layers, widths, notes)


def _units(model: nn.Module) -> list[Unit]:
    seen: set[int] = set()

    def unit(name: str, experts: bool = False) -> Unit:
        own = [parameter for parameter in model.get_submodule(name).parameters() if id(parameter) not in seen]
        seen.update(id(parameter) for parameter in own)
        return Unit(name, own, experts)

    return [unit(name, experts) for name, experts in unit_names(model)]
