"""Strengths for parts of a model: "mid=0.5, up 1=0, text=0.8" on top of a concept's own strength.

Blocks go by name (`layers.block_of`), so that a model with fewer of them shifts nothing: down 0, mid, up 1, text 3.
Without its number a kind stands for all of it (`down`, `text`); `other` for what is in none.  Later entries win.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..adapters.low_rank import LowRank
from ..errors import AdapterError
from ..families import block_kinds
from ..models.layers import block_of
from ..settings.merging import STRENGTH
from ..typed import read_number

_ENTRY = re.compile(r"\s*(?P<kind>[a-z][a-z ]*?)(?:\s+(?P<number>\d{1,3}))?\s*=\s*(?P<value>.+?)\s*")
EXAMPLE = "mid=0.5, up 1=0, text=0.8"


def check_strength(what: str, strength: float) -> None:
    """Raise AdapterError for a strength of a whole concept that is no number, or too large either way."""
    if not STRENGTH.allows(strength):
        raise AdapterError(f"{what}: strength is {strength:g}; give one {STRENGTH.reach}, 1 is as it was trained")


def unfelt(names: Sequence[str], strengths: Sequence[float]) -> list[str]:
    """A sentence on concepts of strength 0, by their names in order."""
    silent = [name for name, strength in zip(names, strengths, strict=True) if strength == 0]
    if silent and len(silent) == len(names):
        return ["every strength is 0, so the merge changes no layer; 1 is a concept as it was trained"]
    return [f"{name} has strength 0, so nothing of what its layers learned is in the merge" for name in silent]


@dataclass(frozen=True)
class BlockStrengths:
    """(block or kind, factor) in order; a block that none names has factor 1."""

    entries: tuple[tuple[str, float], ...] = ()

    @classmethod
    def parse(cls, text: str) -> BlockStrengths:
        """Read what a person typed; commas, semicolons or lines between entries.  Raises AdapterError."""
        entries = []
        for part in re.split(r"[,;\n]", text):
            if not part.strip():
                continue
            entry = _ENTRY.fullmatch(part.lower())
            value = _read_number(entry["value"]) if entry else None
            kind = " ".join(entry["kind"].split()) if entry else ""
            counted = block_kinds().get(kind)
            if entry is None or value is None or counted is None or (entry["number"] and not counted):
                names = ", ".join(f"{kind} N" if counted else kind for kind, counted in block_kinds().items())
                raise AdapterError(
                    f"block strength {part.strip()[:60]!r} is not like {EXAMPLE}; blocks are {names}, and without N "
                    "all of a kind"
                )
            entries.append((f"{kind} {int(entry['number'])}" if entry["number"] else kind, value))
        return cls(tuple(entries))

    def of(self, layer: str) -> float:
        """The factor of a layer, by its canonical name."""
        block, factor = block_of(layer), 1.0
        for name, value in self.entries:
            if name in (block, _name_kind(block)):
                factor = value
        return factor

    def unmet(self, layers: Iterable[str]) -> list[str]:
        """The blocks that are named and of which there is no layer, by its canonical name."""
        blocks = {part for layer in layers for block in (block_of(layer),) for part in (block, _name_kind(block))}
        return [name for name in dict.fromkeys(name for name, _ in self.entries) if name not in blocks]

    def on(self, layers: Mapping[str, LowRank]) -> dict[str, LowRank]:
        """The adapters times their blocks' factors; those of factor 0 are left out."""
        return {
            name: adapter.replace(alpha=adapter.alpha * factor)
            for name, adapter in layers.items()
            if (factor := self.of(name)) != 0
        }


def _name_kind(block: str) -> str:
    """down 0 -> down, second text 3 -> second text."""
    kind, _, number = block.rpartition(" ")
    return kind if number.isdigit() else block


def _read_number(text: str) -> float | None:
    try:
        value = read_number(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
