"""What the text model makes of captions; of those that training cannot change, once.

Without adapters on the text model, only captions with a trigger word change from step to step. The others, of
class pictures and empty ones, are read each alone, so that a resumed training has the very same features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .problem import Problem


class TextFeatures:
    """captions -> context, for one training; `tokens` are its learned rows."""

    def __init__(self, problem: Problem, tokens: Mapping[str, Tensor], trained: bool):
        """trained: whether the text model's own layers learn."""
        self.encode, self.tokens = problem.base.context, tokens
        texts = {"", *problem.examples.captions, *(problem.prior.captions if problem.prior else ())}
        alive = {text for text in texts if trained or self.says_trigger([text])}
        self.fixed = texts - alive
        self.kept: dict[str, Any] = {}

    def says_trigger(self, captions: Sequence[str]) -> bool:
        """Whether any of the captions has a learned word in it."""
        return any(word.lower() in caption.lower() for word in self.tokens for caption in captions)

    def __call__(self, captions: Sequence[str]) -> Any:
        alive = [caption for caption in captions if caption not in self.fixed]
        if len(alive) == len(captions):
            return self.encode(list(captions), self.tokens)
        fresh = iter(_rows(self.encode(alive, self.tokens), len(alive)) if alive else ())
        rows = [self._kept(caption) if caption in self.fixed else next(fresh) for caption in captions]
        if not all(isinstance(row, Tensor | tuple) for row in rows) or len(set(map(_shapes, rows))) > 1:
            # A long caption lengthens the others that are read beside it.
            return self.encode(list(captions), self.tokens)
        return _like(rows[0], [torch.cat(parts) for parts in zip(*map(_parts, rows), strict=True)])

    def _kept(self, caption: str) -> Any:
        if caption not in self.kept:
            with torch.no_grad():
                self.kept[caption] = self.encode([caption], self.tokens)
        return self.kept[caption]


def _rows(context: Any, count: int) -> list[Any]:
    return [_like(context, [part[row : row + 1] for part in _parts(context)]) for row in range(count)]


def _parts(context: Any) -> tuple[Tensor, ...]:
    """A context is a tensor, or a named tuple of tensors, with the batch first."""
    return (context,) if isinstance(context, Tensor) else tuple(context)


def _shapes(context: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(part.shape[1:] for part in _parts(context))


def _like(context: Any, parts: Sequence[Tensor]) -> Any:
    return parts[0] if isinstance(context, Tensor) else type(context)(*parts)
