"""Search in embeddings of images, by a text or an image.

Shapes, by suffix: N images, D features.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from PIL import Image

from vmoe.data.images import Reading, load_image
from vmoe.data.texts import cut_rows, warn_once
from vmoe.evaluation.embeddings import Embeddings, read_embeddings
from vmoe.evaluation.features import image_features
from vmoe.evaluation.inference import evaluating
from vmoe.evaluation.loaded_model import load_model, weights_fingerprint
from vmoe.utils.config import ConfigError


class Hit(NamedTuple):
    """A found image."""

    score: float  # cosine
    path: str
    caption: str | None
    label: str | None


class SearchIndex:
    """The embeddings in a file of `vmoe-embed`, with the model that made them.

    Args:
        file: the file.
        checkpoint: the model; None: where it was when the embeddings were made.

    Raises:
        ValueError: a file or checkpoint that cannot be read.
        ConfigError: the checkpoint holds another model than the one that made the embeddings.
    """

    def __init__(self, file: str | Path, checkpoint: str | None = None, device: str = "auto") -> None:
        self.embeddings: Embeddings = read_embeddings(file)
        about = self.embeddings.about
        weights = Path(about["weights"]) if checkpoint is None else None
        if weights is not None and not weights.exists():
            raise ConfigError(f"the model of {file} is no longer at {weights}: say where, with --checkpoint")
        self.model = load_model(checkpoint or str(weights), device, about["precision"], weights=weights)
        if (sha256 := weights_fingerprint(self.model.weights)) != about["sha256"]:
            made = f"{about['model']} with SHA-256 {about['sha256'][:12]}"
            raise ConfigError(
                f"{file} was made by {made}, and {self.model.weights} has {sha256[:12]}: give that model as "
                "--checkpoint, or make the index again with vmoe-embed"
            )
        self._embeddings_ND = self.embeddings.embeddings_ND.astype(np.float32)
        # Once more, since float16 rounds the lengths.
        self._embeddings_ND /= np.linalg.norm(self._embeddings_ND, axis=1, keepdims=True).clip(1e-12)
        self._faiss = _faiss_index(self._embeddings_ND)

    def by_text(self, text: str, top: int = 10) -> list[Hit]:
        """The images most similar to a text; ValueError: it is empty, or the model is a classifier."""
        loaded = self.model
        if loaded.tokenizer is None:
            raise ValueError(f"{loaded.checkpoint} holds a classifier, which knows no texts: search with an image")
        if not text.strip():
            raise ValueError("the text to search for is empty")
        tokens_1L = loaded.tokenizer([text])
        if cut_rows(loaded.tokenizer, [text], tokens_1L):
            warn_once(f"the text has more than the model's {tokens_1L.shape[1]} tokens, and is cut")
        with evaluating(loaded.model, loaded.device, loaded.precision):
            query_1D = loaded.model.encode_text(tokens_1L.to(loaded.device), normalize=True)
        return self.nearest(query_1D[0].float().cpu().numpy(), top)

    def by_image(self, image: Image.Image | str | Path, top: int = 10) -> list[Hit]:
        """The images most similar to an image or a file; BadSample: it cannot be read."""
        loaded = self.model
        if not isinstance(image, Image.Image):
            image = load_image(image, reading=Reading(loaded.exif_orientation))
        with evaluating(loaded.model, loaded.device, loaded.precision):
            features_1D = image_features(loaded.model, loaded.transform(image)[None].to(loaded.device))
        return self.nearest(F.normalize(features_1D.float(), dim=1)[0].cpu().numpy(), top)

    def nearest(self, query_D: np.ndarray, top: int) -> list[Hit]:
        """The images whose embeddings have the largest cosine with a query of length 1.

        faiss finds them if it is installed, else a matrix multiplication; their scores differ by rounding (float32).
        """
        top, query_D = min(top, len(self._embeddings_ND)), query_D.astype(np.float32)
        if self._faiss is not None:
            scores, best = (rows[0] for rows in self._faiss.search(query_D[None], top))
        else:
            products_N = self._embeddings_ND @ query_D
            best = np.argsort(-products_N, kind="stable")[:top]
            scores = products_N[best]
        return [self._hit(index, score) for score, index in zip(scores.tolist(), best.tolist())]

    def _hit(self, index: int, score: float) -> Hit:
        found = self.embeddings
        texts = [None if values is None else values[index] for values in (found.captions, found.labels)]
        return Hit(score, found.paths[index], *texts)


def _faiss_index(embeddings_ND: np.ndarray):
    """faiss's exact index of inner products; None where faiss is not installed."""
    try:
        import faiss
    except ModuleNotFoundError:
        return None
    index = faiss.IndexFlatIP(embeddings_ND.shape[1])
    index.add(embeddings_ND)
    return index
