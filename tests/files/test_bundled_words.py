"""Words that come in a LoRA's own file are learned words of its concept; one that cannot be costs the LoRA nothing."""

import json
from pathlib import Path

import pytest
import torch
from laws import seeded
from safetensors.torch import load_file, save_file

from modular_concepts.files.bundled import with_plain_words
from modular_concepts.files.concept import load_concept, save_concept
from modular_concepts.files.embeddings import export_embeddings, import_embedding
from modular_concepts.files.lora import lora_concept, read_concept
from modular_concepts.merging.as_concept import merged_concept
from modular_concepts.merging.compatibility import faded_words

ATTENTION = "down_blocks_0_attentions_0_transformer_blocks_0"
LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


def rows(*shape, seed=0):
    return 0.05 * torch.randn(*shape, generator=seeded(seed))


def lora(width=768, layer="attn2_to_k", part="lora_unet", block=ATTENTION):
    stem = f"{part}_{block}_{layer}"
    return {
        f"{stem}.lora_up.weight": rows(320, 2, seed=1),
        f"{stem}.lora_down.weight": rows(2, width, seed=2),
        f"{stem}.alpha": torch.tensor(2.0),
    }


def read(tmp_path, words, metadata=None, **layers):
    """(the concept, its notes as one text) of a LoRA with further keys, its layers read whatever else there is."""
    save_file(lora(**layers) | words, tmp_path / "x.safetensors", metadata)
    imported = read_concept(tmp_path / "x.safetensors")
    assert len(imported.concept.layers) == 1
    return imported.concept, "\n".join(imported.notes("x.safetensors"))


STAR = "string_to_param.*"
PAIR = {"clip_l": rows(2, 768, seed=3), "clip_g": rows(2, 1280, seed=4)}


def bundle(word, parts):
    return {f"bundle_emb.{word}.{part}": tensor for part, tensor in parts.items()}


@pytest.mark.parametrize("word", ["mybuddy", "<s0>", "my.dotted.word", "a.string_to_param.b", "köter", "狗", "x_1"])
@pytest.mark.parametrize("part", [STAR, "emb_params", "string_to_param.265"])
def test_a_word_of_one_text_encoder(tmp_path, word, part):
    concept, notes = read(tmp_path, bundle(word, {part: rows(2, 768)}))
    assert torch.equal(concept.tokens[word], rows(2, 768)) and concept.recipe.triggers == (word,)
    assert notes == ""


@pytest.mark.parametrize("width", [768, 2048])
def test_a_word_of_two_text_encoders_has_clip_l_first(tmp_path, width):
    concept, notes = read(tmp_path, bundle("mybuddy", PAIR), width=width)
    assert torch.equal(concept.tokens["mybuddy"], torch.cat([PAIR["clip_l"], PAIR["clip_g"]], dim=1)) and not notes


def test_several_words_of_any_type_in_one_file(tmp_path):
    words = bundle("one", {STAR: rows(768)}) | bundle("two", {STAR: rows(3, 768).half()})
    concept, notes = read(tmp_path, words, {"modelspec.trigger_phrase": "photo of one, style"})
    assert {word: tuple(own.shape) for word, own in concept.tokens.items()} == {"one": (1, 768), "two": (3, 768)}
    assert all(own.dtype == torch.float32 for own in concept.tokens.values())
    assert concept.recipe.triggers == ("photo of one", "style", "two") and not notes


LEFT_OUT = {
    "spaces": ("my buddy", {STAR: rows(2, 768)}, "without spaces"),
    "a space that does not break": ("my\u00a0buddy", {STAR: rows(2, 768)}, "without spaces"),
    "a slash": ("style/tom", {STAR: rows(2, 768)}, "a slash"),
    "a backslash": ("style\\tom", {STAR: rows(2, 768)}, "a backslash"),
    "a way up": ("../../tom", {STAR: rows(2, 768)}, "a slash"),
    "brackets": ("(tom)", {STAR: rows(2, 768)}, "a bracket"),
    "nothing": ("", {STAR: rows(2, 768)}, "without spaces"),
    "signs that nobody sees": ("to\u200bm", {STAR: rows(2, 768)}, "printable"),
    "a length": ("x" * 450, {"clip_l": rows(2, 768)}, "at most 400"),
    "another width": ("tom", {STAR: rows(2, 1024)}, "1024 wide, and the texts that the LoRA's model reads 768"),
    "half of two text encoders": ("tom", {"clip_g": rows(2, 1280)}, "clip_l is missing"),
    "rows that do not go together": ("tom", PAIR | {"clip_g": rows(3, 1280)}, "clip_l has 2 rows and clip_g 3"),
    "two layouts": ("tom", PAIR | {STAR: rows(2, 768)}, "there twice"),
    "two parameters": ("tom", {STAR: rows(2, 768), "string_to_param.1": rows(2, 768)}, "there twice"),
    "no numbers": ("tom", {STAR: torch.full((2, 768), torch.nan)}, "nan"),
    "infinity": ("tom", {STAR: rows(2, 768) / 0}, "inf"),
    "numbers that overflow": ("tom", {STAR: 1e30 * rows(2, 768)}, "numbers reach"),
    "no rows": ("tom", {STAR: torch.zeros(0, 768)}, "empty"),
    "no width": ("tom", {STAR: torch.zeros(2, 0)}, "empty"),
    "a single number": ("tom", {STAR: torch.tensor(1.0)}, "no rows of numbers"),
    "ten thousand rows": ("tom", {STAR: torch.zeros(10000, 768)}, "10000 rows"),
    "three dimensions": ("tom", {STAR: rows(2, 2, 768)}, "no rows of numbers"),
    "another text encoder": ("tom", {"clip_h": rows(2, 1024)}, "1024 wide"),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_a_word_that_cannot_be_costs_the_lora_nothing(tmp_path, case):
    word, parts, why = LEFT_OUT[case]
    concept, notes = read(tmp_path, bundle(word, parts))
    assert not concept.tokens and not concept.recipe.triggers
    (sentence,) = notes.splitlines()
    assert sentence.startswith("x.safetensors: the learned word ") and why in sentence and sentence.isprintable()
    assert (word[:30] if word.isprintable() else ascii(word)[1:30]) in sentence


@pytest.mark.parametrize("part", ["t5", "t5xxl", "clip_l_out", f"{STAR}_out"])
def test_rows_without_a_place_are_named_and_the_word_is_there(tmp_path, part):
    concept, notes = read(tmp_path, bundle("tom", PAIR | {part: rows(2, 64)}))
    assert tuple(concept.tokens["tom"].shape) == (2, 2048)
    assert notes.startswith("x.safetensors: rows for ") and "of the learned word tom have no place" in notes


def test_words_that_differ_by_case_alone_are_one_in_prompts(tmp_path):
    concept, notes = read(tmp_path, bundle("Tom", {STAR: rows(2, 768)}) | bundle("tom", {STAR: rows(1, 768)}))
    assert list(concept.tokens) == ["Tom"] and "the learned word tom is left out" in notes


SDXL, SD1 = {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, {"ss_base_model_version": "sd_v1"}


ONE, HALF = {STAR: rows(2, 768)}, {"clip_l": rows(2, 768)}
FAMILIES = [(PAIR, SDXL, True), (PAIR, SD1, False), (ONE, SDXL, False), (ONE, None, True)]
FAMILIES += [(HALF, SDXL, False), (HALF, SD1, True), (HALF, None, False)]


@pytest.mark.parametrize(("parts", "metadata", "taken"), FAMILIES)
def test_the_family_says_which_rows_are_whole(tmp_path, parts, metadata, taken):
    concept, notes = read(tmp_path, bundle("tom", parts), metadata, layer="attn1_to_k", width=320)
    assert bool(concept.tokens) == taken
    assert ("learned word tom" in notes) == (not taken or parts is HALF)


def test_a_model_at_hand_knows_how_wide_its_texts_are():
    shapes = {LAYER: (320, 768)}
    imported = lora_concept(Path("x"), lora() | bundle("tom", PAIR), {}, shapes=shapes)
    assert not imported.concept.tokens and "2048 wide" in imported.notes("x")[0]


def test_words_survive_files_and_merges_and_go_to_embeddings(tmp_path):
    concept, _ = read(tmp_path, bundle("tom", PAIR))
    save_concept(concept, tmp_path / "y.safetensors")
    loaded = load_concept(tmp_path / "y.safetensors")
    assert torch.equal(loaded.tokens["tom"], concept.tokens["tom"]) and loaded.recipe.triggers == ("tom",)
    other, _ = read(tmp_path, bundle("ann", {STAR: rows(1, 768)}))
    merged = merged_concept("both", [loaded, other], [0.5, 1.0])
    assert set(merged.tokens) == {"tom", "ann"} and merged.recipe.triggers == ("tom", "ann")
    (file,) = export_embeddings(loaded, tmp_path)
    assert set(load_file(file)) == {"clip_l", "clip_g"}
    assert torch.equal(import_embedding(file, "tom")[1], concept.tokens["tom"])


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0, 1.5])
def test_a_word_fades_to_the_same_letters_as_plain_text(tmp_path, strength):
    concept, _ = read(tmp_path, bundle("tom", {STAR: rows(2, 768)}))
    plain = {"tom": rows(1, 768, seed=9)}
    expected = torch.lerp(plain["tom"].expand(2, -1), rows(2, 768), min(1.0, strength))
    assert torch.allclose(faded_words([concept], [strength], plain.get)["tom"], expected)
    assert torch.equal(faded_words([with_plain_words(concept)], [1.0], plain.get)["tom"], plain["tom"].expand(2, -1))


def test_a_list_of_words_that_is_no_list_changes_nothing(tmp_path):
    """Keys that only look like a bundle's find no place, as before."""
    strange = {"bundle_emb.tom": rows(2, 768), "bundle_emb.tom.vectors": rows(2, 768), "bundle_emb": rows(2, 768)}
    concept, notes = read(tmp_path, strange, {"modular_concepts_tokens": json.dumps({"tom": 1})})
    assert not concept.tokens and all(key in notes for key in strange)
