"""A learned word: the trigger that calls it, and what text models read where it stands in a prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


def layers_of(rows: Tensor) -> int:
    """For how many cross-attention layers a word's rows were learned apart; 0 where all of them read the same.

    rows: (vectors, width), or (layers, vectors, width) layer-wise.
    """
    return len(rows) if rows.dim() == 3 else 0


@dataclass(frozen=True, eq=False)
class LearnedWord:
    """One trigger word of a concept, as loud as the concept is.

    rows: (vectors, width) float32, or (layers, vectors, width) with rows of its own for each cross-attention layer.
    class_word: what text models read that cannot learn words, and what the rows fade to.
    learned: the rows at full strength, by which a word is told from another of its name; None where `rows` are those.
    """

    trigger: str
    rows: Tensor
    class_word: str = ""
    learned: Tensor | None = None

    @property
    def at_full_strength(self) -> Tensor:
        return self.rows if self.learned is None else self.learned

    @property
    def layers(self) -> int:
        """0 where all layers read the same."""
        return layers_of(self.rows)

    @property
    def width(self) -> int:
        return self.rows.shape[-1]

    def faded(self, share: float, class_rows: Tensor) -> LearnedWord:
        """class word + share (learned - class word), for a share of 0..1.

        class_rows: (k, width) of the class word, taken in turn; of none, or of another width, nothing fades.
        """
        rows = self.at_full_strength
        if not len(class_rows) or class_rows.shape[-1] != rows.shape[-1]:
            return self
        start = class_rows.to(rows)[torch.arange(rows.shape[-2]) % len(class_rows)]
        return replace(self, rows=torch.lerp(start.expand_as(rows), rows, share), learned=rows)
