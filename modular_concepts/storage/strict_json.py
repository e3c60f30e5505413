"""Reading JSON that nobody vouches for."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from ..errors import AdapterError

MAX_TEXT = 64 * 2**20
MAX_ENTRIES = 2**19  # parsed, each costs some hundred bytes
MAX_DEPTH = 200  # Python itself bears a thousand calls in each other, of which each takes two or three
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str, what: str, most: int = MAX_ENTRIES) -> object:
    """Strict JSON: no duplicate keys, no NaN or Infinity, no half characters, bounded depth and size.

    A mark of the encoding before it, as some editors write it, is no part of it.  most: of `_entries`.
    """
    if len(text) > MAX_TEXT or _entries(text, most) > most:
        raise AdapterError(f"{what} holds more entries than any adapter needs; the file is damaged or not an adapter")
    try:
        value = json.loads(
            text.removeprefix("\ufeff"), object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite
        )
        if is_deep(value):
            raise AdapterError("is nested too deeply")
        if _HALF_CHARACTER.search(text) and not _is_text(value):
            raise AdapterError("holds half a character")
        return value
    except AdapterError as error:
        raise AdapterError(f"{what} {error}; the file is damaged") from error
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{what} is not sound JSON; the file is damaged") from error


def is_deep(value: object, most: int = MAX_DEPTH) -> bool:
    """Whether lists and objects lie within each other more than `most` times."""
    level: list[Any] = [value]
    for _ in range(most):
        level = [outer.values() if isinstance(outer, dict) else outer for outer in level if _holds(outer)]
        level = [inner for outer in level for inner in outer]
    return any(map(_holds, level))


def _holds(value: object) -> bool:
    return isinstance(value, dict | list | tuple)


def _is_text(value: object) -> bool:
    """Whether all texts in a value are such as a file or a screen can have."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _entries(text: str, most: int) -> int:
    """How many strings, objects, lists and places in them a JSON text has; what a string holds is one thing."""
    if "\\" in text:
        text = text.replace("\\\\", "").replace('\\"', "")
    quotes = text.count('"')
    if quotes > most:
        return quotes
    return quotes + sum(part.count(mark) for part in text.split('"')[::2] for mark in "[{,")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise AdapterError("names an entry twice")
    return result


def _refuse_constant(constant: str) -> None:
    raise AdapterError(f"holds {constant}")


def _finite(text: str) -> float:
    """A number such as 1e999 is infinity too, by another name."""
    if not math.isfinite(number := float(text)):
        _refuse_constant(text[:20])
    return number
