"""Models by name or file, their preprocessing and their tokenizer."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch
from timm.data import create_transform
from timm.utils import unwrap_model
from torch import Tensor, nn

from vmoe.models.hub_layout import cannot_download
from vmoe.models.limoe import LIMOE_CONFIGS
from vmoe.models.open_clip_models import is_open_clip, load_tag, tag_problem, tag_settings
from vmoe.models.preprocess import in_chans, preprocess_config, set_preprocess
from vmoe.models.safetensors_writer import write_tensors
from vmoe.models.serialization import (
    METADATA_KEY,
    StoredTensors,
    WeightsError,
    find_weights,
    load_weights,
    read_pretrained_metadata,
)
from vmoe.models.spec import IMAGE_TEXT_NAMES, build_dense, difference, model_spec, named_tensors, on_meta
from vmoe.models.text import CONTEXT_LENGTH, clean_beginning
from vmoe.models.two_tower import TWO_TOWER_CONFIGS, merge_settings
from vmoe.models.upcycle import upcycle, upcycle_steps
from vmoe.models.validation import bounded_model, check_metadata
from vmoe.moe.config import SETTING_NAMES
from vmoe.moe.experts import refuse_adapters
from vmoe.moe.quantize import quantize_experts
from vmoe.utils.channels import to_channels
from vmoe.utils.files import HUB_SOURCES
from vmoe.utils.printable import printable


def create_model(name: str | None = None, pretrained: str | Path | None = None, **kwargs) -> nn.Module:
    """Build a LIMoE, a two-tower model or any timm model, with the weights of a file if one is given.

    Args:
        name: "limoe_...", "two_tower_..." or a timm name such as "vmoe_base_patch16_224"; None: that in `pretrained`.
        pretrained: a file of `save_pretrained`; the folder of a run or checkpoint, or in the layout of timm's or
            open_clip's hub (also as "local-dir:FOLDER"); what is downloaded: "hf-hub:ORG/NAME", timm's
            "vit_base_patch16_224.augreg_in21k", and a tag of open_clip's model `name`, or both as "ViT-B-32:openai".
            Position embeddings are interpolated for another image size; a classifier starts from scratch if
            `num_classes` is given and differs.
        **kwargs: of the model, over the file's; `image` and `text` of a two-tower model setting by setting.
            `image={"pretrained": FILE}` gives the image tower that file's architecture and weights.

    A ValueError for an unknown name or setting, a WeightsError if the file cannot be read or does not fit.
    """
    if isinstance(pretrained, bool):
        raise ValueError(f"pretrained must be a file or folder, got {pretrained}: there are no weights to download yet")
    if pretrained is None:
        if name is None:
            raise ValueError("create_model needs a name, or pretrained=FILE with one in it")
        return _new_model(name, kwargs)
    if (model := _downloaded(name, str(pretrained), kwargs)) is not None:
        return model
    file = find_weights(pretrained)
    stored, metadata = StoredTensors(file), read_pretrained_metadata(file)
    changes = {"new_head": "num_classes" in kwargs, "new_size": True}
    if name in (None, metadata["name"]):
        model = _build_for_file(stored, metadata, kwargs)
    else:  # the architecture is the caller's, of any size: whether the weights fit it is known without memory
        spec = {"name": name, "kwargs": _without_image_weights(kwargs)}
        load_weights(on_meta(build, spec), stored, **changes)
        model = build(spec)
    load_weights(model, stored, **changes)
    same = name is None or name.partition(".")[0] == metadata["name"].partition(".")[0]  # without timm's tag
    if same and "pretrained_cfg_overlay" not in kwargs:
        set_preprocess(model, metadata["preprocess"])
    return model


def build(spec: dict) -> nn.Module:
    """A new model by its `model_spec`, which it remembers."""
    model = build_dense(spec)
    for step in upcycle_steps(spec):
        model = upcycle(model, **step)
    if "experts" in spec:
        quantize_experts(model, spec["experts"])
    return model


def _build_for_file(stored: StoredTensors, metadata: dict, kwargs: dict) -> nn.Module:
    """A new model by the settings of a file, with the user's over them: no larger than the file makes plausible."""
    spec = _merged(stored.source, metadata, _without_image_weights(kwargs))
    source = f"{stored.source}, with your {', '.join(kwargs)}" if kwargs else stored.source
    try:
        with bounded_model(source, sum(map(math.prod, stored.shapes.values())), len(stored.shapes)):
            return build(spec)
    except ValueError:
        raise
    except Exception as error:  # whatever a constructor raises for strange settings
        reason = f"{type(error).__name__}: {printable(error)[:300]}"
        raise WeightsError(f"no model can be built by the settings in {stored.source} ({reason})") from error


def _new_model(name: str, kwargs: dict) -> nn.Module:
    """A model without a file; a two-tower model may have one for its image tower."""
    image = kwargs.get("image") if name in TWO_TOWER_CONFIGS else None
    weights = image.get("pretrained") if isinstance(image, dict) else None
    if weights is None or isinstance(weights, bool):  # True: timm's own weights of that name
        return build({"name": name, "kwargs": kwargs})
    weights = find_weights(weights)
    metadata = read_pretrained_metadata(weights)
    if not timm.is_model(metadata["name"]) or "upcycle" in metadata:
        raise ValueError(f"image.pretrained must hold an image model of timm, {weights} holds {metadata['name']!r}")
    own = {key: value for key, value in metadata["kwargs"].items() if key != "num_classes"}
    kwargs = _without_image_weights(kwargs)
    model = build({"name": name, "kwargs": {**kwargs, "image": {"name": metadata["name"], **own, **kwargs["image"]}}})
    load_weights(model.visual, weights, new_head=True, new_size=True)
    return model


def named_weights(name: str | None, source: str) -> tuple[str, str] | None:
    """(architecture, open_clip's tag or "") of weights that timm or open_clip download by a name of theirs, or None.
    A WeightsError for what looks like a name of open_clip's, and is none."""
    if source.startswith(HUB_SOURCES) or Path(source).exists():
        return None
    if timm.is_model(source):
        return source, ""
    known = name in IMAGE_TEXT_NAMES or (name is not None and timm.is_model(name))
    architecture, tag = (name, source) if name is not None and ":" not in source else source.partition(":")[::2]
    if known or not tag:
        return None
    if is_open_clip(architecture, tag):
        return architecture, tag
    if problem := tag_problem(architecture, tag):
        raise WeightsError(f"no weights at {source}: it is no file, and {problem}")
    return None


def _downloaded(name: str | None, source: str, kwargs: dict) -> nn.Module | None:
    """A model with weights of `named_weights`; None for other sources."""
    if (found := named_weights(name, source)) is None:
        return None
    architecture, tag = found
    if name is not None and name.partition(".")[0] != architecture.partition(".")[0]:
        raise WeightsError(f"{source} names weights of {architecture}, not of {name}: leave the model's name out")
    load = torch.get_default_device().type != "meta"  # else another process holds the weights
    try:
        if tag:
            model = build({"name": architecture, "kwargs": {**tag_settings(architecture, tag), **kwargs}})
            return load_tag(model, architecture, tag) if load else model
        return build({"name": source, "kwargs": {**kwargs, "pretrained": load}})
    except ValueError:
        raise
    except Exception as error:  # whatever the libraries raise without a network
        if not tag and not timm.models.is_model_pretrained(source):
            known = ", ".join(timm.list_models(f"{architecture.partition('.')[0]}.*", pretrained=True))
            remedy = f"take one of {known}" if known else "it has none of this architecture; give a file"
            raise WeightsError(f"timm has no weights {source} to download: {remedy}") from error
        raise WeightsError(cannot_download(f"weights of {source}", error)) from error


def _merged(file: Path, metadata: dict, kwargs: dict) -> dict:
    """The specification of a file's model, with the user's settings over it."""
    name = metadata["name"]
    spec = {key: metadata[key] for key in ("upcycle", "experts") if key in metadata}
    if "upcycle" in spec:  # routing settings are those of `upcycle`
        for key in {"layers", "moe_layers"} & kwargs.keys():
            raise ValueError(f"{file} holds an upcycled model, whose sparse layers are fixed: leave {key} out")
        own = {key: kwargs[key] for key in SETTING_NAMES & kwargs.keys()}
        spec["upcycle"] = [step | own for step in upcycle_steps(spec)]
        kwargs = {key: value for key, value in kwargs.items() if key not in SETTING_NAMES}
    merge = merge_settings if name in TWO_TOWER_CONFIGS else dict.__or__
    return {**spec, "name": name, "kwargs": merge(metadata["kwargs"], kwargs)}


def _without_image_weights(kwargs: dict) -> dict:
    image = kwargs.get("image")
    if not isinstance(image, dict):
        return kwargs
    return {**kwargs, "image": {key: value for key, value in image.items() if key != "pretrained"}}


def is_contrastive(model: nn.Module) -> bool:
    """The model embeds images and text."""
    return hasattr(model, "encode_image") and hasattr(model, "encode_text")


def save_pretrained(model: nn.Module, file: str | Path, extra: dict | None = None) -> None:
    """Write a model's weights and settings as one safetensors file, atomically.

    The model is taken out of `torch.compile`, (Distributed)DataParallel or timm's average; `extra` are JSON-able facts
    beside its settings, such as class names. A ValueError if the file would not give the same model again, or if
    tensors share their memory.
    """
    model = unwrap_model(model)
    if hasattr(model, "merge_and_unload"):
        raise ValueError(
            f"{type(model).__name__} holds adapters: save what its merge_and_unload() returns, or the adapters alone "
            "with its save_pretrained(FOLDER)"
        )
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in named_tensors(model).items()}
    try:
        write_tensors(tensors, file_metadata(model, extra), Path(file))
    except RuntimeError as error:
        raise ValueError(f"{type(model).__name__} cannot be saved: some of its tensors share their memory") from error


def file_metadata(model: nn.Module, extra: dict | None = None) -> dict[str, str]:
    """The metadata of a model's safetensors file; a ValueError if it would give another model."""
    refuse_adapters(model)
    settings = {**model_spec(model), "preprocess": preprocess_config(model), "extra": extra or {}}
    try:
        text = json.dumps(settings)
    except TypeError as error:
        raise ValueError(f"settings of {settings['name']} cannot be saved: {error}; use names and numbers") from error
    settings = json.loads(text)
    try:
        check_metadata(settings)
        other = difference(model, on_meta(build, settings))
    except (TypeError, ValueError, RuntimeError) as error:
        other = str(error)
    if other is not None:
        raise ValueError(
            f"{type(model).__name__} cannot be saved, because its settings give another model ({other}): change models "
            "only by settings, reset_classifier and set_input_size, or save the state_dict with torch.save"
        )
    return {"format": "pt", METADATA_KEY: text}  # "pt": other libraries ask for it before they load into PyTorch


def create_model_and_transforms(
    model_name: str | None = None, pretrained: str | Path | None = None, device: str | torch.device = "cpu", **kwargs
) -> tuple[nn.Module, Callable, Callable]:
    """(model in eval mode, training transform, evaluation transform), as open_clip's function of this name, by the
    arguments of `create_model`. The transforms turn a PIL image into (C, H, W); that for training is a random crop."""
    model = create_model(model_name, pretrained, **kwargs).to(device).eval()
    config = preprocess_config(model)
    random_crop = {"is_training": True, "scale": (0.9, 1.0), "ratio": (0.75, 4 / 3), "hflip": 0.0, "color_jitter": 0.0}
    train, val = create_transform(**config, **random_crop), create_transform(**config)
    for transform in (train, val):
        transform.transforms[:0] = to_channels(in_chans(model))
    return model, train, val


def get_tokenizer(model: str | nn.Module, context_length: int | None = None) -> Callable[[list[str] | str], Tensor]:
    """open_clip's tokenizer of a model or name, CLIP's for ours: texts -> (B, context_length) token ids, zero after
    their end. Only the beginning of a very long text is read, since the time for a word of n letters grows with n²."""
    from open_clip.tokenizer import SimpleTokenizer

    name = model if isinstance(model, str) else (getattr(model, "vmoe_spec", None) or {}).get("name", "")
    length = context_length or getattr(model, "context_length", None)
    if name not in IMAGE_TEXT_NAMES and is_open_clip(name):
        tokenizer = _open_clip_tokenizer(name, length)
    elif isinstance(model, str):
        if model not in IMAGE_TEXT_NAMES:
            raise ValueError(f"no tokenizer for {model!r}: models with text are {list(IMAGE_TEXT_NAMES)}")
        settings = LIMOE_CONFIGS.get(model) or TWO_TOWER_CONFIGS[model]["text"]
        tokenizer = SimpleTokenizer(context_length=length or settings.get("context_length", CONTEXT_LENGTH))
    elif is_contrastive(model):
        tokenizer = SimpleTokenizer(context_length=length)
    else:
        raise ValueError(f"{type(model).__name__} has no text side, so it has no tokenizer")
    if isinstance(tokenizer, SimpleTokenizer):
        tokenizer.clean_fn = partial(clean_beginning, tokenizer.clean_fn, tokenizer.context_length)
    return tokenizer


def _open_clip_tokenizer(name: str, context_length: int | None) -> Callable[[list[str] | str], Tensor]:
    import open_clip

    try:
        return open_clip.get_tokenizer(name, context_length)
    except Exception as error:  # SigLIP's are transformers', from the hub
        raise ValueError(cannot_download(f"the tokenizer of {name}", error)) from error
