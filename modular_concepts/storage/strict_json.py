"""Reading JSON that nobody vouches for."""

from __future__ import annotations

import json
import math

from ..errors import AdapterError

MAX_TEXT = 64 * 2**20
MAX_ENTRIES = 2**19  # parsed, each costs some hundred bytes


def parse_json(text: str, what: str, most: int = MAX_ENTRIES) -> object:
    """Strict JSON: no duplicate keys, no NaN or Infinity, bounded depth and size.  most: of `_entries`."""
    if len(text) > MAX_TEXT or _entries(text, most) > most:
        raise AdapterError(f"{what} holds more entries than any adapter needs; the file is damaged or not an adapter")
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite)
    except AdapterError as error:
        raise AdapterError(f"{what} {error}; the file is damaged") from error
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{what} is not sound JSON; the file is damaged") from error


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
