"""From experts back to one MLP, and fewer experts. Shapes: E experts, G virtual experts that an MLP was split into."""

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from numbers import Integral
from typing import Any

import torch
from timm.layers import GluMlp, Mlp
from torch import Tensor, nn

from vmoe.models.calls import call, evaluation_mode
from vmoe.models.dense_mlp import UpcycledFrom, UpcycleError, from_experts, mlp_layout, stacked_parameters
from vmoe.models.naflex import pass_padding_on
from vmoe.models.siglino import SigLino
from vmoe.models.spec import build_dense, known_spec, on_meta, remember
from vmoe.models.upcycle import upcycle_steps
from vmoe.moe import SparseMoE, record_routing
from vmoe.moe.config import SETTING_NAMES, RoutingSettings
from vmoe.moe.experts import Experts, refuse_adapters
from vmoe.moe.record import unwrap
from vmoe.moe.router import Gate

Usage = Mapping[str, Tensor | Sequence[float]]  # or numpy's arrays


def measure_usage(model: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
    """How many tokens each expert works on in eval mode, for soft routing the sum of the weights of its slots: {name of
    a sparse layer: (E,) float64 on the CPU}. A batch is one of `vmoe.models.calls.call`."""
    usage: dict[str, Tensor] = {}
    with evaluation_mode(model):
        for batch in batches:
            with record_routing(model) as record:
                call(model, batch)
            for name, layer in record.calls:
                rows_E = layer.gates[layer.mask].sum(0) if layer.routing.soft else layer.load
                usage[name] = usage.get(name, 0) + rows_E.double().cpu()
    if not usage:
        raise ValueError("no usage to measure: there was no batch, or the model has no sparse layer")
    return usage


@torch.no_grad()
def densify(model: nn.Module, how: str | int = "average", usage: Usage | None = None) -> nn.Module:
    """A dense copy of a sparse model: one MLP instead of each layer's experts. Undoes `upcycle` exactly.

    A layer becomes what it was before `upcycle`, else the MLP of the model's settings without experts or, if weights
    do not fit that, timm's `Mlp` or `GluMlp`. Combine weights that do not sum to one (V-MoE's own) scale what a sparse
    layer adds; a dense MLP has no such scale, so the model needs some training.

    `how` is "average" of the experts, "weighted" by `usage` (see `measure_usage`), or the index of the one to keep. An
    UpcycleError or ValueError for layers with shared experts, usage that does not fit, or an unknown `how`.
    """
    model = unwrap(model)
    layers = _layers(model)
    if shared := [name for name, layer in layers.items() if layer.shared is not None]:
        raise UpcycleError(f"{shared[0]} has a shared expert, which one MLP of the others' width cannot hold")
    spec = _dense_spec(model, {_tower(model, name): layer for name, layer in layers.items()})
    dense, baseline = copy.deepcopy(model), _baseline(spec)
    for name, layer in layers.items():
        origin = getattr(layer, "upcycled_from", None) or _plain_origin(layer, baseline.get(name))
        G = origin.granularity
        weight_E = _expert_weights(how, usage, name, layer.num_experts, layer.num_experts // G)
        means = {key: _mean(each, weight_E, G) for key, each in stacked_parameters(layer.experts).items()}
        tensors = from_experts(origin.layout, means, float(G))
        for key, value in layer.experts.act.state_dict().items():
            tensors[f"{origin.layout.act}.{key}"] = value.clone()
        mlp = copy.deepcopy(origin.skeleton)
        if (bias := f"{origin.layout.fc2}.bias") not in mlp.state_dict():  # zeros, see `_fits`
            tensors.pop(bias, None)
        mlp.load_state_dict(tensors, assign=True)
        dense.set_submodule(name, mlp.train(layer.training))
    pass_padding_on(dense)
    for attribute in ("no_weight_decay", "group_matcher"):  # by which `upcycle` replaced the class's own
        vars(dense).pop(attribute, None)
    return remember(dense, spec)


def _baseline(spec: dict | None) -> dict[str, nn.Module]:
    """{name: module} of the model of dense settings, on the meta device; none if they give no model."""
    with suppress(TypeError, ValueError, RuntimeError):
        return dict(on_meta(build_dense, spec).named_modules()) if spec else {}
    return {}


def _dense_spec(model: nn.Module, towers: Mapping[str, SparseMoE]) -> dict | None:
    """What makes the dense model of the same class, given a sparse layer of each tower that has some."""
    spec = known_spec(model)
    for tower, layer in towers.items():
        own, width = {"num_experts": 0}, layer.settings.expert_width
        if tower != "text" and isinstance(getattr(model, "visual", model), SigLino):
            # Its blocks of `moe_layers` have such MLPs without experts too.
            own |= {"expert_width": width, "expert_mlp": layer.settings.expert_mlp}
        elif width is not None:
            own["mlp_ratio"] = width / layer.in_features
        spec = _with_settings(spec, tower, own, SETTING_NAMES)
    return spec and {"name": spec["name"], "kwargs": spec["kwargs"]}


def prune_experts(model: nn.Module, keep: int | float, usage: Usage) -> nn.Module:
    """A copy with only the most used experts of each layer; the gate's softmax is then over those alone.

    `keep` is their number in every layer, or below 1.0 their share; at least K. Layers made with `granularity` lose
    whole virtual groups. Of equally used experts in `usage` (see `measure_usage`) the lower index stays. A ValueError
    for usage that does not fit, or a `keep` out of range.
    """
    model = unwrap(model)
    pruned, spec = copy.deepcopy(model), known_spec(model)
    for name, layer in _layers(model).items():
        G = layer.upcycled_from.granularity if hasattr(layer, "upcycled_from") else 1
        number = _number_to_keep(layer, keep, G, name)
        used_G = _usage(usage, name, [layer.num_experts]).view(-1, G).sum(1)
        groups = used_G.argsort(descending=True, stable=True)[: number // G].sort().values
        settings = _pruned_settings(layer.settings, number)
        pruned.set_submodule(name, _pruned_layer(layer, (groups[:, None] * G + torch.arange(G)).flatten(), settings))
        spec = _with_settings(spec, _tower(model, name), settings)
    return remember(pruned, spec)


def _layers(model: nn.Module) -> dict[str, SparseMoE]:
    refuse_adapters(model)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SparseMoE)}
    if not layers:
        raise UpcycleError(f"{type(model).__name__} has no sparse layer")
    if (members := getattr(model, "ensemble_size", 1)) > 1:
        raise UpcycleError(f"the model is an ensemble of {members} members, whose sets of experts stay as they are")
    return layers


def _usage(usage: Usage | None, name: str, numbers: Iterable[int]) -> Tensor:
    """(E,) float64 on the CPU, where E is one of `numbers`."""
    if name not in (usage or ()):
        raise UpcycleError(f"usage of {name} is missing; vmoe.measure_usage gives that of all layers")
    used_E = torch.as_tensor(usage[name]).double().cpu()
    if used_E.ndim != 1 or len(used_E) not in numbers:
        shapes = " or ".join(f"({number},)" for number in dict.fromkeys(numbers))
        raise UpcycleError(f"usage of {name} must have shape {shapes}, got {tuple(used_E.shape)}")
    if not (used_E.isfinite() & (used_E >= 0)).all():
        raise UpcycleError(f"usage of {name} must be finite and >= 0, got {used_E.tolist()}")
    return used_E


def _expert_weights(how: str | int, usage: Usage | None, name: str, num_experts: int, num_copies: int) -> Tensor:
    """(copies,) float64, summing to one: the share of each expert, or virtual group, in the dense MLP."""
    if how == "average":
        return torch.full((num_copies,), 1 / num_copies, dtype=torch.float64)
    if how == "weighted":
        used = _usage(usage, name, [num_experts, num_copies]).view(num_copies, -1).sum(1)
        if not used.sum() > 0:
            raise UpcycleError(f"usage of {name} must be positive for some of its experts, got {used.tolist()}")
        return used / used.sum()
    if not isinstance(how, Integral) or not 0 <= how < num_copies:
        raise ValueError(f"how must be 'average', 'weighted' or an expert of {name}, 0..{num_copies - 1}, got {how!r}")
    return torch.eye(num_copies, dtype=torch.float64)[int(how)]


def _mean(stacked: Tensor, weight_E: Tensor, granularity: int) -> Tensor:
    """Weighted mean over the copies, (E, ...) -> (G, ...); in float64, so that equal copies have themselves as mean."""
    copies = stacked.double().unflatten(0, (-1, granularity))
    return torch.tensordot(weight_E.to(copies.device), copies, dims=1).to(stacked.dtype)


def _plain_origin(layer: SparseMoE, baseline: nn.Module | None) -> UpcycledFrom:
    """What the experts of a model that was never dense would be as one MLP: that of the dense model if it fits."""
    experts, norm = layer.experts, layer.experts.norm
    mlp = (GluMlp if experts.gated else Mlp)(
        layer.in_features,
        experts.fc1.weight.shape[1],
        layer.out_features,
        act_layer=lambda: copy.deepcopy(experts.act),
        norm_layer=norm and (lambda width, **kw: nn.LayerNorm(width, norm.eps, bias=norm.bias is not None, **kw)),
        bias=(experts.fc1.bias is not None, experts.fc2.bias is not None),
        drop=(experts.drop.p, 0.0),
        device="meta",
        **({"gate_last": False} if experts.gated else {}),
    )
    if baseline is not None and _fits(baseline, mlp, experts):
        mlp = baseline
    for name, parameter in mlp.named_parameters():
        parameter.requires_grad_(experts.get_parameter(name).requires_grad)
    return UpcycledFrom(mlp_layout(mlp), mlp, 1)


def _fits(baseline: nn.Module, mlp: nn.Module, experts: Experts) -> bool:
    """The MLP of the dense model is as `mlp`, but for its dropout, and for a bias of zeros that only experts have."""
    if type(baseline) is not type(mlp) or type(baseline.act) is not type(mlp.act):
        return False
    theirs, own = ({name: each.shape for name, each in part.named_parameters()} for part in (baseline, mlp))
    if "fc2.bias" in own.keys() - theirs.keys() and not experts.fc2.bias.any():
        del own["fc2.bias"]
    return theirs == own


def _number_to_keep(layer: SparseMoE, keep: int | float, G: int, name: str) -> int:
    E = layer.num_experts
    number = round(keep * E / G) * G if 0 < keep < 1 else keep
    least = layer.num_selected_experts if layer.per_token else 1
    one_or_all = keep == 1 and isinstance(keep, float)
    if one_or_all or number % G or not least <= number <= E:
        raise ValueError(f"keep={keep} does not suit {name}: it needs {least}..{E} in steps of {G}, or a share below 1")
    return int(number)


def _pruned_settings(old: RoutingSettings, number: int) -> dict[str, Any]:
    """The settings that change with the number of experts, and the slots, which would follow from it."""
    new = {"num_experts": number, "num_selected_experts": min(old.num_selected_experts, number)}
    if isinstance(least := old.global_entropy_min_experts, Mapping):
        new["global_entropy_min_experts"] = {name: min(value, number) for name, value in least.items()}
    elif least is not None:
        new["global_entropy_min_experts"] = min(least, number)
    return new if old.num_slots is None else {**new, "num_slots": old.num_slots}


def _pruned_layer(layer: SparseMoE, kept: Tensor, new: dict[str, Any]) -> SparseMoE:
    """The layer with some of its experts, in the order of `kept`, and new settings."""
    E, number = layer.num_experts, len(kept)
    sizes = {"in_features": layer.in_features, "out_features": layer.out_features, "modalities": layer.modalities}
    pruned = type(layer)(**sizes, device="meta", **{**asdict(layer.settings), **new})
    pruned.experts, pruned.router, pruned.shared = copy.deepcopy((layer.experts, layer.router, layer.shared))
    if hasattr(layer, "upcycled_from"):
        pruned.upcycled_from = layer.upcycled_from
    for part in (pruned.experts, pruned.router):
        if hasattr(part, "num_experts"):
            part.num_experts = number
        for module in part.modules():
            for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if tensor.ndim and tensor.shape[0] == E and key not in Gate.SHARED:
                    rows = tensor.detach()[kept.to(tensor.device)]
                    is_parameter = isinstance(tensor, nn.Parameter)
                    setattr(module, key, nn.Parameter(rows, tensor.requires_grad) if is_parameter else rows)
    return pruned.train(layer.training)


def _tower(model: nn.Module, layer: str) -> str:
    """The tower that holds a layer, as a two-tower model's settings call it; "" for a model that is one tower."""
    if getattr(model, "visual", model) is model:
        return ""
    return "image" if layer.startswith("visual.") else "text"


def _with_settings(spec: dict | None, tower: str, settings: dict, without: Collection[str] = ()) -> dict | None:
    """A specification with other settings of a tower; saving a model finds out if they do not describe it."""
    if spec is None:
        return None
    steps = upcycle_steps(spec)
    if any(not tower or step["tower"] in (tower, "both") for step in steps):
        changed = [step | settings if not tower or step["tower"] in (tower, "both") else step for step in steps]
        return {**spec, "upcycle": changed if len(changed) > 1 else changed[0]}
    own = (spec["kwargs"].get(tower) or {}) if tower else spec["kwargs"]
    own = {key: value for key, value in own.items() if key not in without} | settings
    return {**spec, "kwargs": {**spec["kwargs"], tower: own} if tower else own}
