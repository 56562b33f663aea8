"""Sparse upcycling: a dense transformer whose MLPs become experts that start as copies of them (arXiv 2212.05055).

Shapes, by suffix: E experts, D model width, F hidden width, G virtual experts that a dense MLP is split into.
"""

import copy
import math
import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from timm.optim import auto_group_layers
from torch import Tensor, nn

from vmoe.models.dense_mlp import MlpLayout, UpcycledFrom, UpcycleError, mlp_layout, stacked_parameters, to_experts
from vmoe.models.expert_init import Clusters, add_noise, redraw_units
from vmoe.models.limoe import LIMoE
from vmoe.models.naflex import NaFlexVisionMoE, pass_padding_on
from vmoe.models.spec import build_dense, difference, known_spec, named_tensors, remember, with_slots
from vmoe.models.two_tower import TwoTower
from vmoe.models.vision import VisionMoE, choose_attention, sparse_blocks, without_decay
from vmoe.moe import SparseMoE
from vmoe.moe.config import SETTING_NAMES, with_preset
from vmoe.moe.experts import refuse_adapters
from vmoe.moe.layer import ROUTERS, routers_where
from vmoe.moe.record import unwrap
from vmoe.utils.meta import meta_device

TOWERS = ("image", "text", "both")
ROUTER_STD = 0.02  # section A.1.1 of the paper; small, so that at first all experts are nearly as probable
CLUSTER_ENERGY = 0.999  # a ViT-S/14 on photos keeps its function within 5 %, with 0.99 within 16 % (docs/upcycling.md)
CAPACITY_FACTOR = 2.0  # a fresh router is far from balanced, and with less the dense model would lose much at first


def upcycle(
    models: nn.Module | Sequence[nn.Module],
    num_experts: int | None = None,
    layers: str | Sequence[int] | None = None,
    num_selected_experts: int | None = None,
    *,
    tower: str = "both",
    granularity: int = 1,
    expert_noise: float = 0.0,
    reinit: float = 0.0,
    calibration: Any = None,
    cluster_energy: float = CLUSTER_ENERGY,
    **settings,
) -> nn.Module:
    """A sparse copy of a dense model: experts copied from the MLPs, router fresh, all else as it was.

    With router="top_k" and the defaults, its outputs in eval mode are those of the dense model up to rounding.

    Args:
        models: any timm or open_clip model of blocks with an `.mlp`, or a dense model of this package; not changed. Or
            several that share all but the MLPs of `layers`, each of which gives as many experts, in this order
            (Diversified Multiplet Upcycling, arXiv 2409.19291).
        num_experts, num_selected_experts: E and K, by default the preset's, or 8 (with several models their number) and
            2 (both times `granularity`).
        layers: see `sparse_blocks`; the same in both towers of a model, or in one `tower`, "image" or "text". None:
            "last2", with several models "every1".
        granularity: G, each MLP is split into G experts of F/G hidden units; at first all G of a copy are chosen
            together (virtual groups, arXiv 2410.07524), so `noise_std` is 0 by default. It must divide E and K.
        expert_noise: standard deviation of normal noise on the experts' weights, in standard deviations of each weight.
        reinit: share of the hidden units that each expert draws again, from normal distributions with the mean and
            standard deviation of the weights that they replace (Drop-Upcycling, arXiv 2502.19261: 0.5).
        calibration: a batch or batches of typical inputs (of `vmoe.models.calls.call`: images, tuples of images and
            texts, NaFlex dicts), whose clusters give the router and the experts their start: see
            `vmoe.models.expert_init.Clusters`. Then `upcycle_differences` of the result says how far it is from the
            dense model: {layer or "output": number}.
        cluster_energy: share of its outputs' squared length that a matrix keeps on its cluster's tokens; 1 leaves the
            experts copies, with the centroids as router.
        **settings: of `vmoe.moe.config.RoutingSettings`, and `router_preset`. The defaults here are
            normalize_weights=True and capacity_factor=2.0 (no limit in open_clip's text towers, where padding would
            take the tokens' capacity); a dense LIMoE or V-MoE has its class's own for the rest.

    An UpcycleError for a model without known MLPs or with experts, or for models that differ elsewhere; a ValueError
    for a setting out of range.
    """
    is_one = isinstance(models, nn.Module) and not isinstance(models, nn.ModuleList)
    models = [models] if is_one or not isinstance(models, Iterable) else list(models)
    _check(models, calibration, tower, settings)
    models = [unwrap(model) for model in models]
    _check_numbers(granularity, expert_noise, reinit, cluster_energy)
    model, several = models[0], len(models) > 1
    layers = ("every1" if several else "last2") if layers is None else layers
    with suppress(TypeError):  # `sparse_blocks` says what is wrong with them
        layers = layers if isinstance(layers, str) else [operator.index(block) for block in layers]
    mlps = _chosen_mlps(model, tower, layers)
    _check_shared(models, mlps)
    if several and num_experts is None:
        num_experts = len(models) * granularity
    given = {"num_experts": num_experts, "num_selected_experts": num_selected_experts}
    user = {name: value for name, value in given.items() if value is not None} | settings
    settings = _routing_settings(user, granularity, len(models))
    spec = known_spec(model)
    family_spec, layer_settings = _family(model, spec, {**settings, "moe_layers": layers}, tower)
    sparse = copy.deepcopy(model)
    clusters = None if calibration is None else Clusters(model, mlps, calibration, cluster_energy)
    for name, is_text in mlps.items():
        own = layer_settings.get(name) or _outside_settings(sparse.get_submodule(name), is_text, settings, user)
        layer = _sparse_layer(own, granularity, models, name)
        if clusters is not None:
            clusters.specialise(layer, name, granularity)
        redraw_units(layer.experts, reinit)
        add_noise(layer.experts, expert_noise)
        sparse.set_submodule(name, layer)
    pass_padding_on(sparse)
    choose_attention(sparse, settings)
    if clusters is not None:
        sparse.upcycle_differences = clusters.differences(sparse)
    _keep_parameter_groups(model, sparse)
    settings |= {"layers": layers, "tower": tower, "granularity": granularity}
    return remember(sparse, _new_spec(sparse, mlps, spec, family_spec, settings))


def _check_numbers(granularity: int, expert_noise: float, reinit: float, cluster_energy: float) -> None:
    if type(granularity) is not int or granularity < 1:
        raise ValueError(f"granularity must be a whole number >= 1, got {granularity!r}")
    if not (isinstance(expert_noise, (int, float)) and 0 <= expert_noise < math.inf):
        raise ValueError(f"expert_noise must be a number >= 0 and finite, got {expert_noise!r}")
    if not (isinstance(reinit, (int, float)) and 0 <= reinit <= 1):
        raise ValueError(f"reinit must be 0..1, got {reinit!r}")
    if not (isinstance(cluster_energy, (int, float)) and 0 < cluster_energy <= 1):
        raise ValueError(f"cluster_energy must be above 0 and at most 1, got {cluster_energy!r}")


def _check(models: Sequence[nn.Module], calibration: Any, tower: str, settings: dict) -> None:
    if not models or not all(isinstance(model, nn.Module) for model in models):
        types = sorted({type(model).__name__ for model in models})
        raise ValueError(f"models must be a model, or a list of some, got {types}")
    for model in models:
        refuse_adapters(model)
    if calibration is not None and len(models) > 1:
        raise ValueError(f"calibration clusters what one model sees, and there are {len(models)}; leave it out")
    if tower not in TOWERS:
        raise ValueError(f"tower must be one of {TOWERS}, got {tower!r}")
    if settings.get("expert_width") is not None:
        raise ValueError("expert_width cannot be set: the experts are copies of the MLPs; granularity makes finer ones")
    for name in settings.keys() - SETTING_NAMES:
        raise ValueError(f"upcycle has no setting {name!r}; the routing settings are {sorted(SETTING_NAMES)}")


def _check_shared(models: Sequence[nn.Module], mlps: Iterable[str]) -> None:
    """UpcycleError: several models differ in more than what each expert has of its own."""
    layouts = {name: _layout(models[0], name) for name in mlps}
    own = [f"{name}.{part}." for name, each in layouts.items() for part in (*each.fc1, each.norm, each.fc2) if part]
    first, sparse = named_tensors(models[0]), _sparse_names(models[0])
    for number, other in enumerate(models[1:], start=1):
        if other is models[0]:  # also on the meta device, where tensors have no values to compare
            continue
        if _sparse_names(other) - sparse:
            raise UpcycleError(f"models[{number}] is sparse; make it dense first with vmoe.densify")
        if (problem := difference(models[0], other)) is not None:
            remedy = "; build both with the same rates (model.kwargs.drop_path_rate, ...)" if "drop" in problem else ""
            raise UpcycleError(f"models[{number}] is not built like models[0]: {problem}{remedy}")
        for name, tensor in named_tensors(other).items():
            mine = first[name]
            if tensor.dtype != mine.dtype:
                raise UpcycleError(f"models[{number}] has {tensor.dtype}, not {mine.dtype} as models[0]: convert it")
            if not (torch.equal(tensor.to(mine.device), mine) or name.startswith(tuple(own))):
                raise UpcycleError(
                    f"models[{number}] differs from models[0] in {name}, but may differ in the MLPs of the chosen "
                    "layers alone: train only these (train.freeze), or choose more layers"
                )


def _sparse_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, SparseMoE)}


def _routing_settings(user: dict, G: int, num_models: int) -> dict:
    """The settings of `upcycle`: its defaults, then the preset's, then the user's."""
    defaults = {"router": "top_k", "num_experts": 8 * G, "num_selected_experts": 2 * G}
    defaults |= {"normalize_weights": True, "capacity_factor": CAPACITY_FACTOR, **({"noise_std": 0.0} if G > 1 else {})}
    settings = with_preset(defaults, user)
    settings.pop("router_preset", None)
    if "expert_mlp" not in user:
        settings.pop("expert_mlp", None)  # the dense model decides, not a preset
    per_token = ROUTERS[settings["router"]].per_token
    if G > 1 and not per_token:
        raise ValueError(f"granularity={G} needs {routers_where('per_token', True)}, not {settings['router']!r}")
    for name, number in (("num_experts", num_models), ("num_selected_experts", 1)):
        if number * G > 1 and (not isinstance(settings[name], int) or settings[name] % (number * G)):
            parts = [f"granularity ({G})"] * (G > 1) + [f"the number of models ({number})"] * (number > 1)
            raise ValueError(f"{name} must be a multiple of {' times '.join(parts)}, got {settings[name]!r}")
    if per_token and settings["num_selected_experts"] == 1 and settings.get("normalize_weights"):
        warnings.warn(
            "upcycle: with num_selected_experts=1 and normalised weights only the auxiliary losses train the router; "
            "choose 2 experts, or normalize_weights=False",
            stacklevel=3,
        )
    return settings


def _outside_settings(mlp: nn.Module, is_text: bool, settings: dict, user: dict) -> dict:
    """The settings of a layer in a model that is not of this package."""
    settings = {**settings, "modalities": ("text" if is_text else "image",)}
    passes_padding_on = is_text and isinstance(mlp, nn.Sequential)  # open_clip's
    if passes_padding_on and "capacity_factor" not in user and ROUTERS[settings["router"]].per_token:
        settings["capacity_factor"] = None
    return settings


def _chosen_mlps(model: nn.Module, tower: str, layers: str | Sequence[int]) -> dict[str, bool]:
    """{name of an MLP: it is in a text tower} of the chosen blocks, in the model's order."""
    chosen, owner = {}, type(model).__name__
    for root, is_text in _towers(model, tower):
        names = block_mlps(model.get_submodule(root), root)
        if not names:
            raise UpcycleError(f"{f'{owner}.{root}'.rstrip('.')} has no blocks with an `.mlp` to make experts of")
        if any(isinstance(model.get_submodule(name), SparseMoE) for name in names):
            raise UpcycleError(f"{owner} is sparse already; make it dense first with vmoe.densify")
        try:
            chosen |= {names[index]: is_text for index in sparse_blocks(layers, len(names))}
        except ValueError as error:
            raise ValueError(str(error).replace("moe_layers", "layers")) from None
    if not chosen:
        raise ValueError(f"layers chooses no block, got {layers!r}")
    return chosen


def _towers(model: nn.Module, tower: str) -> list[tuple[str, bool]]:
    """[(name of a tower's module, it is text)]; ("", False) for a model that is one tower."""
    if isinstance(model, LIMoE) or not (hasattr(model, "encode_text") and hasattr(model, "visual")):
        if tower == "text":
            raise ValueError(f"tower='text' needs a model with two towers, and {type(model).__name__} has one")
        return [("", False)]
    # open_clip's CLIP has the parts of its text tower beside each other
    text = "text" if isinstance(getattr(model, "text", None), nn.Module) else "transformer"
    return [("visual", False)] * (tower != "text") + [(text, True)] * (tower != "image")


def block_mlps(tower: nn.Module, prefix: str = "") -> list[str]:
    """Names of the MLPs of a tower's blocks, the members of its module lists that have an `.mlp`."""
    blocks = getattr(tower, "blocks", None)
    if isinstance(blocks, nn.Module):  # not the class-attention blocks of CaiT and XCiT, which see one token
        tower, prefix = blocks, f"{prefix}.blocks".lstrip(".")
    return [
        ".".join(part for part in (name, child_name, "mlp") if part)
        for name, module in tower.named_modules(prefix=prefix)
        if isinstance(module, (nn.ModuleList, nn.Sequential))
        for child_name, child in module.named_children()
        if isinstance(getattr(child, "mlp", None), nn.Module)
    ]


class OpenClipMoE(SparseMoE):
    """A sparse layer where open_clip expects its own MLP, in whose `c_fc` it looks for the type of the weights."""

    @property
    def c_fc(self) -> SimpleNamespace:
        """Has a `weight` of the model's type; that of the experts may be kept in another, or not at all."""
        return SimpleNamespace(weight=next(self.router.parameters()))


def _layout(model: nn.Module, name: str) -> MlpLayout:
    try:
        return mlp_layout(model.get_submodule(name))
    except UpcycleError as error:
        raise UpcycleError(f"{type(model).__name__}.{name}: {error}") from None


def _sparse_layer(settings: dict, G: int, models: Sequence[nn.Module], name: str) -> SparseMoE:
    """The sparse layer that replaces the MLPs of a name, each split into G experts."""
    model = models[0]
    mlp, layout = model.get_submodule(name), _layout(model, name)
    act, fc2 = mlp.get_submodule(layout.act), mlp.get_submodule(layout.fc2)
    norm = mlp.get_submodule(layout.norm) if layout.norm else None
    if fc2.in_features % G:
        raise UpcycleError(f"granularity={G} must divide the hidden width {fc2.in_features} of the MLP")
    if G > 1 and norm is not None:
        raise UpcycleError(f"granularity={G} cannot split an MLP that normalises its hidden units; use 1")
    owners = [model.get_submodule(name.rsplit(".", n)[0]) for n in range(1, name.count(".") + 1)]
    by_sequence = not ROUTERS[settings["router"]].per_token or settings.get("per_image")
    if by_sequence and not all(getattr(owner, "batch_first", True) for owner in owners):
        own = "per_image=True" if settings.get("per_image") else f"router={settings['router']!r}"
        raise ValueError(f"{own} needs sequences first: this tower has batch_first=False")
    own_mlp = "mlp" if not layout.gated else "geglu" if isinstance(act, nn.GELU) else "swiglu"
    settings = {"expert_mlp": own_mlp, **settings}
    if settings["expert_mlp"] != own_mlp:
        raise ValueError(f"expert_mlp must be left out, since the model's MLPs are {own_mlp!r}")
    layer = (OpenClipMoE if layout.fc2 == "c_proj" else SparseMoE)(
        mlp.get_submodule(layout.fc1[0]).in_features,
        fc2.in_features // G,
        fc2.out_features,
        act_layer=lambda: copy.deepcopy(act),
        norm_layer=None if norm is None else lambda width, **kw: nn.LayerNorm(width, norm.eps, **kw),
        drop=mlp.get_submodule(layout.drop).p if layout.drop else 0.0,
        num_tokens=_num_tokens(model, name),
        device=fc2.weight.device,
        dtype=fc2.weight.dtype,
        **settings,
    )
    layer.experts.act = copy.deepcopy(act)  # of gated MLPs too
    _load_experts(layer, [each.get_submodule(name) for each in models], layout, G)
    with torch.no_grad():
        if hasattr(layer.router, "weight"):
            nn.init.normal_(layer.router.weight, std=ROUTER_STD)
            # One row for all experts of a virtual group: the top K then takes whole groups.
            layer.router.weight.copy_(layer.router.weight[::G].repeat_interleave(G, dim=0))
        if layer.shared is not None:
            for parameter in layer.shared.fc2.parameters():
                parameter.zero_()
    layer.upcycled_from = UpcycledFrom(layout, copy.deepcopy(mlp).to("meta"), G)
    return layer.train(mlp.training)


@torch.no_grad()
def _load_experts(layer: SparseMoE, mlps: Sequence[nn.Module], layout: MlpLayout, G: int) -> None:
    """Copies the weights of each MLP into as many experts; biases that it lacks are removed."""
    number, dense = layer.num_experts // len(mlps), dict(mlps[0].named_parameters())
    parts = [to_experts(layout, dict(mlp.named_parameters()), number, G, float(G)) for mlp in mlps]
    experts = {name: torch.cat([part[name].to(each.device) for part in parts]) for name, each in parts[0].items()}
    for name, parameter in stacked_parameters(layer.experts).items():
        if name in experts:
            parameter.copy_(experts[name])
            parameter.requires_grad_(any(dense[source].requires_grad for source in layout.sources(name)))
        else:
            owner, _, kind = name.rpartition(".")
            setattr(layer.experts.get_submodule(owner), kind, None)


def _num_tokens(model: nn.Module, name: str) -> int | None:
    """Tokens per sequence of the tower that holds a layer; None if no attribute says it."""
    if name.startswith(("text.", "transformer.")):
        return getattr(model, "context_length", None)
    tower = getattr(model, "visual", model)
    tower = getattr(tower, "trunk", tower)
    patches = getattr(getattr(tower, "patch_embed", None), "num_patches", None)
    if patches is not None and hasattr(tower, "num_prefix_tokens"):
        return patches + tower.num_prefix_tokens
    positions = getattr(tower, "positional_embedding", None)
    return positions.shape[0] if isinstance(positions, Tensor) else None


def _keep_parameter_groups(dense: nn.Module, sparse: nn.Module) -> None:
    """Lets timm's optimizers treat experts as the MLPs that they were copied from: stacked biases have two axes, and
    for layer decay timm counts parameters if there is no `group_matcher`."""
    own = set(getattr(sparse, "no_weight_decay", set)())  # a few models give a list
    if not without_decay(sparse) <= own:
        sparse.no_weight_decay = partial(set, frozenset(own | without_decay(sparse)))
    if hasattr(dense, "group_matcher"):
        return
    layer_of = auto_group_layers(dense)
    for name, layer in sparse.named_modules():
        if isinstance(layer, SparseMoE):
            layout = layer.upcycled_from.layout
            last = layer_of[f"{name}.{layout.fc2}.weight"]
            for key, _ in layer.named_parameters():
                sources = layout.sources(".".join(key.split(".")[-2:])) or [""]
                layer_of[f"{name}.{key}"] = layer_of.get(f"{name}.{sources[-1]}", last)
    sparse.group_matcher = partial(_group_matcher, layer_of)


def _group_matcher(layer_of: dict[str, int], coarse: bool = False) -> Callable[[str], int]:
    """A function of a parameter's name; names that are not in the table belong to the last layer."""
    return lambda name: layer_of.get(name, max(layer_of.values()))


def _new_spec(
    sparse: nn.Module, mlps: dict[str, bool], dense_spec: dict | None, family_spec: dict | None, settings: dict
) -> dict | None:
    """How to build the model again: by its family's own settings, or by upcycling the dense model as `settings` say."""
    if dense_spec is None:
        return None
    if family_spec is not None and settings["granularity"] == 1 and "upcycle" not in dense_spec:
        return {**family_spec, "kwargs": with_slots(sparse, family_spec["kwargs"])}
    steps = [*upcycle_steps(dense_spec), *_steps(sparse, mlps, settings)]
    return {**dense_spec, "upcycle": steps[0] if len(steps) == 1 else steps}


def _steps(sparse: nn.Module, mlps: dict[str, bool], settings: dict) -> list[dict]:
    """The arguments of `upcycle` that make the same layers: one step, or one for each tower if they differ."""
    steps = {}
    for is_text in sorted(set(mlps.values())):
        layers = nn.ModuleList(sparse.get_submodule(name) for name, text in mlps.items() if text == is_text)
        step = {**settings, "capacity_factor": layers[0].capacity_factor}
        steps["text" if is_text else "image"] = with_slots(layers, step)
    if len(steps) == 2 and steps["image"] != steps["text"]:
        return [{**step, "tower": tower} for tower, step in steps.items()]
    return list(steps.values())[:1]


def upcycle_steps(spec: dict) -> list[dict]:
    """The calls of `upcycle` that a specification holds, one after the other."""
    steps = spec.get("upcycle") or []
    return [steps] if isinstance(steps, dict) else steps


def _family(model: nn.Module, spec: dict | None, settings: dict, tower: str) -> tuple[dict | None, dict[str, dict]]:
    """For a dense model of this package: (the sparse model's spec, {name: a sparse layer's settings})."""
    is_asked = "expert_mlp" in settings
    # timm.create_model leaves out None; infinity says the same.
    settings = {k: math.inf if v is None and k.endswith("capacity_factor") else v for k, v in settings.items()}
    towers = [each for each in ("image", "text") if tower in (each, "both")]
    is_two_tower = isinstance(model, TwoTower) and ("image" not in towers or isinstance(model.visual, VisionMoE))
    if spec is None or not (is_two_tower or isinstance(model, (VisionMoE, NaFlexVisionMoE, LIMoE))):
        return None, {}
    if is_two_tower:
        settings = {each: {**(spec["kwargs"].get(each) or {}), **settings} for each in towers}
    spec = {"name": spec["name"], "kwargs": {**spec["kwargs"], **settings}}
    with meta_device():
        model = build_dense(spec)
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, SparseMoE)]
    own = {name: {**asdict(layer.settings), "modalities": layer.modalities} for name, layer in layers}
    if not is_asked:  # the MLPs decide: those of `densify` may be gated
        own = {name: {k: v for k, v in each.items() if (k, v) != ("expert_mlp", "mlp")} for name, each in own.items()}
    return spec, own
