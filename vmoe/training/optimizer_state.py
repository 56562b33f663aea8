"""The state of an optimizer by parameter name: tensors for a safetensors file, all else for a JSON file.

    tensors: {"exp_avg/blocks.0.attn.qkv.weight": Tensor, ...}
    rest:    {"state": {"blocks.0.attn.qkv.weight": {"exp_avg": {"tensor": ""}, ...}, ...},
              "groups": [{"parameters": [names], "settings": {"lr": 0.001, ...}}, ...],
              "other": {...}}    what an optimizer adds to its state_dict (random state of Kron)

torch.distributed.checkpoint.state_dict holds no None, tuple or list (SGD, Kron), and leaves out "other".
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from vmoe.models.serialization import StoredTensors

TENSOR = {"tensor": ""}  # stands for one in the JSON: where it stands says its name
GROUPS = "its groups"


def export_state(optimizer: Optimizer, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, rest) of an optimizer; a ValueError names state that cannot be written, or not for another mesh."""
    names, full = _parameter_names(optimizer, model), optimizer.state_dict()
    tensors: dict[str, Tensor] = {}

    def encode(value: Any, name: str, key: str) -> Any:
        if isinstance(value, Tensor) and name == GROUPS and value.ndim == 0:  # it has no parameter's name
            return {"number": [value.item(), str(value.dtype).removeprefix("torch.")]}
        if isinstance(value, Tensor) and name != GROUPS:
            parameter = model.get_parameter(name) if name else value
            if isinstance(parameter, DTensor) and value.ndim > 0 and value.shape != parameter.shape:
                raise ValueError(
                    f"{type(optimizer).__name__}'s state {key!r} of {name} does not have its shape, so it cannot be "
                    "sharded; take an optimizer such as adamw, sgd or lion, or parallel.dp_shard = parallel.ep = 1"
                )
            tensors[f"{key}/{name}"] = value.detach()
            return TENSOR
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, list | tuple):
            encoded = [encode(each, name, f"{key}.{index}") for index, each in enumerate(value)]
            return {"tuple": encoded} if isinstance(value, tuple) else encoded
        raise ValueError(f"the optimizer's {key} of {name} is a {type(value).__name__}, which a checkpoint cannot hold")

    def encode_all(values: dict[str, Any], name: str) -> dict[str, Any]:
        return {key: encode(value, name, key) for key, value in values.items()}

    rest = {
        "state": {names[index]: encode_all(values, names[index]) for index, values in full.pop("state").items()},
        "groups": [
            {"parameters": [names[index] for index in group.pop("params")], "settings": encode_all(group, GROUPS)}
            for group in full.pop("param_groups")
        ],
        "other": encode_all(full, ""),
    }
    return tensors, rest


def import_state(optimizer: Optimizer, model: nn.Module, stored: StoredTensors | None, rest: dict[str, Any]) -> None:
    """Loads what `export_state` gave (`stored` is None without tensors); a ValueError says what does not fit.

    The groups may be divided in another way, and the parameters may be DTensors on any mesh.
    """
    names, full = _parameter_names(optimizer, model), optimizer.state_dict()
    shapes = stored.shapes if stored is not None else {}
    targets: dict[str, Tensor] = {}

    def target(key: str, name: str) -> Tensor:
        """A tensor to read a stored one into, later."""
        parameter, full_name = model.get_parameter(name) if name else None, f"{key}/{name}"
        if full_name not in shapes:
            raise ValueError(f"its tensor {full_name!r} is not stored")
        shape, dtype = shapes[full_name], stored.dtypes[full_name]
        if isinstance(parameter, DTensor) and shape == parameter.shape:
            targets[full_name] = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        elif isinstance(parameter, DTensor) and len(shape) > 0:
            raise ValueError(f"{full_name} is {tuple(shape)}, and cannot be sharded as {tuple(parameter.shape)}")
        else:
            targets[full_name] = torch.empty(shape, dtype=dtype)
        return targets[full_name]

    def decode(values: dict[str, Any], name: str) -> dict[str, Any]:
        return {key: _decode(value, name, target, key) for key, value in values.items()}

    try:
        before = {name: group["settings"] for group in rest["groups"] for name in group["parameters"]}
        if differing := sorted(before.keys() ^ set(names)):
            raise ValueError(
                f"the optimizer {'lacks' if differing[0] in before else 'has'} {differing[0]!r} (one of "
                f"{len(differing)}), and that of the checkpoint does not; train the same parameters (train.freeze)"
            )
        indices = {name: index for index, name in enumerate(names)}
        full["state"] = {indices[name]: decode(values, name) for name, values in rest["state"].items()}
        for group in full["param_groups"]:
            settings = [before[names[index]] for index in group["params"]]
            if any(each != settings[0] for each in settings):
                raise ValueError("parameters of one group have different settings in the checkpoint; use its groups")
            group |= decode(settings[0], GROUPS) if settings else {}
        full |= decode(rest["other"], "")
        unread = sorted(shapes.keys() - targets.keys())
        if unread:
            raise ValueError(f"its tensor {unread[0]!r} (one of {len(unread)}) belongs to no state of the optimizer")
        if targets:
            stored.read_into(targets)
        optimizer.load_state_dict(full)
    except (AttributeError, IndexError, KeyError, RecursionError, RuntimeError, TypeError) as error:
        raise ValueError(f"its optimizer state cannot be understood ({type(error).__name__}: {error})") from error


def _decode(value: Any, name: str, target: Callable[[str, str], Tensor], key: str) -> Any:
    """The value that `export_state` encoded; `target` gives the tensor of a key and a parameter's name."""
    if isinstance(value, list):
        return [_decode(each, name, target, f"{key}.{index}") for index, each in enumerate(value)]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tuple":
        return tuple(_decode(content, name, target, key))
    if kind == "number":
        return torch.tensor(content[0], dtype=_dtype(content[1]))
    if kind == "dtype":
        return _dtype(content)
    if value != TENSOR:
        raise ValueError(f"its {kind} {key!r} of {name} is not known")
    return target(key, name)


def _dtype(name: str) -> torch.dtype:
    if not isinstance(getattr(torch, name, None), torch.dtype):
        raise ValueError(f"{name!r} is not a dtype of PyTorch")
    return getattr(torch, name)


def _parameter_names(optimizer: Optimizer, model: nn.Module) -> list[str]:
    """The parameters' names in the order of the optimizer's state_dict."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
