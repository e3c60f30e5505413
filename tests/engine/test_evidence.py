"""What fusion and Custom Diffusion's merge are told of a concept is what its layers and its word really say."""

from dataclasses import replace

import pytest
import torch
from laws import relative_error
from untrained_toy import filled_concept, untrained_base

from modular_concepts.customisation import customised
from modular_concepts.errors import AdapterError
from modular_concepts.evidence import recorded, text_features, usual_text
from modular_concepts.merge import Evidence, merge_concepts
from modular_concepts.sampling import SampleSettings

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


def test_concepts_that_cannot_be_asked_for_are_refused():
    base, concept = untrained_base(), filled_concept("kodo", 1)
    with pytest.raises(AdapterError, match="kodo has no trigger word"):
        recorded(base, replace(concept, tokens={}, recipe=replace(concept.recipe, triggers=())), PROMPTS, 1, BRIEF)
    layered = replace(concept, tokens={"<kodo>": concept.tokens["<kodo>"].repeat(4, 1, 1)})
    with pytest.raises(AdapterError, match="for each layer apart"):
        text_features(base, layered, PROMPTS)
