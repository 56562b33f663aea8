"""Word pieces as a tokenizer cuts them, in readable form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def word_decoder(tokenizer: Any) -> Callable[[Sequence[int]], list[str]]:
    """A function that writes each token id as text, by the tokenizer's own decoding.

    A piece of open_clip's tokenizer that does not end its word gets an ellipsis ("sky…", "scrap…", "ers"), so that it
    is not taken for the word.

    Args:
        tokenizer: one of open_clip's, or one of Hugging Face's.

    Raises:
        ValueError: the tokenizer cannot decode.
    """
    inner = tokenizer if hasattr(tokenizer, "decode") else getattr(tokenizer, "tokenizer", None)
    if not hasattr(inner, "decode"):
        raise ValueError(f"{type(tokenizer).__name__} has no decode(): the words of its texts cannot be named")
    special = set(getattr(inner, "all_special_ids", ()))
    symbols = getattr(inner, "decoder", None)  # of open_clip's own tokenizer: {id: symbol}
    known: dict[int, str] = {}

    def name(token: int) -> str:
        text = inner.decode([token]).strip() or f"token {token}"
        goes_on = token not in special and isinstance(symbols, dict) and not symbols[token].endswith("</w>")
        return f"{text}…" if goes_on else text

    def decode(tokens: Sequence[int]) -> list[str]:
        for token in tokens:
            if token not in known:
                known[token] = name(token)
        return [known[token] for token in tokens]

    return decode
