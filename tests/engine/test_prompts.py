"""What a text model does not hear of a text is told, with what falls off."""

import pytest

from modular_concepts.models.prompts import falls_off, unheard_of
from modular_concepts.toy.base import load_toy_base

END = "a dog in the snow"


@pytest.fixture(scope="module")
def base(weights):
    return load_toy_base(weights)


def test_what_lies_beyond_the_length_falls_off(base):
    text = "man " * 38
    assert falls_off(base, text, {}) == ""  # start, 38 words and the end fill the 40 tokens
    assert falls_off(base, f"{text}{END}", {}) == END
    assert falls_off(base, f"{text}...", {}) == ""
    assert falls_off(base, f"<tom> {text}", {"<tom>": 8}).split() == ["man"] * 8
    (sentence,) = unheard_of(base, [f"{text}{END}", "a man"], {}, "caption")
    assert "reads 40 tokens of a caption" in sentence and f"falls off {END!r}" in sentence


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a (red:1.3) man", "weigh no words here, they are read as text: (red:1.3)"),
        ("a [red:.5] man and ((dog))", "they are read as text: [red:.5], ((dog))"),
        ("a man by embedding:artist.pt", "words from embedding files are not known here: embedding:artist.pt"),
    ],
)
def test_notations_of_other_programs_are_told(base, text, words):
    assert words in " ".join(unheard_of(base, [text], {}))


def test_plain_text_is_not_told_of(base):
    assert unheard_of(base, ["a man (smiling) on the beach, 12:30", "a <tom> man", ""], {"<tom>": 2}) == []
