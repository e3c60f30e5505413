"""Captions of which a training uses less than they say: told before the first step; no trigger word is parted."""

from dataclasses import replace

import pytest

from modular_concepts.text.triggers import split_tags
from modular_concepts.toy.base import load_toy_base
from modular_concepts.training.caption_checks import find_unused
from modular_concepts.training.settings import TrainSettings

SETTINGS = TrainSettings(method="lora", steps=1)


@pytest.fixture(scope="module")
def base():
    return load_toy_base()


def test_words_that_the_base_cannot_read_are_told(base):
    captions = ["a <tom> 在海滩", "a <tom> на пляже", "a <tom> on the beach", "a <tom> and a <tim>"]
    (told,) = find_unused(base, captions, "<tom>", SETTINGS)
    assert all(word in told for word in ("在海滩", "пляже", "tim")) and "<tom>" not in told and "beach" not in told
    assert find_unused(base, captions[2:3], "<tom>", SETTINGS) == []


@pytest.mark.parametrize(
    ("caption", "told"),
    [
        ("a man’s hat — “red” …", ["s"]),
        ("a café, naïve", ["café", "naïve"]),
        ("1girl and 2 dogs", ["1girl", "2", "dogs"]),
        ("a dog 🐶", ["🐶"]),
        ("a dog_house。 (man)", []),
        ("a\u200bdog", []),
    ],
)
def test_words_are_told_whole_and_signs_between_them_not_at_all(base, caption, told):
    unknown = base.unknown_words(caption, [])
    assert [word for word in unknown if word not in ("hat", "dogs", "house")] == [w for w in told if w != "dogs"]


@pytest.mark.parametrize(
    ("captions", "shuffles"),
    [
        (["a <tom>"], False),
        (["a <tom>, beach", "a <tom>"], False),
        (["a <tom>, beach, snow", "a <tom>"], True),
        (["a <a,b>, beach"], False),
    ],
)
def test_a_shuffle_without_anything_to_shuffle_is_told(base, captions, shuffles):
    trigger = "<a,b>" if "<a,b>" in captions[0] else "<tom>"
    told = find_unused(base, captions, trigger, replace(SETTINGS, shuffle_tags=True), lambda name: f"--{name}")
    assert [sentence for sentence in told if "--shuffle_tags changes nothing" in sentence] == told
    assert bool(told) is not shuffles


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("red, <a,b>, beach", ["red", "<a,b>", "beach"]),
        ("<a,b>,<A,B> x,,y", ["<a,b>", "<A,B> x", "", "y"]),
        ("", [""]),
        ("no comma", ["no comma"]),
    ],
)
def test_a_comma_inside_a_trigger_word_parts_nothing(text, tags):
    assert split_tags(text, ["<a,b>"]) == tags
