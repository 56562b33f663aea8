"""Models as folders in the hubs' layouts: timm's for image models, open_clip's for image-text models.

`vmoe.create_model(pretrained=FOLDER)`, `timm.create_model("local-dir:FOLDER")` and, after `vmoe.open_clip.register()`,
`open_clip.create_model("local-dir:FOLDER")` read them, as they do from the hub by `hf-hub:ORG/NAME`.
"""

import json
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from timm.models._hub import save_config_for_hf
from timm.utils import unwrap_model
from torch import nn

from vmoe.models.factory import is_contrastive, save_pretrained
from vmoe.models.flops import count_parameters
from vmoe.models.hub_layout import ARCHITECTURE, OPEN_CLIP, TIMM, folder_settings
from vmoe.models.open_clip_models import model_config
from vmoe.models.preprocess import open_clip_preprocess, preprocess_config
from vmoe.models.serialization import METADATA_KEY, WeightsError, cannot_write, safetensors_metadata
from vmoe.models.spec import model_spec
from vmoe.moe import SparseMoE
from vmoe.utils.printable import first_line

CARD = "README.md"
ABOUT = "A model of the Python package vmoe."  # by which the card is known as ours


def save_hub_folder(
    model: nn.Module,
    folder: str | Path,
    metrics: Mapping[str, float] | None = None,
    license: str | None = None,
    extra: Mapping[str, Any] | None = None,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Writes weights, config and a model card as a folder that vmoe, timm or open_clip read; returns it.

    `metrics` and `license` (as the hub spells it, such as "apache-2.0") are for the card; `extra` are the JSON-able
    facts of `save_pretrained`, of which "class_names" are also timm's label names. A folder that holds such a model is
    replaced, any other one refused; before that `check` gets the finished folder, and may raise. A ValueError for a
    model that cannot be saved, or whose images open_clip cannot preprocess; a WeightsError if the folder cannot be
    written. Nothing is half-written.
    """
    model, folder, extra = unwrap_model(model), Path(folder).resolve(), dict(extra or {})
    image_text = is_contrastive(model)
    config, weights = OPEN_CLIP if image_text else TIMM
    spec = model_spec(model)
    if not image_text:
        extra |= _label_names(model, extra.get("class_names"))
    with _new_folder(folder) as draft:
        save_pretrained(model, draft / weights, extra)
        if image_text:
            preprocess = preprocess_config(model)
            size = preprocess["input_size"][1:]
            content = {
                "model_cfg": model_config(spec, getattr(model, "embed_dim", None), size, model.context_length),
                "preprocess_cfg": {**open_clip_preprocess(preprocess), "size": size},
            }
        else:
            # Preprocessing is beside them. Unlike timm.create_model's, None among them is not the default.
            args = {k: v for k, v in spec["kwargs"].items() if k != "pretrained_cfg_overlay" and v is not None}
            save_config_for_hf(model, draft / config, {"label_names": extra.get("class_names")}, args)
            content = json.loads((draft / config).read_text())
            content["pretrained_cfg"] |= {"license": license}
            if spec.keys() & {"upcycle", "experts"}:
                content |= {"architecture": ARCHITECTURE, "model_args": {"spec": spec}}
        (draft / config).write_text(json.dumps(content, indent=2) + "\n")
        card = _card(model, folder.name, spec, metrics or {}, license)
        (draft / CARD).write_text(card, encoding="utf-8")
        if check is not None:
            check(draft)
    return folder


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Add model",
    **card: Any,
) -> Any:
    """Uploads `save_hub_folder(model, ..., **card)` to a repository, which is made if it does not exist, and returns
    what huggingface_hub does. A model card that is there stays. A ValueError says why it could not be uploaded."""
    from huggingface_hub import HfApi

    with TemporaryDirectory() as parent:
        folder = save_hub_folder(model, Path(parent, repo_id.rpartition("/")[2]), **card)
        try:
            api = HfApi(token=token, library_name="vmoe")
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            text = (folder / CARD).read_text(encoding="utf-8").replace(f"local-dir:{folder.name}", f"hf-hub:{repo_id}")
            (folder / CARD).write_text(text, encoding="utf-8")
            kept = [CARD] if api.file_exists(repo_id, CARD, revision=revision) else None
            about = {"revision": revision, "create_pr": create_pr, "commit_message": commit_message}
            return api.upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=kept, **about)
        except Exception as error:  # no network, no token, no right to write, a name that is none
            raise ValueError(f"{repo_id!r} cannot be uploaded to the hub: {first_line(error)}") from error


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder, which replaces `folder` when the block ends without an error."""
    if folder.exists() and not _is_ours(folder):
        raise WeightsError(f"{folder} exists and holds something else than a model of vmoe: give a new folder")
    draft, old = (folder.with_name(f".{folder.name}.{secrets.token_hex(6)}") for _ in range(2))
    try:
        draft.mkdir(parents=True)
        yield draft
        if folder.exists():
            folder.rename(old)
        draft.rename(folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        for each in (draft, old):
            shutil.rmtree(each, ignore_errors=True)


def _is_ours(folder: Path) -> bool:
    """An empty folder, or one that `save_hub_folder` wrote and nobody added to."""
    if not folder.is_dir():
        return False
    names = {file.name for file in folder.iterdir()}
    weights = next((weights for config, weights in (TIMM, OPEN_CLIP) if names == {config, weights, CARD}), None)
    if weights is None:
        return not names
    try:
        card = (folder / CARD).read_text(encoding="utf-8")
        settings = folder_settings(folder / weights)
        return ABOUT in card and settings is not None and METADATA_KEY in safetensors_metadata(folder / weights)
    except (OSError, ValueError):  # a file that cannot be read is not ours either
        return False


def _label_names(model: nn.Module, names: Any) -> dict[str, list[str]]:
    """The names of a classifier's classes, else those that timm gave it, as "class_names" if there are any."""
    if names is None:
        names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
        fits = names and len(names) == model.num_classes and not isinstance(names, Mapping)
        return {"class_names": list(names)} if fits else {}
    if not isinstance(names, (list, tuple)) or len(names) != model.num_classes:
        given = len(names) if isinstance(names, (list, tuple)) else repr(names)
        raise ValueError(
            f"class_names in extra must be a list of a name for each of the model's {model.num_classes} classes, got "
            f"{given}; correct it or leave it out"
        )
    return {"class_names": list(names)}


def _card(model: nn.Module, name: str, spec: dict, metrics: Mapping[str, float], license: str | None) -> str:
    """The text of README.md: sizes, routing, metrics, how to load; its head is what the hub reads."""
    from huggingface_hub import ModelCard, ModelCardData

    image_text = is_contrastive(model)
    data = ModelCardData(
        license=license,
        library_name="open_clip" if image_text else "timm",
        pipeline_tag="zero-shot-image-classification" if image_text else "image-classification",
        tags=["mixture-of-experts", "vmoe"],
    )
    total, active = count_parameters(model)
    about = {
        "architecture": f"`{spec['name']}`{', upcycled' * ('upcycle' in spec)}",
        "image size": " × ".join(map(str, preprocess_config(model)["input_size"][1:])),
        "parameters": f"{total:,}",
        "active parameters of a token": f"{active:,}",
        "license": license or "not given",
    }
    text = f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n{ABOUT}\n\n" + _table(about)
    if layers := [layer for layer in model.modules() if isinstance(layer, SparseMoE)]:
        text += f"\n## Routing\n\nSparse layers: {len(layers)}\n\n" + _table(_routing(layers[0]))
    if metrics:
        shown = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in metrics.items()}
        text += "\n## Metrics\n\n" + _table(shown)
    library = OPEN_CLIP_CODE if image_text else TIMM_CODE
    return str(ModelCard(text + LOADING.replace("{library}", library).replace("{source}", f"local-dir:{name}")))


LOADING = """
## Use

```python
import vmoe

model, _, transform = vmoe.create_model_and_transforms(pretrained="{source}")
```

or

```python
{library}
```
"""
TIMM_CODE = 'import timm, vmoe\n\nmodel = timm.create_model("{source}", pretrained=True)'
OPEN_CLIP_CODE = """import open_clip, vmoe.open_clip

vmoe.open_clip.register()
model, _, transform = open_clip.create_model_and_transforms("{source}")
tokenizer = open_clip.get_tokenizer("{source}")"""


def _routing(layer: SparseMoE) -> dict[str, str]:
    """A layer's settings that are not the defaults, and those that every reader looks for."""
    always = {"router", "num_experts", "num_selected_experts", "capacity_factor"}
    return {
        field.name: f"`{value}`"
        for field in fields(layer.settings)
        if (value := getattr(layer.settings, field.name)) != field.default or field.name in always
    }


def _table(rows: Mapping[str, object]) -> str:
    """Two columns. A line break or a bar in a cell would begin another row or cell."""
    cells = [
        [" ".join(str(each).split()).replace("\\", "\\\\").replace("|", "\\|") for each in row] for row in rows.items()
    ]
    return "| | |\n| --- | --- |\n" + "".join(f"| {key} | {value} |\n" for key, value in cells)
