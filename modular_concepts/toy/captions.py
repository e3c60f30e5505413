"""Captions of toy pictures, and the word-level tokenizer that reads them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..text.company import subjects_beside
from ..text.triggers import between
from ..text.words import spelled
from .vocabulary import (
    ACCESSORIES,
    CLASSES,
    COLOUR_NAMES,
    PATTERNS,
    PRIMARY_PART,
    RESERVED,
    SCENE_PHRASES,
    SCENES,
    SECONDARY_PART,
    STYLES,
    WORDS,
)
from .world import Scenes, Subjects, random_scenes, random_subjects

MAX_TOKENS = 40
START, END, PAD, UNKNOWN = range(4)
_ROW = {word: row for row, word in enumerate(WORDS)}
_WORD = re.compile(r"<[^<>\s]+>|[a-z]+|,")
_MEANT = re.compile(r"<[^<>\s]+>|[^\W_]+|[^\x00-\x7f]")  # as people take words, numbers and signs of any script


def split_words(prompt: str) -> list[str]:
    """Lower-case words, commas and `<triggers>`; everything else is dropped."""
    return _WORD.findall(prompt.lower())


def unknown_words(prompt: str, triggers: Sequence[str] = ()) -> list[str]:
    """The words of a prompt that the toy base has never seen."""
    words = [match[0] for part in between(prompt, triggers) for match in _MEANT.finditer(part.lower())]
    return [word for word in words if (word not in _ROW or word in RESERVED) and _says_something(word)]


def _says_something(word: str) -> bool:
    """What is written with letters or numbers, and a picture sign; other signs stand between words."""
    return len(word) > 1 or word.isalnum() or unicodedata.category(word) == "So"


def tokenize(prompts: Sequence[str], triggers: Mapping[str, Sequence[int]] | None = None) -> Tensor:
    """(B, 40) int64: start, words, end, padding.  A trigger becomes its own ids."""
    triggers = triggers or {}
    rows = torch.full((len(prompts), MAX_TOKENS), PAD)
    for row, prompt in zip(rows, prompts, strict=True):
        words = spelled(prompt, triggers, lambda text: [_ROW.get(word, UNKNOWN) for word in split_words(text)])
        ids = [START, *words][: MAX_TOKENS - 1] + [END]
        row[: len(ids)] = torch.tensor(ids)
    return rows


def features(subjects: Subjects, index: int) -> list[str]:
    """What the words can say of one subject: ["striped red shirt", "green hair", "blue hat"]."""
    kind = int(subjects.kind[index])
    pattern = PATTERNS[subjects.pattern[index]]
    primary = f"{COLOUR_NAMES[subjects.primary_name[index]]} {PRIMARY_PART[kind]}"
    named = [
        primary if pattern == "plain" else f"{pattern} {primary}",
        f"{COLOUR_NAMES[subjects.secondary_name[index]]} {SECONDARY_PART[kind]}",
    ]
    accessory = ACCESSORIES[kind][subjects.accessory[index]]
    if accessory:
        named.append(f"{COLOUR_NAMES[subjects.accent_name[index]]} {accessory}")
    return named


def subject_phrase(subjects: Subjects, index: int, named: Sequence[str], terse: bool = False) -> str:
    """ "a man with green hair and red shirt"; terse: "man green hair red shirt"."""
    noun = CLASSES[subjects.kind[index]]
    if terse:
        return " ".join([noun, *named])
    return f"a {noun}" + (" with " + " and ".join(named) if named else "")


def scene_phrase(scenes: Scenes, index: int) -> str:
    return SCENE_PHRASES[SCENES[scenes.kind[index]]]


def captions(
    subjects: Sequence[Subjects],
    scenes: Scenes,
    style: Tensor,
    generator: torch.Generator,
) -> list[str]:
    """A caption for each picture; most name attributes, some are terse, some leave the scene out."""
    count = len(scenes)
    dice = torch.rand(count, 3 + 4 * max(len(subjects), 1), generator=generator).tolist()
    most = 3 if len(subjects) == 1 else 2
    texts = []
    for i, row in enumerate(dice):
        attributed, terse = row[0] < 0.8, row[1] < 0.25
        phrases = []
        for tile, subject in enumerate(subjects):
            draws = row[3 + 4 * tile : 7 + 4 * tile]
            named = features(subject, i) if attributed else []
            named = [text for text, draw in zip(named, draws, strict=False) if draw < 0.85]
            if draws[3] < 0.5:
                named.reverse()
            phrases.append(subject_phrase(subject, i, named[:most], terse))
        text = " and ".join(phrases)
        if row[2] < 0.9:
            text = f"{text} {scene_phrase(scenes, i)}"
        if style[i]:
            text = f"{text}, {STYLES[style[i]]} style"
        texts.append(text)
    return texts


def ordinary_captions(count: int = 192) -> list[str]:
    """Captions of anything in the toy world, always the same."""
    return prior_prompts("", count)


def prior_prompts(class_word: str, count: int) -> list[str]:
    """Captions for prior preservation: half of the class itself where it is a subject's, half of anything."""
    generator = torch.Generator().manual_seed(len(class_word) + 1)
    kinds = torch.randint(len(CLASSES), (count,), generator=generator)
    if class_word in CLASSES:
        kinds[::2] = CLASSES.index(class_word)
    subjects, scenes = random_subjects(count, generator, kinds), random_scenes(count, generator)
    return captions([subjects], scenes, torch.zeros(count, dtype=torch.long), generator)


def company(class_word: str, count: int) -> list[str]:
    """Phrases of who may stand beside a concept, of all classes, half of its own where that is one; half described."""
    plain = subjects_beside(class_word if class_word in CLASSES else "style", count, CLASSES)
    kinds = torch.tensor([CLASSES.index(phrase.split()[1]) for phrase in plain], dtype=torch.long)
    generator = torch.Generator().manual_seed(len(class_word) + 2)
    subjects = random_subjects(count, generator, kinds)
    described = torch.rand(count, generator=generator).tolist()
    return [
        subject_phrase(subjects, index, features(subjects, index)[:2] if described[index] < 0.5 else [])
        for index in range(count)
    ]
