"""This package's image-text models in open_clip: by name, from folders and hubs, and in its trainer.

    import vmoe.open_clip
    vmoe.open_clip.register()

Then `open_clip.create_model_and_transforms("limoe_base_patch16")` and `open_clip.get_tokenizer` know LIMoE and the two
towers. open_clip has a registry of configs but none of classes, so `register` also puts a function before its class of
models with a text tower of their own; configs without our settings reach that class as before.
"""

import inspect
from functools import wraps
from typing import Any

import open_clip
import timm
from open_clip import factory
from torch import nn

from vmoe.models.factory import build
from vmoe.models.hub_layout import KEY
from vmoe.models.limoe import LIMOE_CONFIGS
from vmoe.models.open_clip_models import model_config
from vmoe.models.preprocess import open_clip_preprocess, preprocess_config
from vmoe.models.serialization import (
    METADATA_KEY,
    WeightsError,
    find_weights,
    read_pretrained_metadata,
    safetensors_metadata,
)
from vmoe.models.spec import IMAGE_TEXT_NAMES, on_meta
from vmoe.models.text import CONTEXT_LENGTH
from vmoe.models.two_tower import TWO_TOWER_CONFIGS, merge_settings
from vmoe.models.validation import check_metadata
from vmoe.moe import SparseMoE
from vmoe.utils.printable import printable

MODEL_CLASS = open_clip.CustomTextCLIP


def register() -> None:
    """Makes open_clip find this package's models. Their auxiliary losses are attached to the layers' outputs
    (`auxiliary_loss="attach"`), since open_clip's trainer adds none."""
    for name in IMAGE_TEXT_NAMES:
        factory._MODEL_CONFIGS[name] = model_config({"name": name, "kwargs": {}}, **_sizes(name))
    if factory.CustomTextCLIP is MODEL_CLASS:
        factory.CustomTextCLIP = CustomTextCLIP
        factory.create_model = open_clip.create_model = _with_our_preprocessing(factory.create_model)


def _sizes(name: str) -> dict[str, int]:
    if name in LIMOE_CONFIGS:
        image = text = settings = LIMOE_CONFIGS[name]
    else:
        settings = TWO_TOWER_CONFIGS[name]
        image, text = settings["image"], settings["text"]
        image = {"img_size": timm.get_pretrained_cfg(image["name"]).input_size[1], **image}
    context_length = text.get("context_length", CONTEXT_LENGTH)
    return {
        "embed_dim": settings["embed_dim"],
        "image_size": image.get("img_size", 224),
        "context_length": context_length,
    }


def CustomTextCLIP(embed_dim: int, vision_cfg: dict, text_cfg: dict, **settings: Any) -> nn.Module:
    """open_clip's class of that name or, where a config holds our settings, the model of these. Further settings go
    over them, such as `num_experts` or `init_logit_bias`."""
    spec = settings.pop(KEY, None)
    if spec is None:
        return MODEL_CLASS(embed_dim, vision_cfg, text_cfg, **settings)
    try:
        check_metadata({"preprocess": {}, "extra": {}, **spec})
    except (TypeError, ValueError) as error:
        raise ValueError(f"the settings of the model in its open_clip config are refused: {error}") from error
    for key in ("quick_gelu", "nonscalar_logit_scale"):
        if settings.pop(key, False):
            raise ValueError(f"{spec['name']} does not take open_clip's {key}; leave it out")
    if vision_cfg.get("patch_dropout"):
        raise ValueError(f"{spec['name']} has no patch dropout; leave force_patch_dropout out")
    output_dict = settings.pop("output_dict", False)
    settings.pop("cast_dtype", None)
    model = build(_merged(spec, vision_cfg, text_cfg, settings))
    model.output_dict = output_dict
    if not hasattr(model.visual, "image_size"):
        model.visual.image_size = preprocess_config(model)["input_size"][1:]
    for layer in model.modules():
        if isinstance(layer, SparseMoE):
            layer.auxiliary_loss = "attach"
    return model


def _merged(spec: dict, vision_cfg: dict, text_cfg: dict, settings: dict) -> dict:
    """A specification with the caller's settings over it; open_clip keeps the length of texts beside them, and changes
    the image size of ours later."""
    name, context = spec["name"], {"context_length": text_cfg["context_length"]}
    if name in LIMOE_CONFIGS:
        return {**spec, "kwargs": spec["kwargs"] | context | settings}
    if name in TWO_TOWER_CONFIGS:
        kwargs = merge_settings(spec["kwargs"], settings)
        return {**spec, "kwargs": {**kwargs, "text": {**kwargs["text"], **context}}}
    return {**spec, "kwargs": {**spec["kwargs"], "vision_cfg": vision_cfg, "text_cfg": text_cfg, **settings}}


def _with_our_preprocessing(create_model):
    """open_clip's function, which starts from CLIP's preprocessing for every name; ours have their own. A file of this
    package, or a run's folder, as `pretrained` also brings its settings."""
    signature = inspect.signature(create_model)

    @wraps(create_model)
    def create(*args, **kwargs) -> nn.Module:
        call = signature.bind(*args, **kwargs)
        if (name := call.arguments["model_name"]) in IMAGE_TEXT_NAMES:
            spec = {"name": name, "kwargs": {}}
            if pretrained := call.arguments.get("pretrained"):
                call.arguments["pretrained"] = file = str(find_weights(pretrained))
                if METADATA_KEY in safetensors_metadata(file):
                    spec = read_pretrained_metadata(file)
                    if spec["name"] != name:
                        raise WeightsError(f"{file} holds {spec['name']}, not {name}: ask for {spec['name']}")
                    ours = {key: value for key, value in spec.items() if key in ("name", "kwargs", "experts")}
                    call.arguments["model_kwargs"] = {KEY: ours, **call.arguments.get("model_kwargs", {})}
            preprocess = spec.get("preprocess") or preprocess_config(on_meta(build, spec))
            forced = call.arguments.get("force_preprocess_cfg") or {}
            call.arguments["force_preprocess_cfg"] = {**open_clip_preprocess(preprocess), **forced}
        try:
            return create_model(*call.args, **call.kwargs)
        except RuntimeError as error:
            if name not in IMAGE_TEXT_NAMES or not pretrained or not str(error).startswith("Error(s) in loading"):
                raise
            reason = printable(" ".join(str(error).splitlines()[1].split()))[:200]
            raise WeightsError(
                f"{file} does not fit {name} with the settings given ({reason}): leave out those that differ from the "
                "settings of the file's model"
            ) from error

    return create
