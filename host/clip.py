"""Learned words in the host's CLIP: a trigger word in a prompt becomes its learned rows.

The host's text models take vectors where a token id stands, each with a prompt weight of its own; so nothing
is written into the vocabulary, and any node that encodes text with the returned CLIP knows the triggers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import comfy.sd
import comfy.sd1_clip
from torch import Tensor

from ..modular_concepts.errors import AdapterError
from ..modular_concepts.tokens import caption_ids, learned_rows


def with_tokens(clip: comfy.sd.CLIP, tokens: Mapping[str, Tensor]) -> comfy.sd.CLIP:
    """A clone of `clip` whose tokenizer knows the trigger words; the weights are shared.

    tokens: trigger word -> (vectors, width) float32.
    Raises AdapterError for a width that is not the text model's.
    """
    if not tokens:
        return clip
    part = clip.tokenizer.clip
    stock = getattr(clip.tokenizer, part)
    rows = learned_rows(tokens)
    if rows.shape[1] != stock.embedding_size:
        raise AdapterError(
            f"the learned tokens are {rows.shape[1]} wide, the text model's {stock.embedding_size}; "
            "they were trained on another base"
        )
    clone = clip.clone()
    clone.tokenizer = copy.copy(clip.tokenizer)
    setattr(clone.tokenizer, part, LearnedWords(stock, tokens, rows))
    return clone


class LearnedWords:
    """An SDTokenizer of the host that reads trigger words as extra ids and hands on their rows instead."""

    def __init__(self, stock: comfy.sd1_clip.SDTokenizer, tokens: Mapping[str, Tensor], rows: Tensor):
        self._stock, self._words = copy.copy(stock), stock.tokenizer
        self._stock.tokenizer = self._ids
        self._tokens, self._rows = tokens, rows
        self._vocab_size = max(stock.inv_vocab) + 1

    def __getattr__(self, name: str):
        return getattr(self.__dict__["_stock"], name)

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **settings) -> list[list[tuple]]:
        sections = self._stock.tokenize_with_weights(text, return_word_ids, **settings)
        return [[(self._vector(token), *rest) for token, *rest in section] for section in sections]

    def _ids(self, text: str) -> dict[str, list[int]]:
        first = self._stock.tokens_start
        bare = self._words("")["input_ids"]

        def inner(part: str) -> list[int]:
            ids = self._words(part)["input_ids"]
            return ids[first : len(ids) - (len(bare) - first)]

        return {
            "input_ids": [
                *bare[:first],
                *caption_ids(text, self._tokens, self._vocab_size, inner),
                *bare[first:],
            ]
        }

    def _vector(self, token: int | Tensor) -> int | Tensor:
        learned = isinstance(token, int) and token >= self._vocab_size
        return self._rows[token - self._vocab_size] if learned else token
