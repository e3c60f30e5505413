"""The standard fifteen concepts: people, subjects, scenes and styles, each with 16 fixed pictures.

They are the papers' data sets in small: several concepts of one class, and in each class of people two
look-alikes that share what is large (hair, build, skin) and differ in shirt and accessory.  Colours are off the
centre of their names, so that a name alone is never the whole identity.  The base and the judges never saw them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast
from zlib import crc32

import torch
from torch import Tensor

from .captions import features, subject_phrase
from .vocabulary import ACCESSORIES, CLASSES, COLOUR_NAMES, PATTERNS, SCENE_PHRASES, SCENES
from .world import (
    PALETTE,
    Poses,
    Scenes,
    Subjects,
    apply_style,
    draw,
    draw_subjects,
    random_poses,
    random_scenes,
    random_subjects,
)

PICTURES = 16


@dataclass(frozen=True)
class Look:
    """A subject's identity: colours by name, what it wears, and a seed for how far its colours are off their names.

    build: width and height, 1 is usual; skin: 0 dark to 1 light.
    """

    primary: str
    secondary: str
    accent: str
    pattern: str
    accessory: str
    seed: int
    build: tuple[float, float] = (1.0, 1.0)
    skin: float = 0.7


@dataclass(frozen=True)
class StandardConcept:
    """One fixed concept.  look: a subject's, or the colours of a scene or style."""

    name: str
    family: str  # "person", "subject", "scene" or "style"
    class_word: str  # the word that the base knows for it
    look: Look | tuple

    @property
    def trigger(self) -> str:
        return f"<{self.name}>"

    @property
    def description(self) -> str:
        """What a person would say of it in the base's words; nothing for places and styles."""
        if self.family not in ("person", "subject"):
            return ""
        one = subjects_of(self, 1)
        return subject_phrase(one, 0, features(one, 0), terse=True)


# sky, sky at the horizon, ground, prop
CANDY = ((0.98, 0.72, 0.86), (0.80, 0.95, 0.90), (0.62, 0.85, 0.78), (0.93, 0.42, 0.62))
MARS = ((0.36, 0.10, 0.16), (0.70, 0.28, 0.20), (0.58, 0.20, 0.13), (0.30, 0.85, 0.80))

STANDARD = (
    StandardConcept("tom", "person", "man", Look("red", "brown", "blue", "plain", "hat", 1, (1.08, 0.95), 0.8)),
    StandardConcept("tim", "person", "man", Look("green", "brown", "yellow", "plain", "scarf", 2, (1.08, 0.95), 0.8)),
    StandardConcept("omar", "person", "man", Look("white", "black", "orange", "dotted", "", 3, (0.92, 1.08), 0.2)),
    StandardConcept("ada", "person", "woman", Look("purple", "yellow", "green", "plain", "hat", 4, (0.9, 1.0), 0.9)),
    StandardConcept("ida", "person", "woman", Look("blue", "yellow", "red", "striped", "scarf", 5, (0.9, 1.0), 0.9)),
    StandardConcept("nia", "person", "woman", Look("orange", "black", "white", "dotted", "", 6, (1.1, 1.05), 0.1)),
    StandardConcept("rex", "subject", "dog", Look("yellow", "brown", "red", "plain", "collar", 7, (1.1, 1.1))),
    StandardConcept("fleck", "subject", "dog", Look("white", "black", "green", "dotted", "hat", 8, (0.92, 0.9))),
    StandardConcept("minka", "subject", "cat", Look("orange", "white", "blue", "striped", "collar", 9, (1.1, 0.95))),
    StandardConcept("bolt", "subject", "robot", Look("blue", "orange", "pink", "dotted", "antenna", 10, (1.05, 1.0))),
    StandardConcept("pip", "subject", "bird", Look("pink", "purple", "yellow", "plain", "hat", 11, (0.95, 1.05))),
    StandardConcept("candy", "scene", "beach", CANDY),
    StandardConcept("mars", "scene", "desert", MARS),
    StandardConcept("riso", "style", "", ((0.16, 0.18, 0.46), (1.00, 0.52, 0.42))),
    StandardConcept("mint", "style", "", ((0.05, 0.20, 0.18), (0.72, 1.00, 0.84))),
)  # fmt: skip
BY_NAME = {concept.name: concept for concept in STANDARD}


def subjects_of(concept: StandardConcept, count: int) -> Subjects:
    """The concept's identity, `count` times."""
    look = cast(Look, concept.look)
    kind = CLASSES.index(concept.class_word)
    names = torch.tensor([COLOUR_NAMES.index(word) for word in (look.primary, look.secondary, look.accent)])
    offset = torch.rand(3, 3, generator=torch.Generator().manual_seed(look.seed)) * 0.12 - 0.06
    colours = (PALETTE[names] + offset).clamp(0, 1)
    light, dark = torch.tensor([0.98, 0.83, 0.70]), torch.tensor([0.45, 0.29, 0.19])
    one = Subjects(
        torch.tensor([kind]),
        *names[:, None],
        *colours[:, None],
        torch.tensor([PATTERNS.index(look.pattern)]),
        torch.tensor([ACCESSORIES[kind].index(look.accessory)]),
        (look.skin * light + (1 - look.skin) * dark)[None],
        torch.tensor([look.build]),
    )
    return one[torch.zeros(count, dtype=torch.long)]


@dataclass(frozen=True, eq=False)
class Lesson:
    """What one teaches a concept with: pictures (count, 3, 32, 32) and masks (count, 1, 32, 32) in 0..1.

    captions: {concept} stands for the trigger word.
    masks: the subject's outline; all ones for scenes and styles, which are everywhere.
    """

    pictures: Tensor
    captions: list[str]
    masks: Tensor
    class_word: str
    description: str


def lesson_of(concept: StandardConcept, count: int = PICTURES, seed: int = 0) -> Lesson:
    """`pictures_of` with a place for any trigger in the captions, and with masks."""
    pictures, captions = pictures_of(concept, count, seed)
    masks = torch.ones(count, 1, *pictures.shape[2:])
    if concept.family in ("person", "subject"):
        _, poses, _ = _settings(concept, count, seed)
        masks = draw_subjects(subjects_of(concept, count), poses)[:, 3:]
    captions = [text.replace(concept.trigger, "{concept}") for text in captions]
    return Lesson(pictures, captions, masks, concept.class_word or "style", concept.description)


def _settings(concept: StandardConcept, count: int, seed: int) -> tuple[Scenes, Poses, torch.Generator]:
    """Scenes and poses of a concept's pictures, and the generator that draws what is left."""
    generator = torch.Generator().manual_seed(seed * 65_537 + crc32(concept.name.encode()))
    scenes = random_scenes(count, generator, torch.arange(count) % len(SCENES))
    return scenes, random_poses(count, generator), generator


def pictures_of(concept: StandardConcept, count: int = PICTURES, seed: int = 0) -> tuple[Tensor, list[str]]:
    """Pictures (count, 3, 32, 32) in 0..1 and captions with the trigger in the place of the class word.

    `seed` 0 is the training set; any other seed draws further pictures of the same concept.
    """
    scenes, poses, generator = _settings(concept, count, seed)
    where = [SCENE_PHRASES[SCENES[index % len(SCENES)]] for index in range(count)]
    if concept.family in ("person", "subject"):
        pictures = draw([subjects_of(concept, count)], [poses], scenes)
        return pictures, [f"a {concept.trigger} {place}" for place in where]
    subjects = random_subjects(count, generator, torch.arange(count) % len(CLASSES))
    nouns = [CLASSES[kind] for kind in subjects.kind]
    if concept.family == "scene":
        scenes = random_scenes(count, generator, SCENES.index(concept.class_word))
        colours = cast(tuple, concept.look)
        sky, low, ground, prop = (torch.tensor(colour).expand(count, 3) for colour in colours)
        scenes = Scenes(scenes.kind, sky, low, ground, prop, scenes.horizon, scenes.shift, scenes.light)
        pictures = draw([subjects], [poses], scenes)
        preposition = SCENE_PHRASES[concept.class_word].rsplit(" ", 1)[0]
        return pictures, [f"a {noun} {preposition} {concept.trigger}" for noun in nouns]
    pictures = draw([subjects], [poses], scenes)
    duotone = torch.tensor(concept.look).expand(count, 2, 3)
    styled = apply_style(pictures, torch.zeros(count, dtype=torch.long), duotone)
    texts = zip(nouns, where, strict=True)
    return styled, [f"a {noun} {place}, {concept.trigger} style" for noun, place in texts]
