"""Zero-shot classification: images against class names. The text side is open_clip's `build_zero_shot_classifier`.

Shapes, by suffix: B images, T templates, L tokens of a prompt, D width of the embeddings, C classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from vmoe.data import build_transform
from vmoe.data.images import DEFAULT, BadSample, Reading, file_errors, load_image, to_rgb
from vmoe.data.texts import CutTexts, cut_rows, knows_length, warn_once
from vmoe.evaluation.class_names import IMAGENET, is_published, known_sets, prompt_names, published_set, warn_of_order
from vmoe.evaluation.classification import predict
from vmoe.evaluation.inference import evaluating
from vmoe.evaluation.metrics import TIE_TOLERANCE
from vmoe.evaluation.synchronized import SynchronizedBatches
from vmoe.models.factory import in_chans, preprocess_config
from vmoe.utils.files import read_text

Template = str | Callable[[str], str]
Tokenizer = Callable[[list[str]], Tensor]  # texts -> tokens (B, L)
ImageLike = Image.Image | str | Path | Tensor
TEXTS_PER_CALL = 512


# --- class names and templates from settings ---


def _read_lines(setting: str, file: str, known: Sequence[str]) -> list[str]:
    """The non-empty lines of a UTF-8 text file, stripped; ValueError: there are none or it cannot be read."""
    if not Path(file).is_file():
        others = f"a list of texts, or one of {', '.join(known)}"
        raise ValueError(f"{setting} {file!r}: no such file; give a file with one per line, {others}")
    with file_errors(file):
        lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{file}: holds no line; expected one entry per line")
    return lines


def resolve_templates(templates: Sequence[Template] | str | Path | None) -> list[Callable[[str], str]]:
    """Prompt templates from a setting, as functions of the class name.

    The setting is a list of strings with `{}` for the class name (or functions, as in open_clip), or one such string;
    "openai_imagenet" or "simple_imagenet" (open_clip's); a set of `known_sets`; a text file with one per line; None for
    the bare class name. ValueError: an unreadable file, an empty list, or a template without `{}`.
    """
    if templates is None:
        templates = ["{}"]
    elif isinstance(templates, (str, Path)):
        templates = [templates] if "{}" in str(templates) else _named_templates(str(templates))
    for template in _listed("templates", templates):
        if not callable(template) and not (isinstance(template, str) and "{}" in template):
            raise ValueError(f"template {template!r} must be a text with {{}} for the class name, or a function")
    # Other braces than "{}" stay as they are.
    return [partial(one.replace, "{}") if isinstance(one, str) else one for one in templates]


def _named_templates(name: str) -> Sequence[Template]:
    if name == "simple_imagenet":
        from open_clip import SIMPLE_IMAGENET_TEMPLATES

        return SIMPLE_IMAGENET_TEMPLATES
    if name in ("openai_imagenet", *known_sets()):
        return published_set(IMAGENET if name == "openai_imagenet" else name).templates
    return _read_lines("templates", name, ["openai_imagenet", "simple_imagenet", *known_sets()])


def resolve_class_names(class_names: Sequence[str] | str | Path, classes: Sequence[str] | None = None) -> list[str]:
    """Class names from a setting: a list, a set of `known_sets`, or a text file with one per line.

    `classes` are those of the data, in the order of its labels; see `prompt_names`. ValueError: unreadable file, bad
    names, or another number of names than the data has classes.
    """
    if isinstance(class_names, str) and class_names in known_sets():
        return prompt_names(class_names, classes)
    is_file = isinstance(class_names, (str, Path))
    names = check_class_names(_read_lines("class_names", str(class_names), known_sets()) if is_file else class_names)
    if classes is not None and len(names) != len(classes):
        raise ValueError(f"class_names {class_names} has {len(names)} names, and the data {len(classes)} classes")
    if classes is not None:
        warn_of_order(names, classes)
    return names


def resolve_prompts(
    class_names: Sequence[str] | str, templates: Sequence[Template] | str | None, classes: Sequence[str] | None = None
) -> tuple[list[str], Sequence[Template] | str | None]:
    """Names from a setting, see `resolve_class_names`, and unless given the templates published with them."""
    if templates is None and isinstance(class_names, str) and class_names in known_sets():
        templates = class_names
    return resolve_class_names(class_names, classes), templates


def check_class_names(class_names: Sequence[str]) -> list[str]:
    """The names as a list; ValueError: no list of texts, no names, an empty one, or duplicates.

    Only a published list may have duplicates: ImageNet's, two "missile" and two "sunglasses".
    """
    names = _listed("class_names", class_names)
    for index, name in enumerate(names):
        if not isinstance(name, str):
            raise ValueError(f"class_names must be a list of texts, one for each class, got the entry {name!r}")
        if not name.strip():
            raise ValueError(f"class_names: name {index} is empty")
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated and not is_published(names):
        raise ValueError(f"class_names must be unique; given twice: {', '.join(map(repr, repeated[:5]))}")
    return names


def _listed(name: str, values: Sequence) -> list:
    """The values as a list; ValueError: none, a bare value, or a collection without order."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise ValueError(f"{name} must be a list of texts, got {values!r}; write a list")
    values = list(values)
    if not values:
        raise ValueError(f"{name} must hold at least one text")
    return values


# --- scores ---


def check_templates(tokenizer: Tokenizer, templates: Sequence[Template] | str | None) -> None:
    """Raises ValueError, which shows it, for a template with which no class name fits into the model's context."""
    if not knows_length(tokenizer):
        return
    templates = resolve_templates(templates)
    shortest = [template("a") for template in templates]
    tokens_TL = tokenizer(shortest)
    for row in cut_rows(tokenizer, shortest, tokens_TL):
        problem = f"with a class name it has more than the {tokens_TL.shape[1]} tokens that the model takes"
        raise ValueError(f"template {templates[row]('{}')!r} does not fit: {problem}; shorten it")


def _check_tokens_differ(tokenizer: Tokenizer, names: Sequence[str], templates: Sequence[Callable[[str], str]]) -> None:
    """Raises ValueError, which names both, if two names give the same tokens in all templates."""
    first: dict[bytes, str] = {}
    for name in names:
        tokens = tokenizer([template(name) for template in templates])
        other = first.setdefault(tokens.cpu().numpy().tobytes(), name)
        if other != name:
            raise ValueError(
                f"class names {other!r} and {name!r} are the same to the tokenizer (it may ignore case and spaces, and "
                "what is beyond its length), so every image would tie: give names that differ in their words"
            )


def feature_scorer(
    model: nn.Module,
    tokenizer: Tokenizer,
    class_names: Sequence[str],
    templates: Sequence[Template] | str | None,
    device: torch.device | str,
) -> Callable[[Tensor], Tensor]:
    """unit features (B, D) of images -> logit_scale · cosine (B, C) float32, with open_clip's class embeddings.

    Equal names, as ImageNet's published list has, would tie, and a tie is a miss for both classes. The later one
    therefore scores a little lower: the first of them is the answer, as with an argmax. Prompts longer than the context
    are cut, with a warning. ValueError: bad names or templates, a template that does not fit the model's context, or
    two names whose prompts are the same tokens.
    """
    from open_clip import build_zero_shot_classifier

    names, texts = check_class_names(class_names), resolve_templates(templates)
    check_templates(tokenizer, texts)
    if not is_published(names):
        _check_tokens_differ(tokenizer, names, texts)
    counting, different = CutTexts(tokenizer), list(dict.fromkeys(names))
    names_per_call = max(1, TEXTS_PER_CALL // len(texts))
    weights_DC = build_zero_shot_classifier(model, counting, different, texts, names_per_call, device).float()
    warn_once(counting.message("prompts"))
    weights_DC = weights_DC[:, [different.index(name) for name in names]]
    scale = model.logit_scale.detach().float().exp()
    repeats = [names[:index].count(name) for index, name in enumerate(names)]
    penalty_C = 4 * TIE_TOLERANCE * torch.tensor(repeats, device=weights_DC.device)

    def score(features_BD: Tensor) -> Tensor:
        with torch.autocast(features_BD.device.type, enabled=False):  # similarities need more than 8 bits
            scores_BC = scale * (features_BD.float() @ weights_DC)
            return scores_BC - scores_BC.abs().amax(dim=1, keepdim=True) * penalty_C

    return score


def evaluate_zero_shot(
    model: nn.Module,
    tokenizer: Tokenizer,
    loader: Iterable[dict[str, Tensor]],
    class_names: Sequence[str],
    templates: Sequence[Template] | str | None = ("{}",),
    *,
    device: torch.device | str,
    precision: str = "float32",
) -> dict[str, float | int]:
    """Zero-shot accuracy of a contrastive model; arguments, result and errors as of `evaluate_classification`.

    `model` has `encode_image(images, normalize)` and `encode_text(tokens, normalize)`; "label" (B,) of the loader's
    batches is an index into the unique `class_names`; `templates` as in :func:`resolve_templates`.
    """
    with evaluating(model, device, precision):
        score = feature_scorer(model, tokenizer, class_names, templates, device)
        batches = SynchronizedBatches(loader, model)
        predictions = predict(lambda x_B3HW: score(model.encode_image(x_B3HW, normalize=True)), batches, device=device)
    return predictions.results()


def zero_shot_classify(
    model: nn.Module,
    tokenizer: Tokenizer,
    images: ImageLike | Iterable[ImageLike],
    class_names: Sequence[str] | str,
    templates: Sequence[Template] | str | None = None,
    batch_size: int = 64,
    exif_orientation: bool = False,
) -> Tensor:
    """Probabilities of class names for images: softmax of `logit_scale · cosine`, as in CLIP (arXiv 2103.00020).

    Args:
        model: contrastive model (LIMoE, two-tower, or one of open_clip's); runs where its parameters are.
        tokenizer: list of texts -> tokens, as `vmoe.get_tokenizer` gives.
        images: a PIL image, a file's path, or a preprocessed tensor (3, H, W) or (B, 3, H, W); or a list or iterator
            of such images, also mixed. Images and files are preprocessed as the model expects, when they are needed.
        class_names: C unique names; or a published set or a file, see :func:`resolve_class_names`.
        templates: see :func:`resolve_templates`; None: those published with `class_names`, else the bare names.
        batch_size: images per forward pass; does not change the result.
        exif_orientation: whether EXIF orientation is applied to files; as the model was trained.

    Returns:
        Float32 (B, C) on the CPU, rows sum to 1. A single image gives B = 1, an empty list B = 0.

    Raises:
        ValueError, TypeError: bad names or templates, or an image that has another shape or cannot be read.
    """
    names, templates = resolve_prompts(class_names, templates)
    device = next(model.parameters()).device
    batches = image_batches(model, images, batch_size, Reading(exif_orientation))
    with evaluating(model, device):
        score = feature_scorer(model, tokenizer, names, templates, device)
        rows = [score(model.encode_image(images, normalize=True)).softmax(dim=1).cpu() for images in batches]
    return torch.cat([torch.empty(0, len(names)), *rows])


def image_batches(
    model: nn.Module, images: ImageLike | Iterable[ImageLike], batch_size: int, reading: Reading = DEFAULT
) -> Iterator[Tensor]:
    """Preprocessed images (B, 3, H, W) with the device and dtype of the model's parameters."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    parameter, channels = next(model.parameters()), in_chans(model)
    single = images.ndim != 4 if isinstance(images, Tensor) else isinstance(images, (Image.Image, str, Path))
    images = iter([images] if single else images)
    transform = cache(
        lambda: build_transform(preprocess_config(model), None)
    )  # not needed for tensors, which any model takes

    def prepared(image: ImageLike) -> Tensor:
        if isinstance(image, Tensor):
            if image.ndim != 3 or len(image) != channels:
                shapes = f"({channels}, H, W), or all of them (B, {channels}, H, W)"
                raise ValueError(f"an image's tensor must have the shape {shapes}, got {tuple(image.shape)}")
            return image
        if isinstance(image, Image.Image):
            return transform()(to_rgb(image))
        if not isinstance(image, (str, Path)):
            raise TypeError(f"images must be tensors, PIL images or paths, got {type(image).__name__}")
        try:
            return transform()(load_image(image, reading=reading))
        except BadSample as error:
            raise ValueError(str(error)) from error

    while batch := [prepared(image).to(parameter) for image in islice(images, batch_size)]:
        yield torch.stack(batch)
