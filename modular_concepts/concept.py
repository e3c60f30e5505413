"""A concept: one adapter per layer, its learned words, and the recipe that made them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, TypeGuard

from torch import Tensor

from .adapters.low_rank import MAX_SIZE, LowRank, check_adapter
from .errors import AdapterError, cut_in_the_middle
from .storage.strict_json import is_deep

MAX_TEXT = 400
MAX_VECTORS = 64


@dataclass(frozen=True)
class Recipe:
    """How a concept was made: enough to tell whether it fits a base and a merge, and to make it again.

    base_hash: sha256 of the base model's weights.  architecture: its family, as `families` names it.
    triggers: the words that call the concept, in prompt order; class_word: what it is one of ("dog").
    basis: the shared basis' identity; basis_kind and basis_seed regenerate it ("file" cannot be).
    slot, slot_policy: how the basis columns were chosen.  blocks, layout: how output rows were.
    training: settings, origin: where the pictures came from (count, fingerprint); both free-form JSON.
    """

    method: str = "lora"
    rank: int = 1
    alpha: float = 1.0
    base_hash: str = ""
    architecture: str = ""
    triggers: tuple[str, ...] = ()
    class_word: str = ""
    basis: str | None = None
    basis_kind: str | None = None
    basis_seed: int | None = None
    slot: int | None = None
    slot_policy: str | None = None
    blocks: int | None = None
    layout: str | None = None
    training: Mapping[str, object] = field(default_factory=dict)
    origin: Mapping[str, object] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """Plain dict of JSON values, every field present.  Raises AdapterError for what JSON cannot hold."""
        try:
            text = json.dumps(asdict(self), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise AdapterError(f"the recipe cannot be written as JSON: {error}") from error
        if is_deep(data := json.loads(text)):
            raise AdapterError("the recipe cannot be written as JSON: it is nested too deeply")
        return data

    @classmethod
    def from_json(cls, data: object) -> Recipe:
        """Read what `to_json` wrote, from an untrusted source.  Raises AdapterError that names the field."""
        if not isinstance(data, dict):
            raise AdapterError("recipe: the file's recipe is not a JSON object; the file is damaged")
        unknown = set(data) - {entry.name for entry in fields(cls)}
        if unknown:
            raise AdapterError(
                f"recipe: unknown entry {min(unknown)!r}; the file is damaged or newer than this program"
            )
        values: dict[str, Any] = {name: _READERS[name](f"recipe: {name}", value) for name, value in data.items()}
        return cls(**values)


@dataclass(frozen=True, eq=False)
class Concept:
    """What training makes and merging takes.

    layers: canonical layer name (`layers.find_layers`) -> adapter.
    tokens: trigger word -> learned vectors, float32 (vectors, width), or (layers, vectors, width) layer-wise.
    about: what a person says of it to programs that list models, title, author, thumbnail ... (`files/modelspec.py`).
    """

    name: str
    layers: Mapping[str, LowRank]
    tokens: Mapping[str, Tensor]
    recipe: Recipe
    about: Mapping[str, str] = field(default_factory=dict)


def same_concept(one: Concept, other: Concept) -> bool:
    """Whether two are one concept, at whatever strength of its parts: by name, words and factors."""
    if one is other:
        return True
    alike = one.name == other.name and set(one.tokens) == set(other.tokens) and set(one.layers) == set(other.layers)
    return alike and all(_same(adapter.lora_up, other.layers[name].lora_up) for name, adapter in one.layers.items())


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one.detach().cpu() == other.detach().cpu()).all())


def check_concept(concept: Concept) -> None:
    """Check a concept at a boundary.  Raises AdapterError that names the layer, word or field."""
    check_text("concept name", concept.name)
    if not concept.name.strip():
        raise AdapterError("a concept needs a name")
    if not concept.layers and not concept.tokens:
        raise AdapterError(f"{concept.name}: the concept has neither adapters nor learned words; nothing to use")
    for name, adapter in concept.layers.items():
        check_adapter(name, adapter)
    for word, vectors in concept.tokens.items():
        check_token(word, vectors.shape)


def check_token(word: str, shape: tuple[int, ...]) -> None:
    """A learned word is printable, without spaces, and has (vectors, width) or (layers, vectors, width)."""
    check_text("trigger word", word)
    if not word or any(letter.isspace() for letter in word):
        raise AdapterError(f"trigger word {word!r}: a trigger must be one word without spaces")
    if len(shape) not in (2, 3) or not all(shape) or math.prod(shape[:-1]) > MAX_VECTORS**2:
        raise AdapterError(
            f"trigger word {word!r}: learned vectors have shape {tuple(shape)}; we need (vectors, width) or "
            "(layers, vectors, width)"
        )


def check_rows(word: str, vectors: Tensor) -> None:
    """Raise AdapterError where a learned word from a file has numbers whose squares overflow."""
    largest = vectors.abs().max().item()
    if not largest <= MAX_SIZE:
        raise AdapterError(
            f"trigger word {clip(word)}: its numbers reach {largest:.1e}, which no text encoder survives; the training "
            "diverged or the file is damaged"
        )


def check_text(what: str, value: object) -> str:
    """A short printable string, or AdapterError."""
    if not isinstance(value, str) or len(value) > MAX_TEXT or not value.isprintable():
        raise AdapterError(f"{what} must be printable text of at most {MAX_TEXT} characters; got {clip(value)}")
    return value


def clip(value: object, length: int = 60) -> str:
    """repr of an untrusted value, ASCII and short enough for a sentence."""
    try:
        text = ascii(value)
    except RecursionError:  # lists in lists in lists
        text = f"a {type(value).__name__} that is nested too deeply"
    return cut_in_the_middle(text, length, "...")


def is_number(value: object) -> TypeGuard[float]:
    """Whether an untrusted value is a number, which a boolean is not."""
    return type(value) in (int, float)


def _integer(what: str, value: object) -> int:
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise AdapterError(f"{what} must be a whole number; got {clip(value)}")
    return value


def _count(what: str, value: object) -> int:
    count = _integer(what, value)
    if count < 0:
        raise AdapterError(f"{what} must not be negative; got {count}")
    return count


def _number(what: str, value: object) -> float:
    if not is_number(value) or abs(value) > 1e12 or value != value:
        raise AdapterError(f"{what} must be a finite number; got {clip(value)}")
    return float(value)


def _mapping(what: str, value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise AdapterError(f"{what} must be a JSON object; got {clip(value)}")
    return value


def _words(what: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise AdapterError(f"{what} must be a list of words; got {clip(value)}")
    return tuple(check_text(what, word) for word in value)


def _optional(reader):
    return lambda what, value: None if value is None else reader(what, value)


_READERS = {
    "rank": _count,
    "alpha": _number,
    "triggers": _words,
    "basis_seed": _optional(_integer),
    "slot": _optional(_count),
    "blocks": _optional(_count),
    "training": _mapping,
    "origin": _mapping,
}
_READERS |= {
    entry.name: check_text if entry.default is not MISSING and entry.default is not None else _optional(check_text)
    for entry in fields(Recipe)
    if entry.name not in _READERS
}
