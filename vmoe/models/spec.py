"""How to build a model again: its name and settings, also those that were changed since."""

import difflib
import fnmatch
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import timm
import torch
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from timm.utils import unwrap_model
from torch import Tensor, nn

from vmoe.models.limoe import LIMOE_CONFIGS, LIMoE
from vmoe.models.open_clip_models import build_open_clip, is_open_clip, open_clip_names, open_clip_spec
from vmoe.models.text import TextTransformer
from vmoe.models.two_tower import TOWERS, TWO_TOWER_CONFIGS, TwoTower, merge_settings
from vmoe.models.validation import without_loading
from vmoe.models.vision import VisionMoE
from vmoe.moe import SparseMoE
from vmoe.moe.config import SETTING_NAMES, preset_settings
from vmoe.moe.quantize import experts_kept_as, quantize_experts
from vmoe.utils.meta import meta_device

IMAGE_TEXT_NAMES = (*LIMOE_CONFIGS, *TWO_TOWER_CONFIGS)


def list_models(filter: str = "") -> list[str]:
    """Names of this package's models that match a filter with wildcards, as timm's: "limoe_*"; "": all."""
    own = ("vmoe_*", "softmoe_*", "swin_moe_*", "siglino_*")
    names = [*IMAGE_TEXT_NAMES, *(name for pattern in own for name in timm.list_models(pattern))]
    return fnmatch.filter(names, filter or "*")


def build_dense(spec: dict) -> nn.Module:
    """A model by its "name" and "kwargs", which it remembers; a ValueError names an unknown name or setting."""
    name, kwargs = spec["name"], spec["kwargs"]
    try:
        model = _construct(name, kwargs)
    except (AssertionError, TypeError) as error:
        unknown = re.search(r"unexpected keyword argument(?:\(s\): \[| )'(\w+)'", str(error))
        if unknown is None:
            raise ValueError(
                f"model {name!r} does not take these settings ({', '.join(sorted(kwargs))}): {error}"
            ) from error
        raise ValueError(f"model {name!r} has no setting {unknown[1]!r}{_advice(name, kwargs, unknown[1])}") from error
    return remember(model, {"name": name, "kwargs": with_slots(model, without_loading(kwargs))})


def remember(model: nn.Module, spec: dict | None) -> nn.Module:
    """The model, with how to build it as it is now."""
    model.vmoe_spec, model.vmoe_built = spec, live_settings(model)
    return model


def known_spec(model: nn.Module) -> dict | None:
    """`model_spec`, or None if it is not known."""
    with suppress(ValueError):
        return model_spec(model)
    return None


def _construct(name: str, kwargs: dict) -> nn.Module:
    if name in LIMOE_CONFIGS:
        preset = preset_settings(kwargs)  # overrides the settings of the name
        return LIMoE(**{key: v for key, v in LIMOE_CONFIGS[name].items() if key not in preset} | kwargs)
    if name in TWO_TOWER_CONFIGS:
        return TwoTower(**merge_settings(TWO_TOWER_CONFIGS[name], kwargs))
    if timm.is_model(name):
        return timm.create_model(name, **kwargs)
    if "vision_cfg" in kwargs or is_open_clip(name):
        return build_open_clip(name, kwargs)
    near = difflib.get_close_matches(name, [*list_models(), *timm.list_models(), *open_clip_names()], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "; vmoe-list-models and timm.list_models() list the names"
    raise ValueError(f"unknown model {name!r}{hint}")


def _advice(name: str, kwargs: dict, unknown: str) -> str:
    """What to give instead of a setting that a model does not have, or ""."""
    if name in TWO_TOWER_CONFIGS:
        towers = {"image": _parameters(VisionMoE), "text": _parameters(TextTransformer)}
        known = _parameters(TwoTower).union(*towers.values())
        owners = [tower for tower, own in towers.items() if unknown in own and unknown not in (kwargs.get(tower) or {})]
        if owners:
            return "; it is one of a tower: " + " or ".join(f"{tower}={{{unknown!r}: ...}}" for tower in owners)
    elif name in LIMOE_CONFIGS:
        known = _parameters(LIMoE)
    elif not timm.is_model(name):
        return ""
    elif unknown in SETTING_NAMES:  # which V-MoEs have
        return "; it is one of sparse models, which vmoe.upcycle makes of dense ones"
    else:
        known = _parameters(type(on_meta(timm.create_model, name)))
    near = difflib.get_close_matches(unknown, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _parameters(owner: type) -> set[str]:
    """The arguments of a class, of its base classes and experts."""
    routing = SETTING_NAMES if _takes_experts(owner) else set()
    return routing.union(*(inspect.signature(one).parameters for one in owner.__mro__[:-1]))


def _takes_experts(owner: type) -> bool:
    """A class of this package with experts in the blocks of `moe_layers`."""
    return any("moe_layers" in inspect.signature(one.__init__).parameters for one in owner.__mro__)


def on_meta(build: Callable[[Any], nn.Module], spec: Any) -> nn.Module:
    """A model on the meta device, without memory for its weights."""
    with torch.random.fork_rng(devices=[]):
        try:
            with meta_device():
                return build(spec)
        except RuntimeError:  # a few constructors of timm read the numbers that they make
            return build(spec)


def with_slots(model: nn.Module, kwargs: dict) -> dict:
    """Settings with the slots of soft routers, which else follow from an image size that may change; without them if
    they differ, as in the stages of a Swin."""
    if isinstance(model, TwoTower):
        for tower, module in zip(TOWERS, (model.visual, model.text), strict=True):
            own = kwargs.get(tower) or {}
            if (new := with_slots(module, own)) != own:
                kwargs = {**kwargs, tower: new}
        return kwargs
    slots = {layer.settings.num_slots for layer in model.modules() if isinstance(layer, SparseMoE)}
    return {**kwargs, "num_slots": slots.pop()} if len(slots) == 1 and None not in slots else kwargs


def model_spec(model: nn.Module) -> dict:
    """{"name", "kwargs"} for `create_model`, with a head or image size that was changed since, and "upcycle", the
    arguments of `upcycle`, or "experts", that of `quantize_experts`; a ValueError if that is not known."""
    spec = getattr(model, "vmoe_spec", None)
    kept_as = experts_kept_as(model)
    kept = {"experts": kept_as} if kept_as else {}
    if spec is not None:
        changed = _changed(model.vmoe_built, live_settings(model))
        if isinstance(model, TwoTower) and changed:
            changed = {"image": {**(spec["kwargs"].get("image") or {}), **changed}}
        return {**spec, "kwargs": {**spec["kwargs"], **changed}, **kept}
    for spec, is_own in _candidates(model):
        with suppress(TypeError, ValueError, RuntimeError):  # it gives no model
            changed = _changed(live_settings(on_meta(_build_again, {**spec, **kept})), live_settings(model))
            spec = {**spec, "kwargs": {**spec["kwargs"], **changed}, **kept}
            # Arguments of our own are known, and saving names what else was changed.
            if is_own or difference(model, on_meta(_build_again, spec)) is None:
                return spec
    raise ValueError(
        "how to build this model again is not known: it was not made by vmoe.create_model, nor by timm or open_clip "
        "under a name of theirs (make the dense model with one of these, and upcycle it in one call)"
    )


def _candidates(model: nn.Module) -> Iterator[tuple[dict, bool]]:
    """(what may build a model that timm or open_clip made, whether it is one of ours), without changes since."""
    config = getattr(model, "pretrained_cfg", None) or {}
    if timm.is_model(name := config.get("architecture") or ""):
        tagged = f"{name}.{config.get('tag')}"
        # Newer versions of timm keep the arguments, ours do in any version.
        kwargs = with_slots(model, without_loading(getattr(model, "_model_args", {})))
        is_own = _takes_experts(type(model))
        if is_own and not any(isinstance(module, SparseMoE) for module in model.modules()):
            kwargs["num_experts"] = 0
        yield {"name": tagged if tagged in timm.list_pretrained() else name, "kwargs": kwargs}, is_own
    for spec in open_clip_spec(model):
        yield spec, False


def _build_again(spec: dict) -> nn.Module:
    model = build_dense(spec)
    return quantize_experts(model, spec["experts"]) if "experts" in spec else model


def live_settings(model: nn.Module) -> dict:
    """Settings that `reset_classifier` and `set_input_size` change, of two towers those of the image tower."""
    model = unwrap_model(model.visual if isinstance(model, TwoTower) else model)
    settings = {key: getattr(model, key) for key in ("num_classes", "global_pool", "in_chans") if hasattr(model, key)}
    if not isinstance(settings.get("global_pool", ""), str):  # some of timm's models call their pooling layer so
        del settings["global_pool"]
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else None
    if isinstance(classifier, (nn.Linear, nn.Identity)):  # perhaps one that the user put there
        settings["num_classes"] = getattr(classifier, "out_features", 0)
    if isinstance(model, (VisionTransformer, NaFlexVit)):
        settings["fc_norm"] = not isinstance(model.fc_norm, nn.Identity)
    for key in ("img_size", "patch_size"):
        size = getattr(getattr(model, "patch_embed", None), key, None)
        if isinstance(size, (int, tuple, list)):
            settings[key] = size if isinstance(size, int) else list(size)
    noted = getattr(model, "_model_args", {})  # by timm, of Swin, EVA and BEiT
    return settings | {key: noted[key] for key in ("window_size", "always_partition", "use_fc_norm") if key in noted}


def _changed(before: dict, now: dict) -> dict:
    """The live settings that differ; with a new pooling also what would follow from it."""
    changed = {key: value for key, value in now.items() if before.get(key) != value}
    if "global_pool" in changed and "fc_norm" in now:
        changed["fc_norm"] = now["fc_norm"]
    return changed


def difference(model: nn.Module, again: nn.Module) -> str | None:
    """The first difference of a model that was built again, or None: of tensors' shapes, and of modules' classes,
    `extra_repr` and plain attributes that both have."""
    ours, theirs = _facts(model), _facts(again)
    for name in sorted(ours.keys() ^ theirs.keys()):
        return f"it {'lacks' if name in ours else 'also has'} {name}"
    for name, facts in ours.items():
        for key, value in facts.items():
            if (other := theirs[name].get(key, value)) != value:
                return f"{key} of {name or 'the model'} is {other!r} instead of {value!r}"
    return None


# Attributes that do not decide what a model computes, or that a classifier's shape says.
_NO_DIFFERENCE = {"training", "grad_checkpointing", "fused_attn", "num_classes", "calls_without_update", "backend"}
_NO_DIFFERENCE |= {"auxiliary_loss", "output_dict"}  # the form in which they give it
_NO_DIFFERENCE |= {"target_shift_size"}  # of a Swin's first windows, also after set_input_size


def _facts(model: nn.Module) -> dict[str, dict]:
    """{name of a tensor or module: what describes it}, tensors first."""
    found = {name: {"shape": tuple(tensor.shape)} for name, tensor in named_tensors(model).items()}
    for name, module in model.named_modules():
        known = vars(module) | (asdict(module.settings) if isinstance(module, SparseMoE) else {})
        named = [(key, _plain(value)) for key, value in known.items() if key[0] != "_" and key not in _NO_DIFFERENCE]
        plain = {key: value for key, value in named if value is not Ellipsis}
        # FSDP2 gives a module a class of its own, with the old one's name in it.
        plain |= {"class": type(module).__name__.removeprefix("FSDP"), "description": module.extra_repr()}
        if not hasattr(module, "_orig_mod"):
            found[name.replace("._orig_mod", "")] = plain
    return found


def _plain(value: Any) -> Any:
    """Numbers, text and sequences of them, lists as tuples; Ellipsis for anything else."""
    if isinstance(value, (list, tuple)):
        parts = tuple(map(_plain, value))
        return Ellipsis if Ellipsis in parts else parts
    return value if value is None or isinstance(value, (bool, int, float, str)) else Ellipsis


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, without the names of `torch.compile`'s wrappers around parts of the model."""
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in model.state_dict().items()}
