"""Regions and concepts that act at their own words alone: each word acts in the texts that say it, and in its place."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from laws import relative_error
from left_behind import traces
from made_concepts import made_concept, toy_base
from modular_concepts_pack.host.merging import by_word
from modular_concepts_pack.host.model import HostModel
from modular_concepts_pack.host.regions import sampling as regional_sampling
from modular_concepts_pack.host.regions.sampling import with_regions
from modular_concepts_pack.host.regions.scene import Scene
from modular_concepts_pack.modular_concepts.regions.geometry import Region as HostRegion
from modular_concepts_pack.modular_concepts.stack import Stack
from own_words_made import Drawn

from modular_concepts.regions.assignment import acting
from modular_concepts.regions.conditioning import Speaking
from modular_concepts.regions.geometry import Region
from modular_concepts.regions.shares import Places

LEFT, RIGHT, WHOLE = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 1.0)
TWO = [("a <tom> man", LEFT), ("a dog and an <ida>", RIGHT)]
SIZE = (64, 32)


@pytest.fixture(scope="module")
def drawn():
    return Drawn()


def regional(drawn, concepts, regions, mode, prompt="on the beach", negative="a car", **more):
    """(MODEL, positive, negative) of regions (text, box, negative of its own)."""
    placed = [HostRegion(text, box, negative=(rest or [None])[0]) for text, box, *rest in regions]
    stack = Stack((concept, 1.0) for concept in concepts)
    with torch.inference_mode():
        return with_regions(
            HostModel(drawn.model, drawn.clip), Scene(stack, placed, (prompt, negative), mode, "average", **more)
        )


@pytest.mark.parametrize("mode", ["merged", "gated"])
def test_one_region_over_everything_is_plain_sampling_to_the_last_bit(drawn, mode):
    everywhere = drawn.draw(*regional(drawn, drawn.concepts, [("a <tom> man", WHOLE)], mode))
    assert torch.equal(everywhere, drawn.picture(drawn.sum, "a <tom> man", "a car"))
    quiet = drawn.picture(drawn.without(drawn.sum), "a <tom> man", "a car")
    assert relative_error(everywhere, quiet) > 1e-3


@pytest.mark.parametrize("mode", ["merged", "gated"])
def test_other_concepts_change_no_region_that_does_not_say_them(drawn, mode):
    regions = [("a <tom> man", LEFT, "a <tom> robot"), ("a dog", RIGHT)]
    alone, among = (
        drawn.draw(*regional(drawn, concepts, regions, mode), size=SIZE)
        for concepts in (drawn.concepts[:1], drawn.concepts)
    )
    assert torch.equal(alone, among)
    two = drawn.draw(*regional(drawn, drawn.concepts, TWO, mode), size=SIZE)
    assert torch.equal(two, drawn.draw(*regional(drawn, drawn.concepts[::-1], TWO, mode), size=SIZE))
    assert relative_error(two, alone) > 1e-3


def first_call(drawn, regional_model, positive):
    """What the network was asked first, without guidance: (noisy, sigma, denoised)."""
    import nodes

    calls, model = [], regional_model.clone()

    def noted(apply, about):
        answer = apply(about["input"], about["timestep"], **about["c"])
        calls.append((about["input"].clone(), about["timestep"].clone(), answer.clone()))
        return answer

    model.set_model_unet_function_wrapper(noted)
    noise = nodes.EmptyLatentImage().generate(*SIZE)[0]
    nodes.KSampler().sample(model, 3, 1, 1.0, "euler", "normal", positive, positive, noise)
    return calls[0]


@pytest.mark.parametrize(
    ("plain", "act_on", "prompt"),
    [(False, "everywhere", "<ida> and <rex>"), (True, "own words", "a <tim>"), (True, "everywhere", "a <tim>")],
)
@torch.no_grad()
def test_the_network_has_words_by_region_as_the_headless_one(drawn, plain, act_on, prompt):
    """In gated mode: a concept that a region has does not act in the global prompt, others do, each at its words."""
    concepts = [*drawn.concepts, made_concept("tim", "lora")] if plain else drawn.concepts
    regions = [*TWO[:1], ("a <tim> and an <ida>", RIGHT)] if plain else TWO
    made = regional(drawn, concepts, regions, "gated", prompt, act_on=act_on)
    noisy, sigma, denoised = first_call(drawn, made.model, made.positive)
    base, sampling = toy_base(), drawn.model.get_model_object("model_sampling")
    placed = [Region(text, box).placed(*SIZE) for text, box, *_ in regions]
    stack = [(concept, 1.0) for concept in concepts]
    found = {}
    for way in (act_on, "nothing"):
        acts = acting(stack, prompt, placed) if way == act_on else [()] * (1 + len(placed))
        speaking = Speaking(base, Places(placed), {}, stack, acts, act_on)
        context, texts = speaking.contexts([prompt], None)
        with speaking.acting(texts, tuple(noisy.shape[-2:])):
            predicted = base.predict(sampling.calculate_input(sigma, noisy), sampling.timestep(sigma), context)
        found[way] = sampling.calculate_denoised(sigma, predicted, noisy)
    assert relative_error(denoised, found[act_on]) < 1e-5
    assert relative_error(denoised, found["nothing"]) > 1e-3


def test_a_region_that_looks_for_its_place_hears_such_words(drawn):
    from modular_concepts_pack.nodes import regions as node

    import nodes

    (latent,) = nodes.EmptyLatentImage().generate(*SIZE)
    asked = node.ConceptRegion.execute("a <tom> man", "automatic", 0.0, 0.0, 1.0, 1.0, 0.0, 1.0)[0]
    before, pictures = traces(drawn.model, drawn.clip), []
    for concepts in (drawn.concepts[:1], drawn.concepts):
        stack = tuple((concept, 1.0) for concept in concepts)
        with torch.inference_mode():
            pictures.append(
                node.RegionalConceptSampler.execute(
                    drawn.model, drawn.clip, "a <tom> man and a dog", "", asked, latent, "euler", "normal", 5, 2.0, 3,
                    1.0, concepts=stack, mode="gated",
                )[0]["samples"].clone()
            )  # fmt: skip
    assert torch.equal(*pictures) and traces(drawn.model, drawn.clip) == before


def test_what_regions_say_is_not_called_unsaid(drawn, monkeypatch):
    texts = []
    monkeypatch.setattr(by_word, "show_text", texts.append)
    drawn.draw(*regional(drawn, drawn.concepts[:2], TWO, "merged"), size=SIZE)
    assert texts == []
    drawn.draw(*regional(drawn, drawn.concepts, TWO, "merged"), size=SIZE)
    assert len(texts) == 1 and texts[0].startswith("no prompt says <rex>, so rex acts nowhere")


def test_what_acts_at_its_own_words_is_not_said_to_act_everywhere(drawn, monkeypatch):
    texts = []
    monkeypatch.setattr(regional_sampling, "show_text", texts.append)
    tom, ida, _ = drawn.concepts
    plain = replace(ida, recipe=replace(ida.recipe, method="lora"))
    for act_on, is_told in (("everywhere", True), ("own words", False)):
        texts.clear()
        regional(drawn, [tom, plain], TWO, "merged", act_on=act_on)
        assert ("ida acts everywhere" in "\n".join(texts)) is is_told
