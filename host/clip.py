"""Learned words in the host's CLIP: a trigger word in a prompt becomes its learned rows.

The host's text models take vectors where a token id stands, each with a prompt weight of its own; so nothing
is written into the vocabulary, and any node that encodes text with the returned CLIP knows the triggers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import comfy.sd
import comfy.sd1_clip
import torch
from torch import Tensor

from ..modular_concepts.concept import Concept
from ..modular_concepts.errors import AdapterError
from ..modular_concepts.fitting import refuse_shared_triggers
from ..modular_concepts.tokens import caption_ids, learned_rows


def encode_prompt(clip: comfy.sd.CLIP, text: str, concepts: Sequence[Concept] = ()) -> list:
    """CONDITIONING of a prompt; the concepts' learned words stand for their rows."""
    refuse_shared_triggers(concepts)
    clip = with_tokens(clip, {word: rows for concept in concepts for word, rows in concept.tokens.items()})
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def with_tokens(clip: comfy.sd.CLIP, tokens: Mapping[str, Tensor]) -> comfy.sd.CLIP:
    """A clone of `clip` whose tokenizer knows the trigger words too; the weights are shared.

    tokens: trigger word -> (vectors, width) float32.  Where there are two text models, CLIP-L learns them.
    Raises AdapterError for a width that is not the text model's, and for a word that it knows otherwise.
    """
    if not tokens:
        return clip
    part = getattr(clip.tokenizer, "clip", "clip_l")
    stock = getattr(clip.tokenizer, part, None)
    if stock is None:
        raise AdapterError(
            f"the CLIP is a {type(clip.tokenizer).__name__}, whose prompts cannot hold learned words; "
            "load the text encoder of the base that the concept was trained on"
        )
    known: Mapping[str, Tensor] = {}
    if isinstance(stock, LearnedWords):
        stock, known = stock.stock, stock.tokens
    for word, rows in tokens.items():
        if word in known and not torch.equal(known[word], rows):
            raise AdapterError(f"{word} means another concept in this CLIP already; train one under another name")
    every = {**known, **tokens}
    for word, rows in every.items():
        if rows.dim() != 2:
            raise AdapterError(
                f"{word}: the word was learned for each layer apart, which prompts in the host cannot say"
            )
        if rows.shape[1] != stock.embedding_size:
            raise AdapterError(
                f"{word}: the learned tokens are {rows.shape[1]} wide, the text model's {stock.embedding_size}; "
                "they were trained on another base"
            )
    clone = clip.clone()
    clone.tokenizer = copy.copy(clip.tokenizer)
    setattr(clone.tokenizer, part, LearnedWords(stock, every))
    return clone


class LearnedWords:
    """An SDTokenizer of the host that reads trigger words as extra ids and hands on their rows instead.

    stock: the tokenizer without them; tokens: trigger word -> (vectors, width).
    """

    def __init__(self, stock: comfy.sd1_clip.SDTokenizer, tokens: Mapping[str, Tensor]):
        self.stock, self.tokens = stock, dict(tokens)
        self._reader, self._words = copy.copy(stock), stock.tokenizer
        self._reader.tokenizer = self._ids
        # CLIP's vocabulary has no capitals, and neither have the words that people are told to type.
        self._spelled = {word.lower(): rows for word, rows in tokens.items()}
        self._rows = learned_rows(self._spelled)
        self._vocab_size = max(stock.inv_vocab) + 1

    def __getattr__(self, name: str):
        return getattr(self.__dict__["_reader"], name)

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **settings) -> list[list[tuple]]:
        sections = self._reader.tokenize_with_weights(text, return_word_ids, **settings)
        return [[(self._vector(token), *rest) for token, *rest in section] for section in sections]

    def _ids(self, text: str) -> dict[str, list[int]]:
        first = self.stock.tokens_start
        bare = self._words("")["input_ids"]

        def inner(part: str) -> list[int]:
            ids = self._words(part)["input_ids"]
            return ids[first : len(ids) - (len(bare) - first)]

        ids = caption_ids(text.lower(), self._spelled, self._vocab_size, inner)
        return {"input_ids": [*bare[:first], *ids, *bare[first:]]}

    def _vector(self, token: int | Tensor) -> int | Tensor:
        learned = isinstance(token, int) and token >= self._vocab_size
        return self._rows[token - self._vocab_size] if learned else token
