"""Image-text retrieval: recall@1/5/10 in both directions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Sequence

import torch
from torch import Tensor, nn

from vmoe.data import BadSample, EvalLoader, ImageDataset, LoaderConfig, eval_loader
from vmoe.data.texts import CutTexts, warn_once
from vmoe.evaluation.inference import evaluating
from vmoe.evaluation.metrics import ranks, share_within
from vmoe.evaluation.synchronized import Rows, SynchronizedBatches, equal_shares

logger = logging.getLogger("vmoe.evaluation")

TEXTS_PER_CALL = 256
RECALL_NAMES = [f"{way}_recall@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]


def retrieval_recall(
    image_features_ID: Tensor, text_features_TD: Tensor, image_of_text_T: Tensor, rows_per_block: int = 1024
) -> dict[str, float]:
    """Recall@1/5/10 both ways, {"image_to_text_recall@k", "text_to_image_recall@k"} as shares in 0..1.

    An image is found by its best caption; ties, such as equal captions of different images, are misses. Features are
    unit vectors; `image_of_text_T` is the image of each text, and every image must have one.
    """
    image_I = torch.arange(len(image_features_ID), device=image_features_ID.device)
    images, texts = (image_features_ID, image_I), (text_features_TD, image_of_text_T)
    result = {}
    for direction, queries, answers in (("image_to_text", images, texts), ("text_to_image", texts, images)):
        blocks = zip(*(each.split(rows_per_block) for each in queries), strict=True)
        rank_N = torch.cat([ranks(rows @ answers[0].T, image_B[:, None] == answers[1]) for rows, image_B in blocks])
        result |= {f"{direction}_recall@{k}": share_within(rank_N, k) for k in (1, 5, 10)}
    return result


def evaluate_retrieval(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    loader: Iterable[dict[str, Tensor]],
    captions: Sequence[str],
    image_of_caption: Sequence[int],
    *,
    device: torch.device | str,
    precision: str = "float32",
) -> dict[str, float | int]:
    """Retrieval among images and their captions; those longer than the model's context are cut, with a warning.

    Args:
        model, tokenizer, device, precision: see `vmoe.evaluation.evaluate_zero_shot`, also for the errors.
        loader: batches with "image" (B, 3, H, W) and "index" (B,), the image's identity; see `retrieval_loader`.
        captions: all captions. One whose image the loader skips, or which is empty, is not counted.
        image_of_caption: for each caption the "index" of its image.

    Returns:
        The recalls, "num_images", "num_samples" (captions), "num_skipped" (captions).
    """
    image_rows, text_rows = Rows(), Rows()
    with evaluating(model, device, precision):
        for batch in SynchronizedBatches(loader, model):
            features_BD = model.encode_image(batch["image"].to(device), normalize=True).float()
            if "index" in batch:  # else a blank one
                image_rows.add(batch["index"], features=features_BD)
        nonempty = [index for index, caption in enumerate(captions) if caption.strip()]
        counting = CutTexts(tokenizer)
        calls = [nonempty[start : start + TEXTS_PER_CALL] for start in range(0, len(nonempty), TEXTS_PER_CALL)]
        for call, counts in equal_shares(calls, model):
            tokens_BL = (counting if counts else tokenizer)([captions[index] for index in call]).to(device)
            features_BD = model.encode_text(tokens_BL, normalize=True).float()
            if counts:
                text_rows.add(torch.tensor(call), features=features_BD)
    warn_once(counting.message("captions"))
    (image_index_I, images), (text_index_T, texts) = image_rows.gather(), text_rows.gather()
    row_of_image = {index: row for row, index in enumerate(image_index_I.tolist())}
    image_of_text_T = torch.tensor([row_of_image.get(image_of_caption[index], -1) for index in text_index_T.tolist()])
    found_T = image_of_text_T >= 0
    if not found_T.any():
        raise ValueError(f"nothing to evaluate: the data set gave no pair ({len(captions)} were skipped)")
    # Images whose captions are all empty are no candidates.
    rows_with_caption, image_of_text_T = image_of_text_T[found_T].unique(return_inverse=True)
    features = images["features"][rows_with_caption], texts["features"][found_T]
    result = retrieval_recall(*(tensor.to(device) for tensor in (*features, image_of_text_T)))
    num_samples = int(found_T.sum())
    counts = {"num_samples": num_samples, "num_skipped": len(captions) - num_samples}
    return {**result, "num_images": len(rows_with_caption), **counts}


def retrieval_loader(
    dataset: ImageDataset, transform: Callable, config: LoaderConfig, device: torch.device | str | None = None
) -> tuple[EvalLoader, list[int]]:
    """A loader of the distinct images of a data set, and for each caption the index of its image's (first) sample.

    BadSample: a caption is empty or missing, unless `config.on_bad` is "skip".
    """
    first: dict[Hashable, int] = {}
    image_of_caption = []
    ids = dataset.image_ids or range(len(dataset))
    for index, (identity, caption) in enumerate(zip(ids, dataset.captions, strict=True)):
        if not caption.strip():
            if config.on_bad != "skip":
                dataset[index]  # raises, and knows the file
                raise BadSample(str(identity), "empty caption")
            logger.warning("caption %d of %s is empty: skipped", index, identity)
            image_of_caption.append(-1)
            continue
        image_of_caption.append(first.setdefault(identity, index))
    return eval_loader(dataset, transform, None, config, device, list(first.values())), image_of_caption
