"""Hooks on a compiled network, which does not look for them: concepts act all the same, and a sentence says how."""

from __future__ import annotations

import compiled_pictures
import pytest
import torch
from laws import relative_error
from made_concepts import made_concept
from modular_concepts_pack.modular_concepts.files.concept import load_concept

from modular_concepts.files.concept import save_concept


@pytest.fixture(scope="module")
def found(folder, warnings):
    """(pictures, what was said while each was drawn)."""
    concept = made_concept("tom")
    louder = {name: own.replace(alpha=20 * own.alpha) for name, own in concept.layers.items()}
    save_concept(concept.__class__("tom", louder, concept.tokens, concept.recipe), folder / "tom.safetensors")
    found, said = compiled_pictures.drawn(load_concept(folder / "tom.safetensors"), warnings)
    return {title: value.clone() for title, value in found.items()}, said


@pytest.mark.parametrize("what", ["1.0", "0.3", "gated"])
def test_concepts_by_hooks_act_on_a_network_that_was_compiled_and_traced_before(found, what):
    tensors, said = found
    assert relative_error(tensors[f"compiled|{what}"], tensors[f"plain|{what}"]) < 1e-5
    assert relative_error(tensors[f"plain|{what}"], tensors["base"]) > 1e-2
    (sentence,) = said[f"compiled|{what}"]
    assert "the model is compiled" in sentence
    assert ("choose the merged mode" if what == "gated" else "set apply to weights") in sentence
    assert said[f"plain|{what}"] == []


def test_the_compiled_network_keeps_nothing_of_them(found):
    tensors, said = found
    for title in ("compiled|base", "compiled|base afterwards"):
        assert relative_error(tensors[title], tensors["base"]) < 1e-5 and said[title] == []


def test_a_network_that_is_compiled_after_the_merge_is_told_of_once(found):
    tensors, said = found
    for title in ("compiled later|1.0", "compiled later|again"):
        assert relative_error(tensors[title], tensors["plain|1.0"]) < 1e-5
    assert len(said["compiled later|1.0"]) == 1 and said["compiled later|again"] == []


def test_a_block_that_is_compiled_in_place_is_heard_too(found):
    tensors, said = found
    for what in ("1.0", "gated"):
        assert relative_error(tensors[f"in place|{what}"], tensors[f"plain|{what}"]) < 1e-5
        assert "the model is compiled" in said[f"in place|{what}"][0]


def test_moments_are_recorded_from_a_compiled_network(found):
    assert found[1]["recorded"]


@pytest.mark.parametrize("title", ["activations", "gated"])
def test_a_layer_that_a_kernel_goes_around_is_named(found, title):
    (sentence,) = found[1][f"fused|{title}"]
    assert sentence.startswith("1 of ") and "are computed without being called" in sentence
    assert torch.isfinite(found[0][f"fused|{title}"]).all()
