"""Where texts say learned words: written down where a CLIP encodes, carried by each CONDITIONING, read by samplings.

A CLIP that knows words has an encoder that says, beside what it made of a text, where words stand in it; so any node
that encodes with it hands that on.  Nodes that put encoded texts together keep the notes of one of them alone: each
row that stands for a word is remembered too, and rows of a text are looked up by what they hold.
"""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.conds
import torch
from torch import Tensor, nn

NOTE = "modular_concepts_words"  # in a CONDITIONING: {"words": {trigger: places}, "rows": marks of all rows}
WORD = "modular_concepts_word"  # on a learned row as tokenizers hand it on: its trigger
ENCODE = "encode_token_weights"
MOST = 20_000  # rows that are remembered; a prompt has one or a few
_MARK = 16  # bytes

_remembered: OrderedDict[bytes, str] = OrderedDict()  # mark of an encoded row -> the trigger that it stands for


@dataclass(frozen=True)
class Wording:
    """What a conditioning of N texts says, each of `length` rows.

    places: trigger -> for each text the rows that stand for the word.
    mixed: whether texts were blended after they were encoded, so that words of some of them may not be here.
    """

    texts: int
    length: int
    places: Mapping[str, tuple[tuple[int, ...], ...]]
    mixed: bool = False

    @property
    def words(self) -> set[str]:
        return {trigger for trigger, places in self.places.items() if any(places)}


def telling(encoder: nn.Module) -> nn.Module:
    """A text encoder of the same parts, whose encoded texts come with a `NOTE`; `encoder` itself stays as it is."""
    if ENCODE in vars(encoder):
        return encoder

    def encode(tokens: Mapping[str, Sequence]) -> tuple:
        context, pooled, *more = getattr(encoder, ENCODE)(tokens)
        return context, pooled, {**(more[0] if more else {}), NOTE: _note(tokens, context)}

    teller: Any = copy.copy(encoder)  # a module's copy shares parts, weights and hooks
    setattr(teller, ENCODE, encode)
    return teller


def marked(row: Tensor, word: str) -> Tensor:
    """A learned row (width,) that says of itself which word it belongs to."""
    setattr(row, WORD, word)
    return row


def wording_of(context: Tensor, note: Mapping | None = None) -> Wording:
    """What a context (N, T, D) says: by the note of its encoding where its rows are those, else by what they hold.

    Where rows were changed since, words are taken to stand where the note has them.
    """
    every = [_marks(text) for text in context]
    rows = [] if note is None else _cut(note["rows"])
    mixed = note is not None and bool(context.any()) and not set(rows) <= {mark for marks in every for mark in marks}
    places: dict[str, list[set[int]]] = {}

    def add(word: str, text: int, place: int) -> None:
        places.setdefault(word, [set() for _ in every])[text].add(place)

    for text, marks in enumerate(every):
        noted = note is not None and (mixed or marks[: len(rows)] == rows)
        for word, at in note["words"].items() if note is not None and noted else ():
            for place in at:
                add(word, text, place)
        for place, mark in enumerate(marks):
            if _remembered.get(mark) and (mixed or not noted or place >= len(rows)):
                add(_remembered[mark], text, place)
    length = context.shape[1]
    ordered = {word: tuple(tuple(sorted(p for p in at if p < length)) for at in each) for word, each in places.items()}
    return Wording(len(every), length, ordered, mixed)


def _note(tokens: Mapping[str, Sequence], context: Tensor) -> dict:
    """Of one text (1, T, D) just encoded; its rows of words are remembered."""
    words: dict[str, set[int]] = {}
    for sections in tokens.values():
        for place, (token, *_) in enumerate(token for section in sections for token in section):
            if (word := getattr(token, WORD, None)) is not None and place < context.shape[1]:
                words.setdefault(word, set()).add(place)
    marks, word_at = _marks(context[0]), {place: word for word, at in words.items() for place in at}
    for place, mark in enumerate(marks):
        word = word_at.get(place, "")
        if word or mark in _remembered:
            # Rows that stand for a word here and for none there say nothing.
            _remembered[mark] = word if _remembered.get(mark, word) == word else ""
            _remembered.move_to_end(mark)
    while len(_remembered) > MOST:
        _remembered.popitem(last=False)
    return {"words": {word: sorted(at) for word, at in words.items()}, "rows": b"".join(marks)}


def _marks(rows: Tensor) -> list[bytes]:
    """Of each row (T, D) a digest of its numbers."""
    raw = rows.detach().to("cpu").contiguous().view(torch.uint8).numpy()
    return [hashlib.blake2b(row, digest_size=_MARK).digest() for row in raw]


def _cut(marks: bytes) -> list[bytes]:
    return [marks[first : first + _MARK] for first in range(0, len(marks), _MARK)]


class WordingCond(comfy.conds.CONDRegular):
    """`Wording` beside a context on its way to the network; of a batch of prompts, (wording, rows) of each in turn."""

    def __init__(self, cond: Wording, rows: int = 1):
        super().__init__(cond)
        self.rows = rows

    def process_cond(self, batch_size: int, **_more: object) -> WordingCond:
        return WordingCond(self.cond, batch_size)

    def can_concat(self, other: object) -> bool:
        return isinstance(other, WordingCond)

    def concat(self, others: Sequence[WordingCond]) -> tuple[tuple[Wording, int], ...]:
        return tuple((each.cond, each.rows) for each in (self, *others))

    def size(self) -> list[int]:
        return [1]
