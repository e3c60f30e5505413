"""What fusion and Custom Diffusion's merge are told of a concept is what its layers and its word really say."""

from dataclasses import replace

import pytest
import torch
from laws import relative_error
from untrained_toy import filled_concept, untrained_base

from bench.ordinary_text import CLASS_OF, answers, held_out, made, rows_of, wrong_on_words
from modular_concepts.errors import AdapterError
from modular_concepts.merging import Evidence, merge_concepts
from modular_concepts.recording import BATCH, PADDING, length_of, recorded, text_features, usual_rows, usual_text
from modular_concepts.sampling import SampleSettings, customised
from modular_concepts.text.ordinary import CAPTIONS
from modular_concepts.toy import model
from modular_concepts.toy.base import load_toy_base

PROMPTS = ("a {concept} on the beach", "a {concept}")
BRIEF = SampleSettings(steps=2, cfg=1.0)
KEY = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


def test_every_layer_of_the_concept_is_recorded_and_text_layers_read_its_text():
    base, concept = untrained_base(), filled_concept("kodo", 1)
    recorder = recorded(base, concept, PROMPTS, 2, BRIEF)
    assert set(recorder.sums) == set(concept.layers)
    with customised(base, [concept], [1.0]) as tokens:
        rows = base.context(["a <kodo> on the beach", "a <kodo>"], tokens).flatten(0, 1).double()
    assert relative_error(recorder.matrices()[KEY], rows.mT @ rows / len(rows)) < 1e-5
    again = recorded(base, concept, PROMPTS, 2, BRIEF)
    assert all(torch.equal(again.sums[name], total) for name, total in recorder.sums.items())


def test_text_features_are_the_triggers_rows_and_the_end_mark():
    base, concept = untrained_base(), filled_concept("kodo", 1)
    found = text_features(base, concept, PROMPTS)
    assert found.shape == (2 * 3, base.embedding.embedding_dim)
    with customised(base, [concept], [1.0]) as tokens:
        context = base.context(["a <kodo> on the beach"], tokens)[0]
    assert torch.equal(found[:3], context[2:5])


def test_custom_diffusions_merge_answers_both_concepts_words():
    base, pair = untrained_base(), [filled_concept(name, seed) for seed, name in enumerate(("kodo", "minka"))]
    texts = [text_features(base, concept, PROMPTS) for concept in pair]
    merged = merge_concepts(
        pair, [1.0, 1.0], "custom_diffusion", evidence=Evidence(texts=texts, usual=usual_text(base))
    )
    for concept, rows in zip(pair, texts, strict=True):
        wanted = rows.double() @ concept.layers[KEY].delta().double().mT
        assert relative_error(rows.double() @ merged[KEY].delta().double().mT, wanted) < 0.02
        assert relative_error(sum(rows.double() @ c.layers[KEY].delta().double().mT for c in pair), wanted) > 0.2


def test_ordinary_captions_count_to_their_end_mark_and_padding_as_a_few_rows():
    base, captions = untrained_base(), ["a dog", "a red car on the beach"]
    contexts = base.context(captions, {}).double()
    rows, weights = contexts.flatten(0, 1), torch.ones(2, 40, dtype=torch.float64)
    for number, length in enumerate((4, 8)):  # start, words and end
        weights[number, length:] = PADDING / (40 - length)
    wanted = (rows * weights.flatten()[:, None]).mT @ rows / weights.sum()
    assert weights.sum().item() == pytest.approx(4 + 8 + 2 * PADDING)
    assert relative_error(usual_text(base, captions), wanted) < 1e-6
    assert relative_error(usual_text(base, captions), rows.mT @ rows / len(rows)) > 1e-2
    assert length_of([0, 5, 6, 1, 1, 1], 1) == 4 and length_of([1, 5, 6], 1) == 3
    many = usual_text(base)
    assert len(base.ordinary) > BATCH and many.shape == wanted.shape
    half = len(base.ordinary) // 2
    contexts = [context for text in base.ordinary for context in base.context([text], {})]
    lengths = [length_of(ids, 1) for ids in base.tokenize(base.ordinary, {}).tolist()]
    assert relative_error(usual_rows(contexts, lengths), many) < 1e-5
    assert relative_error(usual_rows(contexts[:half], lengths[:half]), many) > 1e-3


def test_every_base_has_a_broad_list_of_captions_of_its_own():
    base = untrained_base()
    assert len(set(CAPTIONS)) == len(CAPTIONS) >= 192 and all(text.isascii() and "{" not in text for text in CAPTIONS)
    assert len(set(base.ordinary)) >= 150 and not any(base.unknown_words(text, []) for text in base.ordinary)


@pytest.mark.skipif(not (model.WEIGHTS / "unet.safetensors").is_file(), reason="the toy base is not trained")
def test_unseen_captions_move_no_more_than_a_concepts_own_answer():
    """With padding, which the layers read too, and without; the sum moves them half as much again, and more."""
    base = load_toy_base()
    concepts, unseen = [made(base, name) for name in CLASS_OF], held_out(base)
    assert len(unseen) > 20
    texts = [text_features(base, concept) for concept in concepts]
    evidence = Evidence(texts=texts, usual=usual_text(base))
    merged = merge_concepts(concepts, [1.0] * 3, "custom_diffusion", evidence=evidence)
    own = sum(answers(merge_concepts([c], [1.0]), t.double()) for c, t in zip(concepts, texts, strict=True)) / 3
    assert wrong_on_words(merged, concepts, texts) < 1e-3
    for padding in (False, True):
        rows = rows_of(base, unseen, padding)
        assert 0.1 * own < answers(merged, rows) < 1.1 * own
        assert answers(merge_concepts(concepts, [1.0] * 3), rows) > 1.4 * own


def test_concepts_that_cannot_be_asked_for_are_refused():
    base, concept = untrained_base(), filled_concept("kodo", 1)
    with pytest.raises(AdapterError, match="kodo has no trigger word"):
        recorded(base, replace(concept, tokens={}, recipe=replace(concept.recipe, triggers=())), PROMPTS, 1, BRIEF)
    layered = replace(concept, tokens={"<kodo>": concept.tokens["<kodo>"].repeat(4, 1, 1)})
    with pytest.raises(AdapterError, match="for each layer apart"):
        text_features(base, layered, PROMPTS)
