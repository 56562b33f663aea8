"""The state of an optimizer by parameter name: tensors for a safetensors file, all else for a JSON file.

    tensors: {"exp_avg/blocks.0.attn.qkv.weight": Tensor, ...}
    rest:    {"state": {"blocks.0.attn.qkv.weight": {"exp_avg": {"tensor": ""}, ...}, ...},
              "groups": [{"parameters": [names], "settings": {"lr": 0.001, ...}}, ...],
              "other": {...}}    what an optimizer adds to its state_dict (random state of Kron)

torch.distributed.checkpoint.state_dict flattens too, but holds no None, tuple or list (SGD, Kron), leaves out "other",
and makes a step of an optimizer without state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from vmoe.models.serialization import StoredTensors

TENSOR = {"tensor": ""}  # stands for one in the JSON: where it stands says its name
GROUPS = "its groups"


def export_state(optimizer: Optimizer, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, rest) of an optimizer over a model's parameters; the tensors are the optimizer's own.

    A ValueError names state that cannot be written, or not be loaded on another mesh.
    """
    names, full = _parameter_names(optimizer, model), optimizer.state_dict()
    encoder = _Encoder(model, type(optimizer).__name__)
    rest = {
        "state": {names[index]: encoder.all(values, names[index]) for index, values in full.pop("state").items()},
        "groups": [
            {"parameters": [names[index] for index in group.pop("params")], "settings": encoder.all(group, GROUPS)}
            for group in full.pop("param_groups")
        ],
        "other": encoder.all(full),
    }
    return encoder.tensors, rest


class _Encoder:
    """Makes JSON of the values of an optimizer's state; their tensors go to `tensors`."""

    def __init__(self, model: nn.Module, optimizer: str) -> None:
        self.model, self.optimizer = model, optimizer
        self.tensors: dict[str, Tensor] = {}

    def all(self, values: dict[str, Any], name: str = "") -> dict[str, Any]:
        return {key: self.encode(value, key, name) for key, value in values.items()}

    def encode(self, value: Any, key: str, name: str) -> Any:
        if isinstance(value, Tensor) and name == GROUPS and value.ndim == 0:  # it has no parameter's name
            return {"number": [value.item(), str(value.dtype).removeprefix("torch.")]}
        if isinstance(value, Tensor) and name != GROUPS:
            return self._tensor(value, key, name)
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, list | tuple):
            encoded = [self.encode(each, f"{key}.{index}", name) for index, each in enumerate(value)]
            return {"tuple": encoded} if isinstance(value, tuple) else encoded
        if isinstance(value, dict) and all(isinstance(each, str) for each in value):
            return {"dict": {inner: self.encode(each, f"{key}.{inner}", name) for inner, each in value.items()}}
        raise ValueError(f"the optimizer's {key} of {name} is a {type(value).__name__}, which a checkpoint cannot hold")

    def _tensor(self, value: Tensor, key: str, name: str) -> dict[str, str]:
        parameter = self.model.get_parameter(name) if name else value
        if isinstance(parameter, DTensor) and value.ndim > 0 and value.shape != parameter.shape:
            raise ValueError(
                f"the state {key!r} that {self.optimizer} keeps for {name} does not have its shape, so it cannot be "
                "sharded; take an optimizer such as adamw, sgd or lion, or parallel.dp_shard = parallel.ep = 1"
            )
        self.tensors[f"{key}/{name}"] = value.detach()
        return TENSOR


def import_state(optimizer: Optimizer, model: nn.Module, stored: StoredTensors | None, rest: dict[str, Any]) -> None:
    """Loads what `export_state` gave (the tensors, None if there are none, and the rest) into an optimizer.

    Its groups may be divided in another way, and the parameters may be DTensors on any mesh.

    Raises:
        ValueError: it is over other parameters, or its state does not fit or is not what `export_state` gave.
    """
    names, full = _parameter_names(optimizer, model), optimizer.state_dict()
    decoder = _Decoder(model, stored)
    try:
        before = {name: group["settings"] for group in rest["groups"] for name in group["parameters"]}
        new = set(names.values())
        for kind, missing in (("has", new - before.keys()), ("lacks", before.keys() - new)):
            if missing:
                raise ValueError(
                    f"the optimizer {kind} {min(missing)!r} (one of {len(missing)}), unlike the checkpoint's; train "
                    "the same parameters (train.freeze)"
                )
        indices = {name: index for index, name in names.items()}
        full["state"] = {indices[name]: decoder.all(values, name) for name, values in rest["state"].items()}
        for group in full["param_groups"]:
            settings = [before[names[index]] for index in group["params"]]
            if any(each != settings[0] for each in settings):
                raise ValueError("parameters that are one group now had different settings then")
            group |= decoder.all(settings[0]) if settings else {}
        full |= decoder.all(rest["other"])
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"the optimizer's state cannot be understood ({type(error).__name__}: {error})") from error
    decoder.read()
    optimizer.load_state_dict(full)


class _Decoder:
    """Reads what `_Encoder` made; the tensors are filled by `read`."""

    def __init__(self, model: nn.Module, stored: StoredTensors | None) -> None:
        self.model, self.stored = model, stored
        self.targets: dict[str, Tensor] = {}

    def all(self, values: dict[str, Any], name: str = "") -> dict[str, Any]:
        return {key: self.decode(value, key, name) for key, value in values.items()}

    def decode(self, value: Any, key: str, name: str) -> Any:
        if isinstance(value, list):
            return [self.decode(each, f"{key}.{index}", name) for index, each in enumerate(value)]
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "tuple":
            return tuple(self.decode(content, key, name))
        if kind == "dict":
            return {inner: self.decode(each, f"{key}.{inner}", name) for inner, each in content.items()}
        if kind == "number":
            return torch.tensor(content[0], dtype=_dtype(content[1]))
        if kind == "dtype":
            return _dtype(content)
        if value != TENSOR:
            raise ValueError(f"its {kind} {key!r} of {name} is not known")
        return self._tensor(f"{key}/{name}", self.model.get_parameter(name) if name else None)

    def _tensor(self, name: str, parameter: Tensor | None) -> Tensor:
        if self.stored is None or name not in self.stored.shapes:
            raise ValueError(f"its tensor {name!r} is not stored")
        shape, dtype = self.stored.shapes[name], self.stored.dtypes[name]
        if isinstance(parameter, DTensor) and shape == parameter.shape:
            self.targets[name] = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        elif isinstance(parameter, DTensor) and len(shape) > 0:
            raise ValueError(f"{name} is {tuple(shape)}, and cannot be sharded as {tuple(parameter.shape)}")
        else:
            self.targets[name] = torch.empty(shape, dtype=dtype)
        return self.targets[name]

    def read(self) -> None:
        unread = sorted(self.stored.shapes.keys() - self.targets.keys()) if self.stored is not None else []
        if unread:
            raise ValueError(f"its tensor {unread[0]!r} (one of {len(unread)}) belongs to no state of the optimizer")
        if self.targets:
            self.stored.read_into(self.targets)


def _dtype(name: str) -> torch.dtype:
    if not isinstance(getattr(torch, name, None), torch.dtype):
        raise ValueError(f"{name!r} is no type of numbers")
    return getattr(torch, name)


def _parameter_names(optimizer: Optimizer, model: nn.Module) -> dict[int, str]:
    """{index of a parameter in the optimizer's state_dict: its name}."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = zip(optimizer.param_groups, optimizer.state_dict()["param_groups"], strict=True)
    return {
        index: names[id(parameter)]
        for group, saved in groups
        for parameter, index in zip(group["params"], saved["params"], strict=True)
    }
