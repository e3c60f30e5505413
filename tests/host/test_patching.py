"""Concepts in the host's weights: the engine's own sums, the stock loader's, and a base that stays as it was."""

from __future__ import annotations

import pytest
import torch
from laws import relative_error
from made_concepts import made_concept, toy_base, wide_concept
from merged_weights import merged_weights

from modular_concepts.files.concept import save_concept
from modular_concepts.merging import merge_concepts

STRENGTHS = {"tom": 0.7, "rex": 1.0, "wide": -0.5, "none": 0.0, "first": 1.0, "second": 0.6}
MERGES = [
    ["one", ["tom"], "ConceptMerge", "sum"],
    ["sum", ["tom", "rex", "wide"], "ConceptMerge", "sum"],
    ["mean", ["tom", "rex", "wide"], "ConceptMerge", "mean"],
    ["zero", ["none"], "ConceptMerge", "sum"],
    ["block", ["first", "second"], "BlockLoRAMerge", "as set"],
    ["literal", ["first", "second"], "BlockLoRAMerge", "sum to one"],
]


@pytest.fixture(scope="module")
def concepts():
    return {
        "tom": made_concept("tom"),
        "rex": made_concept("rex", slot=1),
        "wide": wide_concept(),
        "none": made_concept("none", slot=2),
        "first": made_concept("first", "block", blocks=5, slot=0),
        "second": made_concept("second", "block", blocks=5, slot=3),
    }


@pytest.fixture(scope="module")
def found(folder, warnings, concepts):
    """(tensors, facts, names of the layers)."""
    for name, concept in concepts.items():
        save_concept(concept, folder / "concepts" / f"{name}.safetensors")
    layers = sorted(concepts["wide"].layers)
    plan = {"strengths": STRENGTHS, "merges": MERGES, "layers": layers}
    found, facts = merged_weights(plan, folder, warnings)
    return {key: value.float().clone() for key, value in found.items()}, facts, layers


@pytest.mark.parametrize(("title", "names", "node", "option"), MERGES, ids=[merge[0] for merge in MERGES])
def test_merged_weights_are_the_base_and_the_engines_delta(found, concepts, title, names, node, option):
    tensors, facts, layers = found
    chosen, strengths = [concepts[name] for name in names], [STRENGTHS[name] for name in names]
    how = "block" if node == "BlockLoRAMerge" else option
    merged = merge_concepts(chosen, strengths, how, literal=option == "sum to one")
    moved = 0.0
    for layer in layers:
        base, now = tensors[f"base|{layer}"], tensors[f"{title}|{layer}"]
        if layer not in merged or title == "zero":
            assert torch.equal(now, base), layer
            continue
        delta = merged[layer].delta().reshape(base.shape)
        assert relative_error(now, base + delta) < 1e-6, layer
        moved = max(moved, relative_error(now, base))
    assert moved > 1e-2 or title == "zero"
    assert facts["layers_patched"][title] == (0 if title == "zero" else len(merged))
    # Where a patch computes in half precision, as on a GPU, even a sum of nothing would round the weight.
    assert facts["patches"][title] == (0 if title == "zero" else len(merged))
    assert facts["inside"][title] == names


def test_one_adapter_for_each_layer_however_many_concepts(found):
    assert found[1]["patches_per_layer"] == [1]


def test_the_stock_loader_gives_the_same_weights_and_words(found):
    tensors, facts, layers = found
    assert facts["lora_warnings"] == []
    for layer in layers:
        assert relative_error(tensors[f"stock|{layer}"], tensors[f"one|{layer}"]) < 1e-6, layer
    assert relative_error(tensors["word_stock"], tensors["word"]) < 1e-6


def test_a_word_follows_the_strength_of_its_concept(found):
    tensors, _, _ = found
    assert torch.equal(tensors["word_at_none"], tensors["class_words"])
    assert torch.equal(tensors["word_at_none"], tensors["word_named_again"])


def test_a_clip_learns_words_in_turn_as_well_as_at_once(found, concepts):
    tensors, _, _ = found
    assert torch.equal(tensors["words_in_turn"], tensors["words_at_once"])
    assert torch.equal(tensors["words_of_node"], tensors["words_at_once"])
    words = {word: rows for name in ("tom", "rex") for word, rows in concepts[name].tokens.items()}
    headless = toy_base().context(["a <rex> dog and a <tom> man"], words)
    assert relative_error(tensors["words_at_once"], headless) < 1e-5
    assert relative_error(tensors["words_unknown"], headless) > 1e-2


def test_bypass_computes_what_merged_weights_compute(found):
    tensors, _, _ = found
    assert relative_error(tensors["by_bypass"], tensors["by_weight"]) < 1e-5
    assert relative_error(tensors["by_base"], tensors["by_weight"]) > 1e-2


def test_the_loaded_base_is_untouched_after_everything(found):
    tensors, facts, _ = found
    assert len(facts["untouched"]) > len(MERGES)
    assert all(facts["untouched"]) and all(facts["clean"])
    assert relative_error(tensors["drawn|-0.5"], tensors["drawn|1.0"]) > 1e-2


@pytest.mark.parametrize(
    ("title", "words"),
    [
        ("twice", "tom is in this model already"),
        ("other word", "<tom> means another concept in this CLIP already"),
        ("other case", "<Tom> and <tom> are one word"),
        ("two cases", "<nEw> and <New> are one word"),
        ("narrow word", "<new>: the learned tokens are 768 wide, the text model's 128"),
        ("nothing", "there is nothing to merge"),
    ],
)
def test_what_cannot_be_merged_is_refused_in_plain_words(found, title, words):
    said = found[1]["refused"][title]
    assert said.startswith("AdapterError: ") and words in said
