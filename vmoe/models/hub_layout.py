"""The folders of the hubs: timm's for image models, open_clip's for image-text models; found, downloaded and read."""

from pathlib import Path

from vmoe.models.preprocess import CROP_MODES
from vmoe.models.validation import without_loading
from vmoe.utils.files import read_json
from vmoe.utils.printable import first_line, printable

TIMM = ("config.json", "model.safetensors")
OPEN_CLIP = ("open_clip_config.json", "open_clip_model.safetensors")
KEY = "vmoe"  # of our settings in open_clip's config
ARCHITECTURE = "upcycled_moe"  # in timm's config, of models that no other name of timm's builds


def hub_folder(source: str) -> Path:
    """The folder of a name as timm and open_clip spell it: "local-dir:FOLDER", or "hf-hub:ORG/NAME[@REVISION]", which
    is downloaded. A ValueError says why there is none."""
    kind, _, name = source.partition(":")
    if not name:
        raise ValueError(f"{source!r} names nothing: give local-dir:FOLDER or hf-hub:ORG/NAME")
    return Path(name) if kind == "local-dir" else _download(source, *name.partition("@")[::2])


def _download(source: str, repo: str, revision: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for config, weights in (OPEN_CLIP, TIMM):
        try:
            huggingface_hub.hf_hub_download(repo, config, revision=revision or None)
            return Path(huggingface_hub.hf_hub_download(repo, weights, revision=revision or None)).parent
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):
                raise ValueError(cannot_download(f"weights of {source}", error)) from error
        except Exception as error:  # no network, no such repository, no right to read it, a name that is none
            raise ValueError(cannot_download(f"weights of {source}", error)) from error
    wanted = " nor ".join(" and ".join(files) for files in (TIMM, OPEN_CLIP))
    raise ValueError(f"{source} holds neither {wanted}: only safetensors files are read")


def cannot_download(what: str, error: Exception) -> str:
    """One sentence about something that could not be downloaded."""
    reason = first_line(error).partition(". ")[0]
    return f"{what} cannot be downloaded ({reason}): check the name and the network, or give a file"


def folder_settings(weights: Path) -> dict | None:
    """What the config beside weights says, as `save_pretrained` writes it: of a folder that timm or open_clip wrote;
    None if there is no such config. A ValueError says what is wrong with it."""
    read = {TIMM[1]: (TIMM[0], _timm_settings), OPEN_CLIP[1]: (OPEN_CLIP[0], _open_clip_settings)}
    config, settings = read.get(weights.name, ("", None))
    file = weights.with_name(config) if config else weights
    if settings is None or not file.is_file():
        return None
    try:
        return settings(read_json(file, kind=dict))
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else printable(error)
        raise ValueError(f"{file} cannot be used: {reason}") from error


def _timm_settings(config: dict) -> dict:
    name = config["architecture"]
    cfg = config.get("pretrained_cfg", config)
    args = dict(config.get("model_args") or {})
    size = list(cfg["input_size"])
    kept = {key: cfg[key] for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode") if key in cfg}
    labels = config.get("label_names") or cfg.get("label_names")
    about = {
        "preprocess": {"crop_mode": "center", **kept, "input_size": size},
        "extra": {"class_names": labels} if isinstance(labels, list) else {},
    }
    if name == ARCHITECTURE:
        return {**args["spec"], **about}
    current = {"num_classes": config.get("num_classes", cfg.get("num_classes")), "in_chans": size[0]}
    if cfg.get("fixed_input_size"):
        current["img_size"] = size[1:]
    return {"name": name, "kwargs": {k: v for k, v in {**current, **args}.items() if v is not None}, **about}


def _open_clip_settings(config: dict) -> dict:
    model, given = dict(config["model_cfg"]), config.get("preprocess_cfg") or {}
    spec, text = model.pop(KEY, None), model["text_cfg"]
    if spec is None:
        if needed := text.get("hf_model_name") or text.get("hf_tokenizer_name"):
            raise ValueError(f"its texts need {printable(needed)} of transformers; load it with open_clip")
        spec = {"name": "open_clip", "kwargs": without_loading(model)}
    size = given.get("size", model["vision_cfg"].get("image_size", 224))
    preprocess = {key: given[key] for key in ("mean", "std", "interpolation") if key in given}
    preprocess |= {"crop_pct": 1.0, "crop_mode": CROP_MODES[given.get("resize_mode", "shortest")]}
    preprocess["input_size"] = [3, *(size if isinstance(size, list) else [size, size])]
    return {"name": spec["name"], **spec, "preprocess": preprocess, "extra": {}}
