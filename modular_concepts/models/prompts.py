"""What a headless base does not hear of a text: its end beyond the text model's length, weights, others' notations."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ..errors import listed
from ..text.triggers import TRIGGER, between
from .base import BaseModel

SHOWN = 60  # letters of a text in a sentence
# (words:1.3), [words:0.5], (words) and ((words)) with a number or twice, as other programs weigh words.
WEIGHT = re.compile(r"[(\[][^()\[\]]*:\s*[-+]?(?:\d+\.?\d*|\.\d+)\s*[)\]]|\(\([^()]+\)\)")
# One prompt AND another, BREAK, {one|another}: two prompts in one, or one of two by chance.
SEVERAL = re.compile(r"\b(?:AND|BREAK)\b|\{[^{}]*\|[^{}]*\}")
FILE = re.compile(r"\bembedding:[^\s,]+", re.IGNORECASE)


def unheard_of(base: BaseModel, texts: Sequence[str], words: Mapping[str, int], what: str = "prompt") -> list[str]:
    """A sentence for each thing in the texts that changes nothing, or not what was meant.

    words: trigger word -> how many vectors it has.  what: what the texts are called.
    """
    texts = list(dict.fromkeys(texts))
    sentences = _cut(base, texts, words, what)
    weights = _found(WEIGHT, texts)
    if weights:
        sentences.append(f"brackets and numbers weigh no words here, they are read as text: {weights}")
    several = _found(SEVERAL, texts)
    if several:
        sentences.append(f"nothing parts a {what} here or chooses from it, this is read as text: {several}")
    files = _found(FILE, texts)
    if files:
        sentences.append(f"words from embedding files are not known here: {files}; give the concept instead")
    strange = (m[0] for text in texts for part in between(text, words) for m in TRIGGER.finditer(part))
    strange = [word for word in dict.fromkeys(strange) if not base.unknown_words(word, [])]
    if strange:
        sentences.append(f"no concept here has the trigger word {listed(strange)}, which is read as plain text")
    return sentences


def falls_off(base: BaseModel, text: str, words: Mapping[str, int]) -> str:
    """The end of a text that the text model does not read, "" where it reads all; words: as `unheard_of`."""
    first, ids = 10**9, {}
    for word, vectors in words.items():
        ids[word] = list(range(first, first + vectors))
        first += vectors

    def read(part: str) -> list[int]:
        return base.tokenize([part], ids)[0].tolist()

    whole, low, high = read(text), 0, len(text)
    if read(f"{text} {text[:20] or 'a'}") != whole:
        return ""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if read(text[:middle]) == whole else (middle + 1, high)
    rest = text[low:].strip()
    return rest if read(rest) != read("") else ""


def _cut(base: BaseModel, texts: Sequence[str], words: Mapping[str, int], what: str) -> list[str]:
    cut = [(text, rest) for text in texts if (rest := falls_off(base, text, words))]
    if not cut:
        return []
    length = base.tokenize([""], {}).shape[1]
    pieces = "; ".join(f"of {_short(text)!r} falls off {_short(rest)!r}" for text, rest in cut[:3])
    more = f"; and of {len(cut) - 3} more {what}s" if len(cut) > 3 else ""
    return [f"the text model reads {length} tokens of a {what}: {pieces}{more}"]


def _found(pattern: re.Pattern, texts: Sequence[str]) -> str:
    places = list(dict.fromkeys(match[0] for text in texts for match in pattern.finditer(text)))
    return ", ".join(map(_short, places[:3])) + (f" and {len(places) - 3} more" if len(places) > 3 else "")


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
