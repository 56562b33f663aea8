"""Zero-shot classification: pictures against class names. The text side is open_clip's `build_zero_shot_classifier`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from vmoe.data.images import BadSample, load_image, to_rgb
from vmoe.evaluation.classification import predict
from vmoe.evaluation.inference import evaluating

Template = str | Callable[[str], str]
Picture = Image.Image | str | Path
TEXTS_PER_CALL = 512


def read_lines(file: str | Path) -> list[str]:
    """The non-empty lines of a UTF-8 text file (class names or templates, one per line), stripped.

    Raises:
        ValueError: the file is missing, not UTF-8, or has no line.
    """
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read as UTF-8 text ({error})") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{file}: holds no line; expected one entry per line")
    return lines


def resolve_templates(templates: Sequence[Template] | str | None) -> list[Template]:
    """Prompt templates from a setting.

    Args:
        templates: a list of strings with `{}` for the class name (or functions, as in open_clip); "openai_imagenet"
            or "simple_imagenet" for open_clip's lists; a text file with one per line; None: the bare class name.

    Raises:
        ValueError: unreadable file, empty list, or a template without `{}`.
    """
    if templates is None:
        return ["{}"]
    if isinstance(templates, str):
        import open_clip

        shipped = {
            "openai_imagenet": open_clip.OPENAI_IMAGENET_TEMPLATES,
            "simple_imagenet": open_clip.SIMPLE_IMAGENET_TEMPLATES,
        }
        if "{}" in templates:
            templates = [templates]
        elif templates in shipped:
            templates = shipped[templates]
        elif not Path(templates).is_file():
            raise ValueError(
                f"templates {templates!r}: no such file; give a file, a list of texts with {{}}, "
                f"or one of {', '.join(shipped)}"
            )
        else:
            templates = read_lines(templates)
    if not templates:
        raise ValueError("templates must hold at least one text")
    for template in templates:
        if isinstance(template, str) and "{}" not in template:
            raise ValueError(f"template {template!r} must contain {{}}, the place of the class name")
    # open_clip formats all or calls all; braces in a user's text other than {} stay as they are
    return [_filler(t) if isinstance(t, str) else t for t in templates]


def _filler(template: str) -> Callable[[str], str]:
    return lambda name: template.replace("{}", name)


def check_class_names(class_names: Sequence[str]) -> list[str]:
    """The names as a list.

    Raises:
        ValueError: no names, an empty one, or duplicates (two equal classes cannot be told apart).
    """
    names = list(class_names)
    if not names:
        raise ValueError("class_names must hold at least one name")
    if any(not name.strip() for name in names):
        raise ValueError(f"class_names: name {next(i for i, n in enumerate(names) if not n.strip())} is empty")
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"class_names must be unique; given twice: {', '.join(map(repr, repeated[:5]))}")
    return names


def encode_classes(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    class_names: Sequence[str],
    templates: Sequence[Template] | str | None,
    device: torch.device | str,
) -> Tensor:
    """Class embeddings (D, C) float32, unit columns: the mean over the templates, by open_clip's own function."""
    from open_clip import build_zero_shot_classifier

    names, texts = check_class_names(class_names), resolve_templates(templates)
    weights_DC = build_zero_shot_classifier(
        model,
        tokenizer,
        names,
        texts,
        num_classes_per_batch=max(1, TEXTS_PER_CALL // len(texts)),
        device=device,
    )
    return weights_DC.float()


def evaluate_zero_shot(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    loader: Iterable[dict[str, Tensor]],
    class_names: Sequence[str],
    templates: Sequence[Template] | str | None = ("{}",),
    *,
    device: torch.device | str,
    precision: str = "float32",
) -> dict[str, float | int]:
    """Zero-shot accuracy of a contrastive model.

    Args:
        model: has `encode_image(images, normalize)` and `encode_text(tokens, normalize)`; must be on `device`.
        tokenizer: list of B texts -> tokens (B, L).
        loader: batches with "image" (B, 3, H, W) and "label" (B,), an index into `class_names`.
        class_names: C unique names.
        templates: see :func:`resolve_templates`.
        device: where the model runs.
        precision: "float32", "bf16" or "fp16" (autocast around both encoders; scores are float32).

    Returns:
        See `evaluate_classification`; the probabilities behind "ece" are those of `zero_shot_classify`.

    Raises:
        ValueError: bad names or templates, a label outside the names, or no samples.
    """
    with evaluating(model, device, precision):
        weights_DC = encode_classes(model, tokenizer, class_names, templates, device)
        return predict(class_scorer(model, weights_DC), loader, device=device).results()


def class_scorer(model: nn.Module, weights_DC: Tensor) -> Callable[[Tensor], Tensor]:
    """images (B, 3, H, W) -> logit_scale · cosine (B, C) float32, with class embeddings as `encode_classes` gives."""
    scale = model.logit_scale.detach().float().exp()

    def score(images: Tensor) -> Tensor:
        features_BD = model.encode_image(images, normalize=True).float()
        with torch.autocast(images.device.type, enabled=False):
            return scale * (features_BD @ weights_DC)

    return score


def zero_shot_classify(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    images: Tensor | Picture | Sequence[Picture],
    class_names: Sequence[str],
    templates: Sequence[Template] | str | None = None,
    batch_size: int = 64,
) -> Tensor:
    """Probabilities of class names for pictures: softmax of `logit_scale · cosine`, as CLIP does (arXiv 2103.00020).

    Args:
        model: contrastive model (LIMoE, two-tower, or one of open_clip's); runs where its parameters are.
        tokenizer: list of texts -> tokens, as `vmoe.get_tokenizer` gives.
        images: preprocessed tensor (B, 3, H, W) or (3, H, W); or a PIL image or file path, or a list of them, which
            are preprocessed as the model wants it.
        class_names: C unique names.
        templates: see :func:`resolve_templates`; None: the bare names.
        batch_size: pictures per forward pass; does not change the result.

    Returns:
        Float32 (B, C) on the CPU, rows sum to 1. A single picture gives B = 1.

    Raises:
        ValueError: bad names or templates, or a picture that cannot be read (the file is named).
    """
    parameter = next(model.parameters())
    scale = model.logit_scale.detach().float().exp()
    rows = []
    with evaluating(model, parameter.device):
        weights_DC = encode_classes(model, tokenizer, class_names, templates, parameter.device)
        for batch_B3HW in _image_batches(model, images, batch_size):
            features_BD = model.encode_image(batch_B3HW.to(parameter.device, parameter.dtype), normalize=True).float()
            rows.append((scale * features_BD @ weights_DC).softmax(dim=1).cpu())
    return torch.cat(rows) if rows else torch.empty(0, len(class_names))


def _image_batches(model: nn.Module, images: Tensor | Picture | Sequence[Picture], batch_size: int) -> Iterator[Tensor]:
    """Preprocessed pictures in batches; files are read as they are needed."""
    if isinstance(images, Tensor):
        if images.ndim not in (3, 4):
            raise ValueError(f"images must have the shape (B, 3, H, W) or (3, H, W), got {tuple(images.shape)}")
        yield from (images if images.ndim == 4 else images[None]).split(batch_size)
        return
    transform = _evaluation_transform(model)
    pictures = [images] if isinstance(images, (Image.Image, str, Path)) else list(images)
    for start in range(0, len(pictures), batch_size):
        yield torch.stack([transform(_read(picture)) for picture in pictures[start : start + batch_size]])


def _evaluation_transform(model: nn.Module) -> Callable[[Image.Image], Tensor]:
    """PIL picture -> (3, H, W), as the model wants it."""
    own = getattr(getattr(model, "visual", None), "preprocess_cfg", None)
    if own is not None:  # a model of open_clip's
        from open_clip.transform import PreprocessCfg, image_transform_v2

        return image_transform_v2(PreprocessCfg(**own), is_train=False)
    from vmoe.data import build_transform
    from vmoe.models.factory import preprocess_config

    return build_transform(preprocess_config(model), None)


def _read(picture: Picture) -> Image.Image:
    try:
        return to_rgb(picture) if isinstance(picture, Image.Image) else load_image(picture)
    except BadSample as error:
        raise ValueError(str(error)) from error
