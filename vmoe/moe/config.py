"""Every setting of a sparse layer, and the routers that papers use by name."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import get_args

CHOICES = {
    "router": ("top_k", "expert_choice", "soft"),
    "capacity_rounding": ("ceil", "round", "tutel"),
    "gate": ("softmax", "sigmoid", "cosine"),
    "expert_mlp": ("mlp", "swiglu", "geglu", "relu2glu"),
    "auxiliary_loss": ("record", "attach"),
    "auxiliary_loss_scope": ("group", "batch"),
    "backend": ("auto", "reference", "triton"),
}
PerModality = float | Mapping[str, float]


@dataclass(frozen=True)
class RoutingSettings:
    """The settings of a sparse layer, of the same names in model arguments, configs and docs.

    Attributes:
        num_experts: E.
        num_selected_experts: K, experts per token; only for router="top_k".
        ensemble_size: M, members of an efficient ensemble (E3, arXiv 2110.03360). The batch holds M copies of each
            image, next to each other; each member has E / M of the experts and its own gate, and takes one copy.
        per_image: only for router="top_k": the gate sees the mean of an image's tokens, and all of them go to the same
            experts with the same weights (Mobile V-MoEs, arXiv 2309.04354). A capacity counts images, and drops whole
            ones. An image is whatever the first axis of the input counts; `group_size` must hold whole ones.
        router: "top_k": each token takes its K best experts (V-MoE, arXiv 2106.05974); "expert_choice": each expert
            takes its best tokens (arXiv 2202.09368); "soft": experts see averages of tokens (arXiv 2308.00951).
        capacity_factor: C, rows per expert in training over those of an even distribution. None or infinity: nothing is
            dropped (top_k only).
        eval_capacity_factor: the same in `eval()`. None: nothing is dropped, so that an output never depends on the
            rest of the batch (expert_choice: as in training).
        capacity: rows per expert and group, instead of both factors.
        capacity_rounding: of the capacity S·K·C/E that a factor gives, "ceil" or "round"; "tutel" is Tutel's capacity
            K·floor(C·ceil(S/E)) (arXiv 2206.03382).
        capacity_multiple_of: a capacity that a factor gives is raised to a multiple of this.
        batch_priority: where capacity is short, the most important tokens go first (V-MoE, section 2.3).
        group_size: tokens routed together; the last group is padded. None: for top_k all of the call's; for the others
            each sequence by itself, so that an image's result never depends on the others of its batch. All copies of
            an ensemble count.
        noise_std: of the gate's normal noise in training: times 1/E for top_k and expert_choice, as it is for soft.
        learned_noise: the noise has a learned deviation per token and expert instead of noise_std, and the importance
            and load losses are those of its paper (arXiv 1701.06538).
        input_jitter: in training the gate sees its input times 1 - jitter .. 1 + jitter (Switch, arXiv 2101.03961).
        gate: "softmax" over all experts; "sigmoid" of each (DeepSeek-V3, arXiv 2412.19437); or "cosine": a softmax of
            scaled cosines of tokens, projected to `cosine_dim`, and experts (arXiv 2204.09636, as in Tutel).
        normalize_weights: the combine weights of a token's chosen experts are divided by their sum.
        random_threshold: in training each choice after the first is kept with probability
            min(1, weight / random_threshold) (GShard, arXiv 2006.16668: 0.5). None or 0: always.
        num_slots: slots per expert, only for soft; None: by capacity_factor from the number of tokens.
        expert_mlp: "mlp" with the model's activation, or gated: "swiglu", "geglu" (arXiv 2002.05202) or "relu2glu"
            (2 relu², as in SigLino, arXiv 2512.20157).
        expert_width: hidden width F of each expert; None: the model's MLP width.
        num_shared_experts: a dense MLP of this many times an expert's width sees every token (arXiv 2401.06066).
        bias_update_rate: balance by a bias on the gate that only the choice sees; `vmoe.update_expert_bias` moves it by
            this much after each step (arXiv 2408.15664).
        expert_drop: dropout inside the experts; None: the block's own.
        importance_loss: weight; so are load_loss, gshard_loss and z_loss.
        load_importance_loss: weight of the mean of both as Tutel computes it, in `eval()` too.
        local_entropy_loss: weight for every modality, or {modality: weight}; so is global_entropy_loss (2206.02770).
        global_entropy_min_experts: threshold S of the global entropy loss, for every modality or {modality: S}.
        auxiliary_loss: "record": the losses leave through `record_routing`; "attach": the backward pass of the output
            adds their gradients, for training loops that do not.
        auxiliary_loss_scope: "group": of each routing group by itself, then their mean, as in the reference; "batch":
            once over the tokens of the whole batch, in training that of all processes.
        backend: what computes the experts: "auto", "reference" (no fused attention either: all derivatives exist) or
            "triton", see `vmoe.moe.backends`.
    """

    num_experts: int = 8
    num_selected_experts: int = 1
    ensemble_size: int = 1
    router: str = "top_k"
    per_image: bool = False
    capacity_factor: float | None = 1.05
    eval_capacity_factor: float | None = None
    capacity: int | None = None
    capacity_rounding: str = "ceil"
    capacity_multiple_of: int = 4
    batch_priority: bool = False
    group_size: int | None = None
    noise_std: float = 1.0
    learned_noise: bool = False
    input_jitter: float = 0.0
    gate: str = "softmax"
    cosine_dim: int = 256
    normalize_weights: bool = False
    random_threshold: float | None = None
    num_slots: int | None = None
    expert_mlp: str = "mlp"
    expert_width: int | None = None
    num_shared_experts: int = 0
    bias_update_rate: float = 0.0
    expert_drop: float | None = None
    importance_loss: float = 0.005
    load_loss: float = 0.005
    load_importance_loss: float = 0.0
    gshard_loss: float = 0.0
    z_loss: float = 0.0
    local_entropy_loss: PerModality = 0.0
    global_entropy_loss: PerModality = 0.0
    global_entropy_min_experts: PerModality | None = None
    auxiliary_loss: str = "record"
    auxiliary_loss_scope: str = "group"
    backend: str = "auto"

    def __post_init__(self) -> None:
        """Raises ValueError for a setting out of range, or one that its router has no use for."""
        for field in fields(self):
            kinds = get_args(field.type) or (field.type,)
            object.__setattr__(self, field.name, _checked(field.name, getattr(self, field.name), kinds))
        least = self.global_entropy_min_experts
        numbers = [("num_selected_experts", self.num_selected_experts if self.router == "top_k" else 1)]
        numbers += [
            ("global_entropy_min_experts", own) for own in (least.values() if isinstance(least, dict) else [least])
        ]
        self._check_ensemble()
        most, each = self.num_experts // self.ensemble_size, " / ensemble_size" if self.ensemble_size > 1 else ""
        for name, value in numbers:
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"{name} must be 1..num_experts{each} ({most}), got {value}")
        self._check_router()

    def _check_ensemble(self) -> None:
        M = self.ensemble_size
        for name, value in (("num_experts", self.num_experts), ("group_size", self.group_size)):
            if value is not None and value % M:
                raise ValueError(f"ensemble_size must divide {name} ({value}), got {M}")
        if M > 1 and self.auxiliary_loss_scope == "batch":
            raise ValueError(f"ensemble_size={M} needs auxiliary_loss_scope='group': each member has its own losses")

    def _check_router(self) -> None:
        """Settings that a router would silently ignore are errors, and so is one that lacks what it needs."""
        for name, (off, routers) in _USED_BY.items():
            value = getattr(self, name)
            if self.router not in routers and value != off:
                raise ValueError(
                    f"{name}={value!r} needs router={' or '.join(map(repr, routers))}, not {self.router!r}; "
                    f"set it to {off!r} or leave it out"
                )
        if self.router != "top_k" and (self.capacity_factor, self.capacity, self.num_slots) == (None, None, None):
            raise ValueError(f"router={self.router!r} needs a finite capacity_factor: it says how many tokens it takes")
        if self.learned_noise and self.gate != "softmax":
            raise ValueError("learned_noise needs gate='softmax'")
        if self.cosine_dim != 256 and self.gate != "cosine":
            raise ValueError(f"cosine_dim={self.cosine_dim} needs gate='cosine', not {self.gate!r}; leave it out")
        if self.load_importance_loss > 0 and (self.noise_std == 0 or self.learned_noise):
            raise ValueError("load_importance_loss needs noise_std > 0, of which it computes the load; set it to 0")


def _checked(name: str, value: object, kinds: tuple[type, ...]) -> object:
    """The value of a setting, if it has the annotated type and is in its range."""
    kind, optional = kinds[0], type(None) in kinds
    if (name, value) in _NONE:
        value = None
    if value is None and optional:
        return None
    if isinstance(value, Mapping) and Mapping[str, float] in kinds:
        return {modality: _checked(name, own, kinds) for modality, own in value.items()}
    or_none = ", or None" if optional else ""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is str and value not in CHOICES[name]:
        raise ValueError(f"{name} must be one of {CHOICES[name]}, got {value!r}")
    if kind is bool and not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    if kind is float:
        if not number:
            raise ValueError(f"{name} must be a number{or_none}, got {value!r}")
        is_inside, what = _RANGES.get(name, (lambda x: 0 <= x < math.inf, ">= 0 and finite"))
        if not is_inside(value):
            raise ValueError(f"{name} must be {what}, got {value}")
    if kind is int:
        least = 0 if name == "num_shared_experts" else 1
        if not (number and math.isfinite(value) and value >= least and value == int(value)):
            raise ValueError(f"{name} must be a whole number >= {least}{or_none}, got {value!r}")
        return int(value)
    return value


# What stands for None, which timm.create_model cannot pass on.
_NONE = (("capacity_factor", math.inf), ("eval_capacity_factor", math.inf), ("random_threshold", 0))
# {setting: (whether a number is in its range, how the range is called)}; that of the others is >= 0 and finite.
_FACTOR = (lambda x: x > 0, "> 0, or None (or infinity) for no limit")
_SHARE = (lambda x: 0 <= x < 1, ">= 0 and < 1")
_THRESHOLD = (lambda x: 0 < x <= 1, "in (0, 1], or None")
_RANGES = {"capacity_factor": _FACTOR, "eval_capacity_factor": _FACTOR, "random_threshold": _THRESHOLD}
_RANGES |= {"input_jitter": _SHARE, "expert_drop": _SHARE}
# {setting: (the value that switches it off, the routers that use it)}
_USED_BY = {
    "batch_priority": (False, ("top_k",)),
    "per_image": (False, ("top_k",)),
    "learned_noise": (False, ("top_k",)),
    "random_threshold": (None, ("top_k",)),
    "bias_update_rate": (0.0, ("top_k",)),
    "gate": ("softmax", ("top_k",)),
    "ensemble_size": (1, ("top_k", "expert_choice")),
    "load_loss": (0.0, ("top_k",)),
    "load_importance_loss": (0.0, ("top_k",)),
    "normalize_weights": (False, ("top_k", "expert_choice")),
    "eval_capacity_factor": (None, ("top_k", "expert_choice")),
    "input_jitter": (0.0, ("top_k", "expert_choice")),
    "capacity": (None, ("top_k", "expert_choice")),
    "num_slots": (None, ("soft",)),
}

# Without `ensemble_size`: the layer alone does not make the copies, so that only models that do take it.
SETTING_NAMES = frozenset(field.name for field in fields(RoutingSettings)) - {"ensemble_size"} | {"router_preset"}

# What a router other than top_k does without, whatever the model's own defaults say.
_LOSSES = ("importance", "load", "load_importance", "gshard", "z", "local_entropy", "global_entropy")
_NO_LOSSES = {f"{loss}_loss": 0.0 for loss in _LOSSES}
_CHOOSES_TOKENS = {**_NO_LOSSES, "batch_priority": False, "capacity_factor": 1.0}
_ROUTER_DEFAULTS = {
    "top_k": {},
    "expert_choice": _CHOOSES_TOKENS,
    "soft": {**_CHOOSES_TOKENS, "capacity_rounding": "round", "capacity_multiple_of": 1, "noise_std": 0.0},
}


def _top_k(num_selected_experts: int, **settings) -> dict:
    """A top-K layer without noise, losses, priority and limit, except what the preset adds."""
    plain = {"router": "top_k", "noise_std": 0.0, "batch_priority": False, "capacity_factor": None}
    return {**_NO_LOSSES, **plain, "num_selected_experts": num_selected_experts, **settings}


# V-MoE's and LIMoE's.
_BALANCE = {"noise_std": 1.0, "capacity_factor": 1.05, "importance_loss": 0.005, "load_loss": 0.005}
# GShard's capacity is 2 S / E for two choices, our factor counts both. The loss's weight is GLaM's; it gives none.
_GSHARD = _top_k(2, normalize_weights=True, random_threshold=0.5, capacity_factor=1.0, gshard_loss=0.01)
# Numbers that a paper does not give are marked; docs/routers.md has the formulas.
PRESETS: dict[str, dict] = {
    "vmoe": _top_k(2, **_BALANCE),
    # The losses of Switch and GShard are the same formula.
    "switch": _top_k(1, input_jitter=0.01, capacity_factor=1.25, gshard_loss=0.01),
    "gshard": _GSHARD,
    "glam": _GSHARD,
    "noisy_topk": _top_k(4, learned_noise=True, normalize_weights=True, importance_loss=0.1, load_loss=0.1),
    # The loss is ours: the paper (arXiv 2401.04088) does not describe its training.
    "mixtral": _top_k(2, normalize_weights=True, expert_mlp="swiglu", gshard_loss=0.01),
    # The loss is that of its released config.
    "dbrx": _top_k(4, num_experts=16, normalize_weights=True, expert_mlp="swiglu", gshard_loss=0.05),
    # Two choices are ours: the paper has 8 of 256.
    "deepseek": _top_k(
        2, gate="sigmoid", normalize_weights=True, num_shared_experts=1, bias_update_rate=0.001, expert_mlp="swiglu"
    ),
    # ST-MoE (arXiv 2202.08906) is GShard with other numbers. It counts the capacity 1.25 per token, not per choice.
    "st_moe": {**_GSHARD, "random_threshold": 0.2, "capacity_factor": 0.625, "z_loss": 0.001, "expert_mlp": "geglu"},
    "limoe": _top_k(1, **_BALANCE, batch_priority=True, z_loss=0.001, global_entropy_loss=0.01),
    "expert_choice": {**_CHOOSES_TOKENS, "router": "expert_choice", "capacity_factor": 2.0, "noise_std": 0.0},
    "soft": {**_ROUTER_DEFAULTS["soft"], "router": "soft"},
}


def preset_settings(given: Mapping) -> dict:
    """The settings of `given["router_preset"]`; none without it. ValueError for an unknown preset."""
    name = given.get("router_preset")
    if name is None:
        return {}
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"router_preset must be one of {sorted(PRESETS)}, got {name!r}")
    return PRESETS[name]


def with_preset(defaults: Mapping, given: Mapping) -> dict:
    """Settings from a model's defaults, its router's needs, the preset, and what the user gave; later ones win.

    A default that another router than the user's needs is off.
    `given["router_preset"]`, if any, names the preset. ValueError for an unknown preset or router.
    """
    preset = preset_settings(given)
    router = {**defaults, **preset, **given}.get("router", "top_k")
    if router not in CHOICES["router"]:
        raise ValueError(f"router must be one of {CHOICES['router']}, got {router!r}")
    off = {name: off for name, (off, routers) in _USED_BY.items() if name in defaults and router not in routers}
    return {**defaults, **off, **_ROUTER_DEFAULTS[router], **preset, **given}
