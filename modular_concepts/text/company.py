"""Two in one caption: where a caption speaks of its concept, and what it says when somebody stands beside it.

"a photo of a happy <tom> on the beach" beside a dog: "a photo of a happy <tom> and a dog on the beach", or "a photo of
a dog and a happy <tom> on the beach", in the order of their places; the dog alone: "a photo of a dog on the beach".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .triggers import heard

SUBJECTS = ("man", "woman", "dog", "cat", "child", "horse", "bird", "car")
NO_SUBJECTS = frozenset({"style", "art", "artstyle", "painting", "drawing", "photo", "picture", "background", "place"})
ARTICLES = frozenset({"a", "an", "the", "my", "his", "her", "its", "our", "your", "their", "this", "that", "one"})
PLACES = frozenset(
    {
        "in",
        "on",
        "at",
        "near",
        "by",
        "under",
        "over",
        "before",
        "behind",
        "beside",
        "inside",
        "outside",
        "above",
        "below",
    }
    | {"between", "among", "against", "across", "through", "along", "around", "beneath", "within"}
)
STOPS = PLACES | {"of", "with", "and", "or", "from", "to", "for", "as", "like", "featuring", "showing", "wearing"}
FAR = 5  # words between an article and the word that it belongs to
_WORD = re.compile(r"[^\s,.;:!?|]+|[,.;:!?|]")


@dataclass(frozen=True)
class Phrased:
    """A caption in three: before, the phrase for the concept, after; together they are the caption."""

    before: str
    phrase: str
    after: str

    def beside(self, other: str, left: bool) -> str:
        """The caption with `other` ("a dog") in the picture too; left: whether the concept has the left place."""
        both = (self.phrase, other) if left else (other, self.phrase)
        return f"{self._up_to(both[0])}{' and '.join(both)}{self.after}"

    def of(self, other: str) -> str:
        """The caption of `other` alone in the same surroundings."""
        return f"{self._up_to(other)}{other}{self.after}"

    def _up_to(self, first: str) -> str:
        """What is before, with a space where letters would touch."""
        touches = self.before[-1:].isalnum() and first[:1].isalnum()
        return f"{self.before} " if touches else self.before


def phrased(caption: str, trigger: str, class_word: str = "") -> Phrased:
    """Find the phrase for the concept: from its article to the first word for a place, or to a comma.

    The class word beside the trigger belongs to it.  Where the trigger names a place or a style ("a man on <mars>",
    "a man, <mint> style"), the whole caption is the phrase: its surroundings are what is learned.
    """
    place = next(iter(heard(caption, [trigger])))
    nouns = class_word.lower().split()
    start, end = place.start, place.end
    left = list(_WORD.finditer(caption, 0, start))
    right = list(_WORD.finditer(caption, end))
    if nouns and [match[0].lower() for match in left[-len(nouns) :]] == nouns:
        start, left = left[-len(nouns)].start(), left[: -len(nouns)]
    start, left = _with_article(start, left)
    if (left and left[-1][0].lower() in PLACES) or _is_style(left, right):
        return Phrased("", caption, "")
    end = _end(end, right)
    return Phrased(caption[:start], caption[start:end], caption[end:])


def subjects_beside(class_word: str, count: int, subjects: Sequence[str] = SUBJECTS) -> list[str]:
    """`count` phrases of who may stand beside a concept: each second its own class, where that is a subject.

    What a word is most easily taken for is what it has to be told from most often.
    """
    words = class_word.lower().split()
    others = [subject for subject in subjects if subject != class_word.lower()] or list(subjects)
    if not words or words[-1] in NO_SUBJECTS:
        return [with_article(others[turn % len(others)]) for turn in range(count)]
    nouns = [others[turn // 2 % len(others)] if turn % 2 else class_word for turn in range(count)]
    return [with_article(noun) for noun in nouns]


def with_article(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def _with_article(start: int, left: list[re.Match]) -> tuple[int, list[re.Match]]:
    """Where the phrase begins, and the words before it: an article, not too far away and with no border between."""
    for back, match in enumerate(reversed(left[-FAR:]), start=1):
        word = match[0].lower()
        if word in ARTICLES:
            return match.start(), left[:-back]
        if word in STOPS or not word[0].isalnum():
            break
    return start, left


def _is_style(left: Sequence[re.Match], right: Sequence[re.Match]) -> bool:
    words = [match[0].lower() for match in (*left[-3:], *right[:1])]
    return bool(NO_SUBJECTS & {"style", "artstyle"} & set(words))


def _end(end: int, right: Sequence[re.Match]) -> int:
    """Where the phrase ends: before a place or a border, else with the caption."""
    for match in right:
        word = match[0].lower()
        if word in PLACES or not word[0].isalnum() and len(word) == 1:
            return end
        end = match.end()
    return end
