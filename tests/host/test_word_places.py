"""Where conditionings say learned words, whichever of the host's nodes encoded them and put them together."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from comfy_extras.nodes_clip_sdxl import CLIPTextEncodeSDXL
from modular_concepts_pack.host.text import word_places
from modular_concepts_pack.host.text.word_places import NOTE, wording_of
from modular_concepts_pack.host.text.words import encode_prompt, with_tokens, word_positions
from modular_concepts_pack.host.toy_base import load_clip

import nodes

LONG = " ".join(["a dog and a car"] * 20)  # of several sections


@pytest.fixture(scope="module")
def clips():
    """(a CLIP that knows <tom> of two rows and <ida> of one, the base's own)."""
    generator, clip = torch.Generator().manual_seed(1), load_clip()
    rows = {word: 0.1 * torch.randn(count, 128, generator=generator) for word, count in (("<tom>", 2), ("<ida>", 1))}
    return with_tokens(clip, rows), clip


def encode(clip, text: str) -> list:
    with torch.inference_mode():
        return nodes.CLIPTextEncode().encode(clip, text)[0]


def wording(conditioning: list) -> word_places.Wording:
    (entry,) = conditioning
    return wording_of(entry[0], entry[1].get(NOTE))


def places(conditioning: list) -> dict[str, list[int]]:
    return {word: list(*texts) for word, texts in wording(conditioning).places.items()}


@pytest.mark.parametrize(
    "text",
    ["", "a dog", "a <tom>", "<ida> and a <Tom> and (<tom>:1.3), <ida>", f"{LONG} <tom>", f"<tom> {LONG} <tom> <ida>"],
)
def test_a_text_says_where_its_words_stand(clips, text):
    clip, _ = clips
    expected = {word: word_positions(clip, text, word) for word in ("<tom>", "<ida>") if word in text.lower()}
    assert places(encode(clip, text)) == expected and all(expected.values())
    assert wording(encode(clip, text)).length == encode(clip, text)[0][0].shape[1]


def test_the_base_says_nothing_and_its_texts_are_the_same_to_the_last_bit(clips):
    clip, base = clips
    first, knowing, then = encode(base, "a man"), encode(clip, "a man"), encode(base, "a man")
    assert torch.equal(first[0][0], knowing[0][0]) and torch.equal(then[0][0], knowing[0][0])
    assert NOTE in knowing[0][1] and NOTE not in first[0][1] and NOTE not in then[0][1]
    assert base.cond_stage_model is base.patcher.model is clip.patcher.model
    assert NOTE in encode(clip.clone(), "a man")[0][1]


def test_texts_behind_each_other_say_the_words_of_both(clips):
    clip, base = clips
    tom, ida, man = encode(clip, "a <tom>"), encode(clip, "a dog, <ida>"), encode(base, "a man")
    concat = nodes.ConditioningConcat().concat
    assert places(concat(tom, ida)[0]) == {"<tom>": [2, 3], "<ida>": [40 + 4]}
    assert places(concat(man, tom)[0]) == {"<tom>": [42, 43]}
    assert places(concat(concat(ida, man)[0], tom)[0]) == {"<tom>": [82, 83], "<ida>": [4]}
    assert not wording(concat(man, tom)[0]).mixed
    forgetful = [[tom[0][0], {}]]  # as a node that makes a new conditioning, or the host's own with scheduled hooks
    assert places(forgetful) == {"<tom>": [2, 3]}


def test_blended_texts_say_the_words_of_the_first_and_that_there_may_be_more(clips):
    clip, _ = clips
    tom, ida = encode(clip, "a <tom>"), encode(clip, "a dog, <ida>")
    for share in (0.3, 1.0):
        (blended,) = nodes.ConditioningAverage().addWeighted(tom, ida, share)
        assert places(blended) == {"<tom>": [2, 3]} and wording(blended).mixed == (share < 1)
    (nothing,) = nodes.ConditioningZeroOut().zero_out(tom)
    assert not wording(nothing).mixed
    halved = [[tom[0][0].half(), tom[0][1]]]
    assert places(halved) == {"<tom>": [2, 3]}


def test_a_batch_of_texts_has_the_places_of_each(clips):
    clip, _ = clips
    tom, ida = encode(clip, "a <tom>"), encode(clip, "a dog, <ida>")
    both = wording_of(torch.cat([tom[0][0], ida[0][0]]), tom[0][1][NOTE])
    assert both.places == {"<tom>": ((2, 3), ()), "<ida>": ((), (4,))} and both.texts == 2


def test_a_word_that_reads_like_another_is_told_from_it_by_the_note(clips):
    clip, base = clips
    with torch.inference_mode():
        table = base.patcher.model.clip_l.transformer.get_input_embeddings().weight
    row = next(token for section in base.tokenize("man")["l"] for token, _ in section[1:2])
    same = with_tokens(base, {"<man>": table[row : row + 1].float().clone()})
    word, plain = encode(same, "a <man>"), encode(clip, "a man")
    assert torch.equal(word[0][0], plain[0][0])
    assert places(word) == {"<man>": [2]} and places(plain) == {}
    assert places(nodes.ConditioningConcat().concat(word, plain)[0]) == {"<man>": [2]}


def test_what_is_remembered_has_a_bound(clips, monkeypatch):
    clip, _ = clips
    first = encode(clip, "a dog and <tom>")
    monkeypatch.setattr(word_places, "MOST", 4)
    for count in range(1, 6):
        encode(clip, f"a car {'and ' * count}<ida>")
    assert len(word_places._remembered) == 4
    assert places(first) == {"<tom>": [4, 5]} and places([[first[0][0], {}]]) == {}


def test_two_text_models_say_the_words_of_either(checkpoint):
    _, base, _ = tiny_models.load(checkpoint("vega"))
    clip = with_tokens(base, {"<tom>": 0.1 * torch.randn(2, 2048, generator=torch.Generator().manual_seed(1))})
    with torch.inference_mode():
        (apart,) = CLIPTextEncodeSDXL.execute(clip, 64, 64, 0, 0, 64, 64, "a <tom>", f"{LONG} <tom>").args
        plain = encode_prompt(clip, "a (<tom>:1.2)")
    assert places(plain) == {"<tom>": [2, 3]}
    long = word_positions(clip, f"{LONG} <tom>", "<tom>")
    assert long[0] > 77 and places(apart) == {"<tom>": [2, 3, *long]}
    assert apart[0][0].shape[1] == wording(apart).length > long[-1]
