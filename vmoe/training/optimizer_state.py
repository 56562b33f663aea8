"""The state of an optimizer by parameter name: tensors for a safetensors file, all else for a JSON file.

torch keys an optimizer's state by the place of a parameter in the groups. On another mesh the groups may be others, so
state and group settings are kept under the parameters' names here.

    tensors: {"exp_avg/blocks.0.attn.qkv.weight": Tensor, ...}
    rest:    {"state": {"blocks.0.attn.qkv.weight": {"exp_avg": {"tensor": "exp_avg/blocks..."}, ...}, ...},
              "groups": [{"parameters": [names], "settings": {"lr": 0.001, ...}}, ...],
              "other": {...}}    what an optimizer adds to its state_dict (random state of Kron)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from vmoe.models.serialization import StoredTensors


def export_state(optimizer: Optimizer, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, rest) of an optimizer over a model's parameters; the tensors are the optimizer's own.

    Raises:
        ValueError: there is state that cannot be written, or not be loaded on another mesh.
    """
    names, full = _names_by_place(optimizer, model), optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    state = {}
    for place, entries in full["state"].items():
        name = names[place]
        parameter = model.get_parameter(name)
        for key, value in entries.items():
            if isinstance(parameter, DTensor) and not _follows(value, parameter):
                raise ValueError(
                    f"the state {key!r} that {type(optimizer).__name__} keeps for {name} does not have its shape, so "
                    "it cannot be split over processes; take an optimizer such as adamw, sgd or lion, or "
                    "parallel.dp_shard = parallel.ep = 1"
                )
        state[name] = {key: _encode(value, key, name, tensors) for key, value in entries.items()}
    groups = []
    for group in full["param_groups"]:
        settings = {key: value for key, value in group.items() if key != "params"}
        groups.append(
            {
                "parameters": [names[place] for place in group["params"]],
                "settings": {
                    key: _encode(value, f"group.{key}", str(len(groups)), tensors) for key, value in settings.items()
                },
            }
        )
    other = {key: value for key, value in full.items() if key not in ("state", "param_groups")}
    other = {key: _encode(value, f"other.{key}", "", tensors) for key, value in other.items()}
    return tensors, {"state": state, "groups": groups, "other": other}


def import_state(optimizer: Optimizer, model: nn.Module, stored: StoredTensors | None, rest: dict[str, Any]) -> None:
    """Loads what `export_state` gave into an optimizer whose groups may be divided in another way.

    Args:
        optimizer: over the same parameters; changed in place.
        model: its parameters' names; they may be DTensors on any mesh.
        stored: the tensors; None if there are none.
        rest: the rest.

    Raises:
        ValueError: the optimizer is over other parameters, or its state does not fit, or is not what `export_state`
            gave: a value names a tensor of another one, or no value names a tensor.
    """
    names, full = _names_by_place(optimizer, model), optimizer.state_dict()
    before = {name: group["settings"] for group in rest["groups"] for name in group["parameters"]}
    new = set(names.values())
    for kind, missing in (("has", new - before.keys()), ("lacks", before.keys() - new)):
        if missing:
            raise ValueError(
                f"the optimizer {kind} {sorted(missing)[0]!r} (one of {len(missing)}), unlike the checkpoint's; train "
                "the same parameters (train.freeze)"
            )
    targets: dict[str, Tensor] = {}

    def decode(value: Any, key: str, name: str | None = None, parameter: Tensor | None = None) -> Any:
        """The value that `_encode` wrote for this key; the name is None where it may be another one than then."""
        if isinstance(value, list):
            return [decode(each, f"{key}.{place}", name, parameter) for place, each in enumerate(value)]
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "tuple":
            return tuple(decode(content, key, name, parameter))
        if kind == "dict":
            return {inner: decode(each, f"{key}.{inner}", name, parameter) for inner, each in content.items()}
        if kind == "dtype":
            dtype = getattr(torch, content, None)
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{content!r} is no type of numbers")
            return dtype
        if kind != "tensor" or stored is None or content not in stored.shapes:
            raise ValueError(f"its {kind} {content!r} is not stored")
        if name is not None and content != f"{key}/{name}":
            raise ValueError(f"the optimizer's {key} of {name} is said to be {content!r}, which is another one's")
        shape, dtype = stored.shapes[content], stored.dtypes[content]
        if isinstance(parameter, DTensor) and shape == parameter.shape:
            targets[content] = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        elif isinstance(parameter, DTensor) and len(shape) > 0:
            raise ValueError(
                f"{content} is {tuple(shape)}, and cannot be split as its parameter {tuple(parameter.shape)}"
            )
        else:
            targets[content] = torch.empty(shape, dtype=dtype)
        return targets[content]

    try:
        places = {name: place for place, name in names.items()}
        full["state"] = {}
        for name, entries in rest["state"].items():
            parameter = model.get_parameter(name)
            full["state"][places[name]] = {key: decode(value, key, name, parameter) for key, value in entries.items()}
        for group in full["param_groups"]:
            settings = [before[names[place]] for place in group["params"]]
            if any(each != settings[0] for each in settings):
                raise ValueError("parameters that are one group now had different settings then")
            group |= {key: decode(value, f"group.{key}") for key, value in settings[0].items()} if settings else {}
        full |= {key: decode(value, f"other.{key}", "") for key, value in rest["other"].items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"the optimizer's state cannot be understood ({type(error).__name__}: {error})") from error
    # Of several groups that are one now, one's settings are read; all else must be.
    left = [] if stored is None else sorted(stored.shapes.keys() - targets.keys())
    left = [name for name in left if not name.startswith("group.")]
    if left:
        raise ValueError(f"its tensor {left[0]!r} (one of {len(left)}) belongs to no state of the optimizer")
    if targets:
        stored.read_into(targets)
    optimizer.load_state_dict(full)


def _names_by_place(optimizer: Optimizer, model: nn.Module) -> dict[int, str]:
    """{place of a parameter in the optimizer's state_dict: its name}."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = zip(optimizer.param_groups, optimizer.state_dict()["param_groups"], strict=True)
    return {
        place: names[id(parameter)]
        for group, saved in groups
        for parameter, place in zip(group["params"], saved["params"], strict=True)
    }


def _follows(value: Any, parameter: Tensor) -> bool:
    """A part of the state that lies in the processes as its parameter does, or is the same in all of them."""
    if isinstance(value, (list, tuple)):
        return all(_follows(each, parameter) for each in value)
    return not isinstance(value, Tensor) or value.ndim == 0 or value.shape == parameter.shape


def _encode(value: Any, key: str, name: str, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON holds it; its tensors go to `tensors`."""
    if isinstance(value, Tensor):
        stored = f"{key}/{name}"
        tensors[stored] = value.detach()
        return {"tensor": stored}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, list | tuple):
        encoded = [_encode(each, f"{key}.{place}", name, tensors) for place, each in enumerate(value)]
        return {"tuple": encoded} if isinstance(value, tuple) else encoded
    if isinstance(value, dict) and all(isinstance(each, str) for each in value):
        return {"dict": {inner: _encode(each, f"{key}.{inner}", name, tensors) for inner, each in value.items()}}
    raise ValueError(f"the optimizer's {key} of {name} is a {type(value).__name__}, which a checkpoint cannot hold")
