"""What of a data set's captions a training does not use, said before the first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..errors import listed
from ..models.base import Base
from ..text.triggers import split_tags
from .settings import TrainSettings


def find_unused(
    base: Base, captions: Sequence[str], trigger: str, settings: TrainSettings, called: Callable[[str], str] = str
) -> list[str]:
    """A sentence for words that the base cannot read, and for a shuffle that has nothing to shuffle.

    called: a setting as the person knows it.
    """
    sentences = []
    unknown = dict.fromkeys(word for caption in captions for word in base.unknown_words(caption, [trigger]))
    if unknown:
        sentences.append(f"the base does not know {listed(unknown, 10)}; these words of the captions teach nothing")
    if settings.shuffle_tags and all(len(split_tags(caption, [trigger])) < 3 for caption in captions):
        sentences.append(
            f"{called('shuffle_tags')} changes nothing: no caption has two parts behind its first comma to shuffle"
        )
    return sentences
