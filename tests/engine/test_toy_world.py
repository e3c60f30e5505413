"""The toy world is a pure function of its seed; its captions say only what the base was taught to read."""

import itertools
from dataclasses import fields

import pytest
import torch
from laws import relative_error, seeded

from modular_concepts.toy.captions import (
    END,
    MAX_TOKENS,
    START,
    UNKNOWN,
    captions,
    features,
    split_words,
    tokenize,
    unknown_words,
)
from modular_concepts.toy.model import decode_latents, encode_pictures
from modular_concepts.toy.standard import BY_NAME, PICTURES, STANDARD, lesson_of, pictures_of, subjects_of
from modular_concepts.toy.vocabulary import CLASSES, RESERVED, SCENES, SPECIAL, STYLES, WORDS
from modular_concepts.toy.world import (
    TILE,
    apply_style,
    draw,
    draw_subjects,
    random_poses,
    random_scenes,
    random_subjects,
)

NAMES = "tom tim omar ada ida nia rex fleck minka bolt pip candy mars riso mint"


def pictures(seed: int, count: int = 6, tiles: int = 1) -> torch.Tensor:
    generator = seeded(seed)
    subjects = [random_subjects(count, generator) for _ in range(tiles)]
    poses = [random_poses(count, generator) for _ in range(tiles)]
    return draw(subjects, poses, random_scenes(count, generator), torch.arange(count) % len(STYLES))


@pytest.mark.parametrize("tiles", [1, 2, 3])
def test_a_seed_gives_the_same_pictures(tiles):
    state = torch.get_rng_state()
    first = pictures(5, tiles=tiles)
    assert first.shape == (6, 3, TILE, TILE * tiles) and 0 <= first.min() < 0.1 and 0.9 < first.max() <= 1
    assert torch.equal(pictures(5, tiles=tiles), first)
    assert relative_error(pictures(6, tiles=tiles), first) > 0.1
    assert torch.equal(torch.get_rng_state(), state)


def test_a_picture_does_not_depend_on_its_batch():
    generator = seeded(1)
    subjects, poses, scenes = random_subjects(20, generator), random_poses(20, generator), random_scenes(20, generator)
    together = draw([subjects], [poses], scenes)
    for i in (0, 7, 19):
        row = slice(i, i + 1)
        assert (draw([subjects[row]], [poses[row]], scenes[row]) - together[row]).abs().max() < 1e-6


def test_latents_are_the_pictures_and_nothing_is_lost():
    drawn = pictures(2)
    assert encode_pictures(drawn).shape == (6, 12, 16, 16)
    assert (decode_latents(encode_pictures(drawn)) - drawn).abs().max() < 1e-6


def test_classes_scenes_and_styles_are_drawn_differently():
    """The same identity, pose and place each time: what is left is the class, the scene or the style."""
    one = torch.zeros(8, dtype=torch.long)
    subject = random_subjects(1, seeded(3), 0)[one]
    poses, scenes = random_poses(1, seeded(3))[one], random_scenes(1, seeded(3), 0)[one]
    kinds = type(subject)(torch.arange(8), *(getattr(subject, field.name) for field in fields(subject)[1:]))
    by_class = draw([kinds], [poses], scenes)
    places = random_scenes(6, seeded(3), torch.arange(6))
    by_scene = draw([subject[:6]], [poses[:6]], places)
    by_style = apply_style(by_class[one[:4]], torch.arange(len(STYLES)))
    for drawn, count in ((by_class, len(CLASSES)), (by_scene, len(SCENES)), (by_style, len(STYLES))):
        assert len(drawn) == count
        for a, b in itertools.combinations(drawn, 2):
            assert (a - b).abs().mean() > 0.01
    covers = draw_subjects(kinds, poses)[:, 3].mean(dim=(1, 2))
    assert covers.min() > 0.08 and covers.max() < 0.7  # a subject is there, and so is the place


def test_what_the_words_name_is_what_is_drawn():
    """Every attribute that a caption can name changes the picture."""
    count, still = 64, seeded(4)
    subject = random_subjects(count, still)
    poses, scenes = random_poses(count, still), random_scenes(count, still)
    before = draw([subject], [poses], scenes)
    for attribute in ("primary", "secondary", "accessory", "pattern"):
        values = {field.name: getattr(subject, field.name) for field in fields(subject)}
        values[attribute] = (values[attribute] + 1) % (3 if attribute in ("accessory", "pattern") else 1.0001)
        if attribute in ("primary", "secondary"):
            values[attribute] = 1 - getattr(subject, attribute)
        changed = (draw([type(subject)(**values)], [poses], scenes) - before).abs().flatten(1).sum(1)
        assert (changed > 1).float().mean() > 0.95, attribute


@pytest.mark.parametrize("tiles", [1, 2, 3])
def test_captions_are_known_words_that_fit(tiles):
    generator = seeded(tiles)
    subjects = [random_subjects(400, generator) for _ in range(tiles)]
    style = torch.randint(len(STYLES), (400,), generator=generator)
    texts = captions(subjects, random_scenes(400, generator), style, generator)
    assert len(texts) == 400 and len(set(texts)) > 100
    for text in texts:
        assert unknown_words(text) == [], text
        assert len(split_words(text)) + 2 <= MAX_TOKENS, text
        assert not set(split_words(text)) & {*RESERVED, *SPECIAL}, text
    ids = tokenize(texts)
    assert ids.shape == (400, MAX_TOKENS) and not (ids == UNKNOWN).any()
    assert (ids[:, 0] == START).all() and ((ids == END).sum(1) == 1).all()
    named = sum(word in text for text in texts for word in (" with ", " red ", " blue ", " green "))
    assert named > 100


def test_the_vocabulary_is_closed():
    assert len(set(WORDS)) == len(WORDS) and set(RESERVED) <= set(WORDS)
    assert unknown_words("a man wearing a zeppelin, <tom> style", ["<tom>"]) == ["wearing", "zeppelin"]
    assert unknown_words("a <tom>") == ["<tom>"]
    assert UNKNOWN in tokenize(["a zeppelin"])[0]
    ids = tokenize(["a <tom> at night"], {"<tom>": [900, 901]})[0]
    assert ids[2:4].tolist() == [900, 901]
    assert torch.equal(ids, tokenize(["A <Tom> At Night!"], {"<tom>": [900, 901]})[0])


def test_the_standard_set_is_fifteen_concepts():
    assert [concept.name for concept in STANDARD] == NAMES.split() and list(BY_NAME) == NAMES.split()
    families = [concept.family for concept in STANDARD]
    assert [families.count(family) for family in ("person", "subject", "scene", "style")] == [6, 5, 2, 2]


@pytest.mark.parametrize("name", NAMES.split())
def test_a_standard_concept_has_sixteen_fixed_pictures(name):
    concept = BY_NAME[name]
    drawn, texts = pictures_of(concept)
    assert drawn.shape == (PICTURES, 3, TILE, TILE) == (16, 3, 32, 32) and len(texts) == 16
    assert drawn.min() >= 0 and drawn.max() <= 1
    again, same_texts = pictures_of(concept)
    assert torch.equal(again, drawn) and same_texts == texts
    assert relative_error(pictures_of(concept, seed=1)[0], drawn) > 0.02
    assert all((a - b).abs().mean() > 1e-3 for a, b in itertools.combinations(drawn, 2))
    for text in texts:
        assert concept.trigger in split_words(text)
        assert unknown_words(text, [concept.trigger]) == [] and len(split_words(text)) + 6 <= MAX_TOKENS


@pytest.mark.parametrize(("one", "other", "third"), [("tom", "tim", "omar"), ("ada", "ida", "nia")])
def test_look_alikes_share_what_is_large_and_differ_in_the_rest(one, other, third):
    one, other, third = (subjects_of(BY_NAME[name], 1) for name in (one, other, third))
    assert one.kind == other.kind == third.kind
    assert one.secondary_name == other.secondary_name != third.secondary_name  # hair
    assert torch.equal(one.build, other.build) and torch.equal(one.skin, other.skin)
    assert not torch.equal(one.build, third.build) and not torch.equal(one.skin, third.skin)
    assert one.primary_name != other.primary_name and one.accessory != other.accessory
    assert (one.primary - other.primary).abs().max() > 0.3


def test_a_standard_identity_stays_the_same_in_all_its_pictures():
    many = subjects_of(BY_NAME["omar"], 16)
    assert len(many) == 16
    for field in fields(many):
        values = getattr(many, field.name)
        assert torch.equal(values, values[:1].expand_as(values))
    assert features(many, 0) == ["dotted white shirt", "black hair"]


@pytest.mark.parametrize("concept", STANDARD, ids=lambda concept: concept.name)
def test_a_lesson_is_the_standard_pictures_with_a_place_for_the_trigger(concept):
    lesson, (pictures, captions) = lesson_of(concept, 6, 2), pictures_of(concept, 6, 2)
    assert torch.equal(lesson.pictures, pictures)
    for text, caption in zip(lesson.captions, captions, strict=True):
        assert text.count("{concept}") == 1 and "<" not in text
        assert text.replace("{concept}", concept.trigger) == caption
    assert lesson.description == concept.description
    assert lesson.masks.shape == (6, 1, 32, 32)
    covered = lesson.masks.mean((1, 2, 3))
    assert (covered > 0.05).all() and (concept.family in ("scene", "style")) == bool((covered == 1).all())
