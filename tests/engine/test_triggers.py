"""One answer to whether a text says a trigger word: for captions, prompts, tokenizers and regions alike."""

import pytest
import torch

from modular_concepts.concept import Concept, Recipe
from modular_concepts.errors import AdapterError
from modular_concepts.regions.assignment import called
from modular_concepts.text.triggers import between, heard, replaced, says
from modular_concepts.text.words import caption_ids
from modular_concepts.toy.base import load_toy_base
from modular_concepts.toy.captions import tokenize, unknown_words
from modular_concepts.training.settings import TrainSettings
from modular_concepts.training.teach import Subject, check_training

SAID = [
    ("一张<tom>的照片", "<tom>"),
    ("海滩上的<tom>", "<tom>"),
    ("photo of<tom>", "<tom>"),
    ("<tom>s hat", "<tom>"),
    ("<tom>_x", "<tom>"),
    ("<tom>\u200d and", "<tom>"),
    ("a <Tom> man", "<tom>"),
    ("<<tom>>", "<tom>"),
    ("一张sks的照片", "sks"),
    ("sksのねこ", "sks"),
    ("รูปsksที่ทะเล", "sks"),
    ("sks는 바다에", "sks"),
    ("Sks, dog", "sks"),
    ("(sks:1.2)", "sks"),
    ("汤姆の照片", "汤姆"),
]
UNSAID = [
    ("asks", "sks"),
    ("sks2", "sks"),
    ("sks_x", "sks"),
    ("my_sks", "sks"),
    ("sks\u0301", "sks"),
    ("сsks", "sks"),
    ("一张汤姆的照片", "汤姆"),
    ("tom", "<tom>"),
    ("< tom >", "<tom>"),
    ("", "sks"),
]


@pytest.mark.parametrize(("text", "word"), SAID)
def test_a_word_is_said(text, word):
    assert says(text, word) and [text[p.start : p.end].lower() for p in heard(text, [word])] == [word]


@pytest.mark.parametrize(("text", "word"), UNSAID)
def test_a_word_is_not_said(text, word):
    assert not says(text, word) and between(text, [word]) == ([text] if text else [])


def test_the_longer_word_and_the_one_of_that_very_case_come_first():
    assert [place.word for place in heard("<x>y and <x>", ["<x>", "<x>y"])] == ["<x>y", "<x>"]
    assert [place.word for place in heard("Sks sks", ["sks", "Sks"])] == ["Sks", "sks"]
    assert replaced("photo of<tom>s hat, <Tom>", {"<tom>": "man"}) == "photo of man s hat, man"


@pytest.mark.parametrize(("text", "word"), SAID + UNSAID)
def test_tokenizer_regions_and_unknown_words_agree_with_it(text, word):
    rows = {word: torch.zeros(1, 4)}
    concept = Concept("own", {}, rows, Recipe(triggers=(word,)))
    answer = says(text, word)
    assert (9 in caption_ids(text, rows, 9, lambda part: [1] * len(part.split()))) == answer
    assert (called([(concept, 1.0)], text) == (0,)) == answer
    assert (99 in tokenize([text], {word: [99]})[0].tolist()) == answer
    if answer and word.startswith("<"):
        assert word not in unknown_words(text, [word])


@pytest.fixture(scope="module")
def base(weights):
    return load_toy_base(weights)


@pytest.mark.parametrize("caption", ["一张<tom>的照片", "photo of<tom>", "two <tom>s"])
def test_a_caption_that_the_check_lets_pass_is_heard_in_training(base, caption):
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    check_training(base, Subject("tom", pictures, [caption] * 2, "man"), TrainSettings(slot=0))
    assert (base.trigger_positions([caption], {"<tom>": torch.zeros(2, 128)}) >= 0).all()


def test_a_caption_in_which_the_word_is_not_heard_is_refused(base):
    class Plain(Subject):
        trigger = "sks"

    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with pytest.raises(AdapterError, match="does not contain the trigger word sks"):
        check_training(base, Plain("sks", pictures, ["two asks"] * 2, "man"), TrainSettings(slot=0))
