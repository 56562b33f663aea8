"""Texts that are longer than a model's context: found, counted and logged once."""

import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vmoe.utils.printable import printable

Tokenizer = Callable[[list[str]], torch.Tensor]
MAX_SHOWN = 80  # characters of a text in a message

logger = logging.getLogger("vmoe.data")


def knows_length(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer takes a `context_length`, as open_clip's do, and cuts texts at their end."""
    other_rule = getattr(tokenizer, "reduction_fn", None) or getattr(tokenizer, "tokenizer_mode", None)
    return not other_rule and "context_length" in inspect.signature(tokenizer).parameters


def cut_rows(tokenizer: Tokenizer, texts: Sequence[str], tokens_BL: torch.Tensor) -> list[int]:
    """Indices of the texts with more tokens than the tokenizer keeps in `tokens_BL`; none unless `knows_length`."""
    full = [row for row, last in enumerate(tokens_BL[:, -1].tolist()) if last != 0]  # 0: padding, of open_clip's CLIP
    if not full or not knows_length(tokenizer):
        return []
    # With a context of one more token the end of a text that fits stays where it is.
    length = tokens_BL.shape[1]
    longer_BL = tokenizer([texts[row] for row in full], context_length=length + 1)[:, :length]
    return [row for row, tokens_L in zip(full, longer_BL) if not tokens_L.equal(tokens_BL[row])]


@dataclass
class CutTexts:
    """A tokenizer that counts its texts, and those of them that are cut, of which it keeps the first."""

    tokenizer: Tokenizer
    num_texts: int = 0
    num_cut: int = 0
    first: str | None = None

    def __call__(self, texts: list[str]) -> torch.Tensor:
        tokens_BL = self.tokenizer(texts)
        cut = cut_rows(self.tokenizer, texts, tokens_BL)
        self.num_texts += len(texts)
        self.num_cut += len(cut)
        if cut and self.first is None:
            self.first = texts[cut[0]]
        return tokens_BL

    def message(self, what: str) -> str:
        """How many texts were cut; "" if none was."""
        return "" if self.first is None else cut_message(self.num_cut, self.num_texts, what, self.first)


def cut_message(num_cut: int, num_texts: int, what: str, first: str) -> str:
    """`3 of 10 captions are longer than ..., such as '...'`."""
    shown = first if len(first) <= MAX_SHOWN else f"{first[:MAX_SHOWN]}..."
    which = f"{num_cut} of {num_texts} {what}"
    return f"{which} are longer than the model's context and are cut, such as {printable(shown)!r}"


@functools.lru_cache(maxsize=1000)
def warn_once(message: str) -> None:
    """Logs a message the first time that it comes; "" is none."""
    if message:
        logger.warning("%s", message)
