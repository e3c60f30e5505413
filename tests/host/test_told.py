"""In the host nothing is passed over, and regions hold for any guider, second pass and node behind them."""

from __future__ import annotations

import hints
import pytest
from made_concepts import made_concept

from modular_concepts.files.concept import save_concept

SHARED = "has taken over the model's cross-attention, which regions cannot share"


@pytest.fixture(scope="module")
def facts(folder, replaced):
    save_concept(made_concept("tom"), folder / "tom.safetensors")
    return hints.heard(folder, replaced)


def test_concepts_that_nobody_calls_are_told_with_the_way_out(facts):
    assert "sketch has no trigger word that could call it, so it acts nowhere" in facts["lora"]
    assert "name it in the concepts of a region" in facts["lora"]
    assert "no prompt says <tom>, so tom acts nowhere" in facts["tom"]
    assert "regions name the concepts tom" in facts["tom merged"] and "gated mode alone" in facts["tom merged"]
    assert facts["lora named"] == facts["tom at 0"] == ""


def test_regions_that_hardly_draw_are_told(facts):
    assert "'a cat in the snow' is smaller than what can be drawn" in facts["too small"]
    assert "'a cat in the snow' and 'a dog' are in the same place: they share it" in facts["one place"]


def test_a_prompt_says_which_words_it_hears(facts):
    assert facts["prompt called"] == "" and facts["the same with and without spaces"]
    assert facts["prompt uncalled"] == "the prompt says no trigger word of tom, so connecting it here changes nothing"
    assert "trigger word <tim>" in facts["prompt unknown"] and "<tom>" not in facts["prompt unknown"]


IDLE = {
    "basis": "kind and seed change nothing: the basis is a file",
    "mask": "right changes nothing: the mask takes their place",
    "mask and bounding box": "bounding_box changes nothing: the mask takes their place",
    "bounding box": "right changes nothing: the bounding box takes their place",
    "automatic": "right and feather change nothing: with automatic units the sampler finds the place",
    "preview": "width changes nothing: the image has a size",
    "masks": "no entry names mask 0, 2, counted from 0, so that changes nothing",
    "no guidance": "negative changes nothing: cfg is 1, which is no guidance",
    "finding": "negative changes nothing: cfg is 1, which is no guidance",
    "priority": "priority changes nothing: overlap is set to average",
    "name": "name changes nothing: files have their own names",
}


@pytest.mark.parametrize("title", IDLE)
def test_inputs_that_mean_nothing_beside_others_are_told(facts, title):
    assert IDLE[title] in facts["idle"][title].splitlines()


def test_inputs_that_are_read_or_as_they_start_are_not_told(facts):
    quiet = set(facts["idle"]) - set(IDLE)
    assert len(quiet) == 10 and not any("nothing" in facts["idle"][title] for title in quiet)


def test_a_trainer_says_of_its_own_widgets_what_means_nothing(facts):
    preview = "preview_prompt changes nothing: preview_every is 0"
    for name, (idle, used) in facts["trainers"].items():
        own = {
            "OrthoLoRATrainer": ["slot changes nothing: the basis is set to take the columns from the concept's name"],
            "BlockLoRATrainer": ["rank changes nothing: the connected basis sets the rank"],
        }.get(name, [])
        assert idle == [*own, preview] and used == [], name
    assert facts["without basis"] == []


@pytest.mark.parametrize("how", ["plain", "merged", "gated"])
def test_a_guider_in_another_order_draws_the_same(facts, how):
    assert facts["guiders"][how] < 1e-4
    assert how == "plain" or facts["effect"][how] > 0.1


def test_what_a_prompt_is_that_nobody_marked_is_refused_where_its_place_does_not_tell(facts):
    assert "AdapterError: this guider asks for 3 prompts" in facts["unmarked"]
    assert facts["own negative"] == ""


@pytest.mark.parametrize("how", ["all", "one", "added", "patched"])
def test_another_attention_node_behind_is_one_sentence(facts, how):
    assert facts["displaced"][how].startswith("AdapterError: ") and SHARED in facts["displaced"][how]
    assert facts["displaced"]["none"] == ""


def test_regions_in_pixels_stay_in_place_in_a_second_pass(facts):
    assert max(facts["passes"]) < 1e-5 and facts["not first"] > 0.1


def test_widgets_that_a_method_does_not_read_are_told(facts):
    assert facts["density in sum"] == "density changes nothing: sum does not read it, but magnitude, dare, ties would"
    assert facts["density in ties"] == ""
    assert facts["nothing to resume"].startswith("resume is on, but there is no checkpoint of nobody yet")
    first, *others = facts["training"]
    assert first == "slot changes nothing" and len(others) == 4
    for sentence, words in zip(
        others,
        (
            "weight_decay changes nothing: words",
            "prior_weight changes nothing without prior_pictures",
            "text_encoder_learning_rate changes nothing: words",
            "on_change changes nothing without resume",
        ),
        strict=True,
    ):
        assert sentence.startswith(words)
