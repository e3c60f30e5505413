"""The regional nodes: one meaning from widgets, JSON and boxes; the all-in-one sampler and the parts draw the same."""

from __future__ import annotations

import pytest
import regional_calls
import torch
from laws import relative_error
from made_concepts import made_concept

from modular_concepts.files.concept import save_concept


@pytest.fixture(scope="module")
def found(folder, replaced):
    """(tensors, facts)."""
    for concept in (made_concept("tom"), made_concept("rex", slot=1)):
        save_concept(concept, folder / f"{concept.name}.safetensors")
    found, facts = regional_calls.called(folder, replaced)
    return {key: value.float().clone() for key, value in found.items()}, facts


@pytest.mark.parametrize("mode", ["gated", "merged"])
def test_the_parts_draw_with_a_ksampler_what_the_sampler_draws(found, mode):
    tensors, _ = found
    assert torch.equal(tensors[f"{mode} in parts"], tensors[mode])


def test_the_modes_are_two(found):
    tensors, _ = found
    assert relative_error(tensors["gated"], tensors["merged"]) > 1e-2


def test_regions_mean_the_same_from_widgets_json_and_boxes(found):
    tensors, facts = found
    assert facts["same"] and facts["drawn"] and facts["stack"] == [["tom", 1.0], ["rex", 1.0]]
    assert facts["boxed"] == [(32, 0, 64, 32), True, ("rex",), 0.1, 0.9, 3] and facts["nobody"] == []
    assert relative_error(tensors["pixels"], tensors["gated"]) < 1e-5


def test_a_region_below_all_others_is_not_seen(found):
    tensors, _ = found
    assert relative_error(tensors["below"], tensors["gated"]) < 1e-5
    assert relative_error(tensors["shared"], tensors["gated"]) > 1e-2


def test_what_a_widget_cannot_mean_is_told_before_anything_runs(found):
    _, facts = found
    assert facts["json problem"] == "region 1: prompt must be text; got 3" and facts["json fine"] is True
    assert "holds from 0.6 to 0.4 of the sampling" in facts["window problem"]


def test_a_trigger_word_that_nothing_here_knows_is_told_of(found):
    said = found[1]["said"]
    assert said["known"] == []
    for title, word in (("unknown", "<bob>"), ("bare", "<tom>"), ("prompt", "<bob>")):
        assert [word in sentence and "connect its concept" in sentence for sentence in said[title]] == [True], title


def test_the_preview_is_shown_and_handed_on(found):
    tensors, facts = found
    assert tensors["preview"].shape[3] == 3 and tensors["preview"].std() > 0.05 and "images" in facts["shown"]


def test_places_are_found_for_regions_without_one(found):
    tensors, facts = found
    masks = tensors["masks"]
    assert masks.shape == (2, 32, 64) and facts["placed"] == [True, True] and facts["automatic problem"] is True
    assert masks.sum(0).max() <= 1 + 1e-6 and all(0.02 < float(mask.mean()) < 0.98 for mask in masks)
    assert torch.isfinite(tensors["automatic"]).all()


@pytest.mark.parametrize(
    ("title", "words"),
    [
        ("unknown", "asks for the concept 'nobody', and there is none of that name"),
        ("outside", "reaches to (99, 32), but the picture is only 64 x 32 pixels"),
        ("drawn", "no region is drawn; drag a box on the Draw Regions node"),
        ("none", "there is no region to show; connect a Concept Region"),
        ("lost", "has no place"),
        ("mode", "melted"),
        ("boxes", "there are 2 bounding boxes; give one, a region for each"),
    ],
)
def test_bad_input_is_refused_in_plain_words(found, title, words):
    said = found[1]["refused"][title]
    assert said.startswith("AdapterError") and words in said
