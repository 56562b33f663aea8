"""open_clip's own models: built by name or config, and the name and config of one that open_clip built."""

import difflib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from timm.layers import to_2tuple
from torch import nn

from vmoe.models.hub_layout import KEY
from vmoe.models.validation import without_loading


def open_clip_names() -> list[str]:
    """The names in open_clip's registry of configs."""
    import open_clip

    return open_clip.list_models()


def is_open_clip(name: str, tag: str = "") -> bool:
    """A name in open_clip's registry of configs, or a name and the tag of its weights."""
    import open_clip

    return name in open_clip_names() and (not tag or open_clip.is_pretrained_cfg(name, tag))


def tag_problem(name: str, tag: str) -> str:
    """Why open_clip has no weights of a name and tag, or "" if the name is far from all of its models'."""
    import open_clip

    if not is_open_clip(name):
        near = difflib.get_close_matches(name, open_clip_names(), n=1)
        return f"open_clip has no model {name!r}; did you mean {near[0]!r}?" if near else ""
    tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
    return f"open_clip has no weights {tag!r} of {name}; it has {tags}"


def tag_settings(name: str, tag: str) -> dict[str, Any]:
    """The settings that the weights of a tag need, beside the config of their name."""
    import open_clip

    return {"quick_gelu": True} if open_clip.get_pretrained_cfg(name, tag).get("quick_gelu") else {}


def load_tag(model: nn.Module, name: str, tag: str) -> nn.Module:
    """A model with open_clip's weights of a tag, which are downloaded, and their preprocessing."""
    import open_clip
    from open_clip.transform import merge_preprocess_dict

    about = open_clip.get_pretrained_cfg(name, tag)
    open_clip.load_checkpoint(model, open_clip.download_pretrained(about))
    model.visual.preprocess_cfg = merge_preprocess_dict(model.visual.preprocess_cfg, about)
    return model


def _full_config(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """open_clip's config of a name, with settings over it; those of "vision_cfg" and "text_cfg" one by one."""
    import open_clip

    config = open_clip.get_model_config(name) or {}
    towers = {key: {**config.get(key, {}), **kwargs.get(key, {})} for key in ("vision_cfg", "text_cfg")}
    return {**config, **kwargs, **towers}


def build_open_clip(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """The model of a name in open_clip's registry, with settings over its config."""
    import open_clip
    from open_clip.transform import PreprocessCfg

    config = _full_config(name, kwargs)
    if "multimodal_cfg" in config or "hf_model_name" in config["text_cfg"]:
        raise ValueError(f"{name} is a CoCa or has a text tower of transformers, which vmoe cannot build; take a CLIP")
    config["vision_cfg"].pop("timm_model_pretrained", None)
    model = (open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP)(**config)
    registered = (open_clip.get_model_config(name) or config)["vision_cfg"].get("image_size", 224)
    if hasattr(model.visual, "set_input_size") and to_2tuple(model.visual.image_size) != to_2tuple(registered):
        model.visual.set_input_size(model.visual.image_size)  # a model of timm begins with its own
    model.visual.preprocess_cfg = vars(PreprocessCfg(size=model.visual.image_size))
    return model


def model_config(spec: dict, embed_dim: int | None, image_size: Sequence[int], context_length: int) -> dict[str, Any]:
    """open_clip's config of an image-text model by its `model_spec`; of one of open_clip's own it is that, as long as
    it is dense. With our "timm_model_name" open_clip changes precision and image size as for models of timm."""
    if embed_dim is not None:
        vision = {"timm_model_name": spec["name"], "image_size": image_size}
        config = {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": {"context_length": context_length}}
    else:
        config = _full_config(spec["name"], spec["kwargs"])
        if not spec.keys() & {"upcycle", "experts"}:
            return config
        config = {key: config[key] for key in ("embed_dim", "vision_cfg", "text_cfg")}
    return {**config, "custom_text": True, KEY: spec}


def open_clip_spec(model: nn.Module) -> Iterator[dict]:
    """Candidates for the specification of a model: its names in open_clip's registry with the same towers."""
    if not type(model).__module__.startswith("open_clip."):
        return
    open_clip, own = sys.modules["open_clip"], _sizes_of(model)
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        if _sizes_in(config) == own and "hf_model_name" not in config["text_cfg"]:
            changes = {"vision_cfg": {"image_size": model.visual.image_size}}
            changes["text_cfg"] = {"context_length": model.context_length}
            kwargs = {key: {**config[key], **value} for key, value in changes.items()}
            kwargs |= {"custom_text": isinstance(model, open_clip.CustomTextCLIP), "init_logit_bias": _bias(model)}
            yield {"name": name, "kwargs": without_loading({**config, **kwargs})}


def _bias(model: nn.Module) -> float | None:
    return None if model.logit_bias is None else 0.0


def _sizes_of(model: nn.Module) -> tuple:
    text, visual = getattr(model, "text", model), model.visual
    if hasattr(visual, "trunk"):
        image = (visual.trunk.pretrained_cfg["architecture"],)
    elif hasattr(visual, "conv1") and hasattr(visual, "transformer"):
        image = (visual.conv1.out_channels, visual.conv1.kernel_size[0], len(visual.transformer.resblocks))
    else:
        image = ()
    layers = getattr(getattr(text, "transformer", None), "resblocks", ())
    return (*image, model.vocab_size, getattr(text.token_embedding, "embedding_dim", None), len(layers))


def _sizes_in(config: dict) -> tuple:
    image, text = config["vision_cfg"], config["text_cfg"]
    if name := image.get("timm_model_name"):
        found = (name.split(".")[0],)
    elif isinstance(image.get("layers"), int):
        found = (image.get("width", 768), image.get("patch_size", 16), image["layers"])
    else:
        found = ()
    return (*found, text.get("vocab_size", 49408), text.get("width", 512), text.get("layers", 12))
