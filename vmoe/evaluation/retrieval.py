"""Image-text retrieval: recall@1/5/10 in both directions."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import Tensor, nn

from vmoe.data.dataset import ImageDataset
from vmoe.data.loaders import EvalLoader
from vmoe.data.pairs import PairsFile
from vmoe.evaluation.inference import evaluating
from vmoe.evaluation.metrics import ranks, share_within

CUTOFFS = (1, 5, 10)


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
    loader: Iterable[dict[str, Tensor]],
    *,
    device: torch.device | str,
    precision: str = "float32",
    image_ids: Sequence[Hashable] | None = None,
) -> dict[str, float | int]:
    """Retrieval on image-caption pairs.

    Args:
        model: has `encode_image(images, normalize)` and `encode_text(tokens, normalize)`; must be on `device`.
        loader: batches with "image" (B, 3, H, W), "text" (B, L) and "index" (B,), the pair's place in the data set.
        device: where the model runs.
        precision: "float32", "bf16" or "fp16" (autocast around both encoders; scores are float32).
        image_ids: for every pair of the data set the identity of its image, such as the file's path: pairs with equal
            ids are captions of one image. None: see :func:`identify_images`.

    Returns:
        "image_to_text_recall@k", "text_to_image_recall@k" for k = 1, 5, 10, "num_images", "num_samples" (pairs),
        "num_skipped".

    Raises:
        ValueError: there are no pairs.
    """
    if image_ids is None and isinstance(loader, EvalLoader):
        image_ids = identify_images(loader.reader.dataset)
    place_of: dict[Hashable, int] = {}
    image_rows, text_rows, image_of_text = [], [], []
    with evaluating(model, device, precision):
        for batch in loader:
            new = []
            for row, index in enumerate(batch["index"].tolist()):
                identity = index if image_ids is None else image_ids[index]
                if identity not in place_of:
                    place_of[identity] = len(place_of)
                    new.append(row)
                image_of_text.append(place_of[identity])
            if new:
                image_rows.append(model.encode_image(batch["image"][new].to(device), normalize=True).float())
            text_rows.append(model.encode_text(batch["text"].to(device), normalize=True).float())
        num_skipped = int(getattr(loader, "num_skipped", 0))
        if not text_rows:
            raise ValueError(f"nothing to evaluate: the data set gave no pair ({num_skipped} were skipped)")
        with torch.autocast(torch.device(device).type, enabled=False):
            image_of_text_T = torch.tensor(image_of_text, device=text_rows[0].device)
            result = retrieval_recall(torch.cat(image_rows), torch.cat(text_rows), image_of_text_T)
    return {
        **result,
        "num_images": len(place_of),
        "num_samples": len(image_of_text),
        "num_skipped": num_skipped,
    }


def identify_images(dataset: ImageDataset) -> list[str] | None:
    """For every pair of a file of pairs the path of its image; None for other data, where each pair has its own."""
    if isinstance(dataset, PairsFile):
        return [os.path.normpath(dataset.root / image) for image, _ in dataset.pairs]
    return None
