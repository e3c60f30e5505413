"""Whether a text says a trigger word, and where: the one place that decides it, for captions, prompts and tokenizers.

Upper and lower case are the same.  A bracket or any other sign at the word's edge is a border by itself, so `<tom>`
is said in "photo of<tom>", "<tom>s hat" and "一张<tom>的照片".  A letter at its edge (`sks`) needs a border: it
is not said in "asks".  There a letter of a script without spaces is one too, unless the word's edge is of that script.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

TRIGGER = re.compile(r"<([^<>\s]+)>")  # in a prompt, with the name inside

# Scripts whose words stand side by side, or take endings of theirs without a space (Hangul).
UNSPACED = frozenset(
    {
        "CJK",
        "HIRAGANA",
        "KATAKANA",
        "BOPOMOFO",
        "HANGUL",
        "THAI",
        "LAO",
        "KHMER",
        "MYANMAR",
        "TIBETAN",
        "YI",
        "JAVANESE",
    }
)


class Heard(NamedTuple):
    """text[start:end] says `word`."""

    start: int
    end: int
    word: str


def says(text: str, word: str) -> bool:
    """Whether a text says a trigger word."""
    return bool(heard(text, [word]))


def heard(text: str, words: Iterable[str]) -> list[Heard]:
    """Every place where a text says any of the trigger words, in order and without overlap; longer words come first."""
    places = [
        Heard(match.start(), match.end(), word)
        for word in dict.fromkeys(words)
        if word
        for match in _pattern(word).finditer(text)
        if _bordered(text, match.start(), match.end())
    ]
    # Of words that differ in case alone, the one that is written so.
    places.sort(key=lambda at: (at.start, -at.end, text[at.start : at.end] != at.word))
    first, chosen = 0, []
    for place in places:
        if place.start >= first:
            chosen.append(place)
            first = place.end
    return chosen


def between(text: str, words: Iterable[str]) -> list[str]:
    """What stands before, between and behind the trigger words that a text says, without spaces at its ends."""
    first, parts = 0, []
    for place in heard(text, words):
        parts.append(text[first : place.start])
        first = place.end
    return [part for part in (part.strip() for part in [*parts, text[first:]]) if part]


def split_tags(text: str, words: Iterable[str]) -> list[str]:
    """The parts of a text between commas, without spaces at their ends; a comma inside a trigger word parts nothing."""
    places, parts, first = heard(text, words), [], 0
    for comma in (match.start() for match in re.finditer(",", text)):
        if not any(place.start <= comma < place.end for place in places):
            parts.append(text[first:comma])
            first = comma + 1
    return [part.strip() for part in [*parts, text[first:]]]


def replaced(text: str, meanings: Mapping[str, str]) -> str:
    """The text with other words where it says a trigger word, and a space where letters would touch."""
    for place in reversed(heard(text, meanings)):
        before, after = text[: place.start], text[place.end :]
        left, right = (" " if sign and _letter(sign) else "" for sign in (before[-1:], after[:1]))
        text = f"{before}{left}{meanings[place.word]}{right}{after}"
    return text


@lru_cache(1024)
def _pattern(word: str) -> re.Pattern:
    return re.compile(re.escape(word), re.IGNORECASE)


def _bordered(text: str, start: int, end: int) -> bool:
    return _border(text[start], text[start - 1 : start]) and _border(text[end - 1], text[end : end + 1])


def _border(edge: str, beside: str) -> bool:
    """Whether a word with this letter at its edge ends there; beside: the next sign, "" at the end of the text."""
    if not beside or not _letter(edge) or not _letter(beside):
        return True
    script = _script(beside)
    return script in UNSPACED and script != _script(edge)


def _letter(sign: str) -> bool:
    """Also what belongs to a letter: an accent of its own, a joiner."""
    return sign.isalnum() or sign == "_" or unicodedata.category(sign) in ("Mn", "Mc") or sign in "\u200c\u200d"


def _script(sign: str) -> str:
    """The first word of a sign's Unicode name, such as LATIN or THAI; Han characters are CJK."""
    name = unicodedata.name(sign, "").removeprefix("HALFWIDTH ").removeprefix("FULLWIDTH ")
    return "CJK" if name.startswith("IDEOGRAPHIC") else re.split(r"[ -]", name)[0]
