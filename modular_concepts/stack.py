"""A stack: concepts in order, a strength with each.  The strength enters a merge once, from here."""

from __future__ import annotations

from collections.abc import Iterable

from .concept import Concept
from .text.learned_word import layers_of


class Stack(tuple[tuple[Concept, float], ...]):
    """Pairs (concept, strength); the papers' lambda or alpha is the strength, 1 is as trained."""

    __slots__ = ()

    @classmethod
    def of(cls, value: Concept | Iterable[tuple[Concept, float]] | None) -> Stack:
        """A concept at strength 1, pairs, or nothing."""
        if value is None:
            return cls()
        return value if isinstance(value, cls) else cls([(value, 1.0)] if isinstance(value, Concept) else value)

    @property
    def concepts(self) -> list[Concept]:
        return [concept for concept, _ in self]

    @property
    def strengths(self) -> list[float]:
        return [strength for _, strength in self]

    @property
    def layerwise(self) -> bool:
        """Whether any learned word has rows of its own for each cross-attention layer."""
        return any(layers_of(rows) for concept, _ in self for rows in concept.tokens.values())


NO_CONCEPTS = Stack()
