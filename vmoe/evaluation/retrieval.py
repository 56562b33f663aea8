"""Image-text retrieval: recall@1/5/10 in both directions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Sequence

import torch
from torch import Tensor, nn

from vmoe.data import BadSample, EvalLoader, ImageDataset, LoaderConfig, eval_loader
from vmoe.data.texts import CutTexts, warn_once
from vmoe.evaluation.gather import gather_rows
from vmoe.evaluation.inference import evaluating
from vmoe.evaluation.metrics import ranks, share_within
from vmoe.evaluation.synchronized import Lockstep, equal_shares

logger = logging.getLogger("vmoe.evaluation")

CUTOFFS = (1, 5, 10)
TEXTS_PER_CALL = 256


def retrieval_recall(
    image_features_ID: Tensor, text_features_TD: Tensor, image_of_text_T: Tensor, rows_per_block: int = 1024
) -> dict[str, float]:
    """Recall@1/5/10 both ways.

    An image is found by its best caption, as usual with several captions per image; ties count as misses. Equal
    captions of different images therefore cost recall: they cannot be told apart.

    Args:
        image_features_ID: unit image features, I distinct images.
        text_features_TD: unit text features.
        image_of_text_T: long, the image of each text; every image must have one.
        rows_per_block: how many rows of the (I, T) score matrix are held at once.

    Returns:
        "image_to_text_recall@k" and "text_to_image_recall@k" as shares in 0..1.
    """
    num_images = len(image_features_ID)
    image_ranks, text_ranks = [], []
    for start in range(0, num_images, rows_per_block):
        scores_BT = image_features_ID[start : start + rows_per_block] @ text_features_TD.T
        image_B = torch.arange(start, start + len(scores_BT), device=scores_BT.device)
        own_BT = image_of_text_T[None, :] == image_B[:, None]
        best_B = scores_BT.masked_fill(~own_BT, float("-inf")).amax(dim=1)
        image_ranks.append(ranks(scores_BT, best_B, ~own_BT))
    for start in range(0, len(text_features_TD), rows_per_block):
        scores_BI = text_features_TD[start : start + rows_per_block] @ image_features_ID.T
        image_B = image_of_text_T[start : start + rows_per_block]
        wrong_BI = torch.arange(num_images, device=scores_BI.device)[None, :] != image_B[:, None]
        text_ranks.append(ranks(scores_BI, scores_BI.gather(1, image_B[:, None]).squeeze(1), wrong_BI))
    result = {}
    for direction, found in (("image_to_text", image_ranks), ("text_to_image", text_ranks)):
        for k in CUTOFFS:
            result[f"{direction}_recall@{k}"] = share_within(torch.cat(found), k)
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
    """Retrieval among pictures and their captions; every picture and every caption is encoded once.

    Args:
        model: has `encode_image(images, normalize)` and `encode_text(tokens, normalize)`; must be on `device`.
        tokenizer: list of texts -> tokens (B, L).
        loader: batches with "image" (B, 3, H, W) and "index" (B,), the picture's identity; see `retrieval_loader`.
        captions: all captions. One whose picture the loader leaves out, or which is empty, is not counted.
        image_of_caption: for each caption the "index" of its picture.
        device: where the model runs.
        precision: "float32", "bf16" or "fp16" (autocast around both encoders; scores are float32).

    Captions that are longer than the model's context are cut, with a warning that counts them.

    Returns:
        "image_to_text_recall@k", "text_to_image_recall@k" for k = 1, 5, 10, "num_images", "num_samples" (captions),
        "num_skipped" (captions left out).

    Raises:
        ValueError: there are no pairs.
        SharedError: one of several processes could not read its pictures.
    """
    image_rows, image_places = [], [torch.empty(0, dtype=torch.long)]
    text_rows, text_places = [], [torch.empty(0, dtype=torch.long)]
    with evaluating(model, device, precision):
        for batch in Lockstep(loader, model):
            features_BD = model.encode_image(batch["image"].to(device), normalize=True).float().cpu()
            if "index" in batch:  # else a blank one
                image_rows.append(features_BD)
                image_places.append(batch["index"])
        written = [place for place, caption in enumerate(captions) if caption.strip()]
        counting = CutTexts(tokenizer)
        calls = [written[start : start + TEXTS_PER_CALL] for start in range(0, len(written), TEXTS_PER_CALL)]
        for places, counts in equal_shares(calls, model):
            tokens_BL = (counting if counts else tokenizer)([captions[place] for place in places]).to(device)
            features_BD = model.encode_text(tokens_BL, normalize=True).float().cpu()
            if counts:
                text_rows.append(features_BD)
                text_places.append(torch.tensor(places))
    warn_once(counting.message("captions"))
    empty = torch.empty(0, 0)
    image_index_I, image = gather_rows(torch.cat(image_places), features=torch.cat(image_rows or [empty]))
    text_index_T, text = gather_rows(torch.cat(text_places), features=torch.cat(text_rows or [empty]))
    row_of_image = {index: row for row, index in enumerate(image_index_I.tolist())}
    image_of_text_T = torch.tensor([row_of_image.get(image_of_caption[place], -1) for place in text_index_T.tolist()])
    found_T = image_of_text_T >= 0
    if not found_T.any():
        raise ValueError(f"nothing to evaluate: the data set gave no pair ({len(captions)} were skipped)")
    with_caption_I = torch.zeros(len(image_index_I), dtype=torch.bool).index_fill_(0, image_of_text_T[found_T], True)
    new_row_I = with_caption_I.cumsum(0) - 1  # pictures whose captions are all empty leave the list
    result = retrieval_recall(
        image["features"][with_caption_I].to(device),
        text["features"][found_T].to(device),
        new_row_I[image_of_text_T[found_T]].to(device),
    )
    return {
        **result,
        "num_images": int(with_caption_I.sum()),
        "num_samples": int(found_T.sum()),
        "num_skipped": len(captions) - int(found_T.sum()),
    }


def retrieval_loader(
    dataset: ImageDataset, transform: Callable, config: LoaderConfig, device: torch.device | str | None = None
) -> tuple[EvalLoader, list[int]]:
    """What `evaluate_retrieval` needs of a data set with captions.

    Returns:
        A loader of its distinct pictures, and for each caption the place of its picture's (first) sample.

    Raises:
        BadSample: a caption is empty or missing, unless `config.on_bad` is "skip".
    """
    first: dict[Hashable, int] = {}
    image_of_caption = []
    ids = dataset.image_ids or range(len(dataset))
    for place, (identity, caption) in enumerate(zip(ids, dataset.captions, strict=True)):
        if not caption.strip():
            if config.on_bad != "skip":
                dataset[place]  # raises, and knows the file
                raise BadSample(str(identity), "empty caption")
            logger.warning("caption %d of %s is empty: left out", place, identity)
            image_of_caption.append(-1)
            continue
        image_of_caption.append(first.setdefault(identity, place))
    return eval_loader(dataset, transform, None, config, device, list(first.values())), image_of_caption
