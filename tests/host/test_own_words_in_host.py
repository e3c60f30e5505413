"""Concepts that act at their own words alone, in the real host: sums to the last bit, whatever becomes of prompts."""

from __future__ import annotations

import comfy.model_management
import pytest
import tiny_models
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from compiled_pictures import FusedKernel
from laws import relative_error
from left_behind import hooks_on, traces
from made_concepts import foreign_concept, made_concept, toy_base
from modular_concepts_pack.host.merging import by_word, notices
from modular_concepts_pack.host.merging.weights import concept_inside, concepts_in, merge_into
from modular_concepts_pack.host.model import HostModel
from modular_concepts_pack.host.text.words import encode_prompt
from modular_concepts_pack.modular_concepts.merging.methods import SUMMED, Merge
from modular_concepts_pack.nodes import merging
from own_words_made import Drawn, made, of_layers

import nodes
from modular_concepts.adapters.own_words import Said, at_own_words
from modular_concepts.adapters.sites import with_sites
from modular_concepts.sampling import customised

LONG = " ".join(["a dog and a car"] * 20)  # of several sections


@pytest.fixture(scope="module")
def drawn():
    return Drawn()


@pytest.fixture
def told(monkeypatch):
    """What is shown on nodes."""
    texts = []
    for module in (by_word, notices):
        monkeypatch.setattr(module, "show_text", texts.append)
    return texts


@pytest.mark.parametrize(
    ("text", "negative", "more"),
    [
        ("a <tom> man", "", {}),
        ("<tom> and (<Tom>:1.3), a <tom>", "a car", {}),
        ("a man", "a <tom> man", {}),
        (f"{LONG} <tom>", "a man", {}),
        ("a <tom> man", f"<tom> {LONG}", {"count": 2}),
        ("a <tom> man", "", {"cfg": 1.0, "size": (48, 32)}),
    ],
)
def test_a_sum_is_each_alone_to_the_last_bit(drawn, text, negative, more):
    alone = drawn.picture(drawn.alone, text, negative, **more)
    for loaded in (drawn.sum, drawn.merged(drawn.concepts[::-1])):
        assert torch.equal(drawn.picture(loaded, text, negative, **more), alone)
    assert relative_error(drawn.picture(drawn.without(drawn.sum), text, negative, **more), alone) > 1e-3


def test_the_order_of_concepts_and_merges_changes_nothing(drawn):
    tom, ida, _ = drawn.concepts
    text = "a <tom> and an <ida>, <tom>"
    both = drawn.picture(drawn.sum, text)
    assert torch.equal(drawn.picture(drawn.merged(drawn.concepts[::-1]), text), both)
    model, clip = merge_into(*drawn.alone, [(ida, 1.0)])
    assert torch.equal(drawn.picture((model, clip), text), both) and concepts_in(model) == ("tom", "ida")
    assert torch.equal(drawn.picture(drawn.sum, text), both)  # and again
    assert relative_error(drawn.picture(drawn.alone, text), both) > 1e-2
    with pytest.raises(ValueError, match="tom is in this model already"):
        merge_into(model, clip, [(tom, 1.0)])


def test_where_nothing_is_said_or_nothing_acts_the_base_draws_to_the_last_bit(drawn):
    base = (drawn.model, drawn.clip)
    assert torch.equal(drawn.picture(drawn.sum, "a man", "a dog"), drawn.picture(base, "a man", "a dog"))
    assert torch.equal(drawn.picture(drawn.sum, "", ""), drawn.picture(base, "", ""))
    quiet = drawn.merged(drawn.concepts, 0.0)
    assert torch.equal(drawn.picture(quiet, "a <tom>"), drawn.picture(base, "a man man"))


def test_a_batch_is_its_pictures(drawn):
    two = drawn.picture(drawn.sum, "a <tom>", count=2)
    assert relative_error(drawn.picture(drawn.sum, "a <tom>"), two[:1]) < 1e-5


def conditionings(drawn, clip) -> dict[str, list]:
    """Prompts as the host's nodes make them of several."""
    tom, man, car = (drawn.encoded(clip, text) for text in ("a <tom> man", "a man", "a car on the beach"))
    ranged = nodes.ConditioningSetTimestepRange().set_range
    return {
        "combined": nodes.ConditioningCombine().combine(tom, car)[0],
        "behind another": nodes.ConditioningConcat().concat(man, tom)[0],
        "before another": nodes.ConditioningConcat().concat(tom, man)[0],
        "in turn": [*ranged(tom, 0.0, 0.5)[0], *ranged(man, 0.5, 1.0)[0]],
        "averaged": nodes.ConditioningAverage().addWeighted(tom, man, 0.6)[0],
        "in an area": [*nodes.ConditioningSetArea().append(tom, 16, 32, 0, 0, 1.0)[0], *car],
        "long beside short": nodes.ConditioningCombine().combine(tom, drawn.encoded(clip, LONG))[0],
        "of another clip": nodes.ConditioningConcat().concat(drawn.encoded(drawn.clip, "a car"), tom)[0],
    }


KINDS = ["combined", "behind another", "before another", "in turn", "averaged", "in an area", "long beside short"]


@pytest.mark.parametrize("kind", [*KINDS, "of another clip"])
def test_each_prompt_has_its_words_whatever_nodes_make_of_it(drawn, kind):
    pictures = []
    for model, clip in (drawn.alone, drawn.sum, drawn.without(drawn.sum)):
        pictures.append(drawn.draw(model, conditionings(drawn, clip)[kind], drawn.encoded(clip, "a dog, <ida>")))
    # <ida> is said where <tom> is not wanted, and acts in the sum alone.
    assert relative_error(pictures[0], pictures[2]) > 1e-3 and relative_error(pictures[0], pictures[1]) > 1e-4
    here = [drawn.draw(m, conditionings(drawn, c)[kind], drawn.encoded(c, "")) for m, c in (drawn.alone, drawn.sum)]
    assert torch.equal(*here)


def test_what_cannot_be_known_is_told(drawn, told):
    model, clip = drawn.sum
    mixed = conditionings(drawn, clip)["averaged"]
    drawn.draw(model, mixed, drawn.encoded(clip, "<ida> <rex>"))
    assert len(told) == 1 and told[0].startswith("a prompt was mixed with another after it was encoded")
    drawn.picture(drawn.sum, "a <tom>", "<ida>")
    assert told[1] == (
        "no prompt says <rex>, so rex acts nowhere; say it, in a text that the CLIP of Merge Concepts encodes"
    )
    drawn.picture(drawn.sum, "a <tom>, <rex>", "<ida>")
    drawn.picture(drawn.merged(drawn.concepts, 0.0), "a man")
    assert len(told) == 2


@torch.no_grad()
def test_the_host_draws_what_the_headless_base_draws(drawn):
    base, text = toy_base(), "a <tom> and an <ida>"
    model, clip = drawn.sum
    calls = []

    def noted(apply, about):
        calls.append((about["input"].clone(), about["timestep"].clone(), apply(**_arguments(about)).clone()))
        return calls[-1][2]

    def _arguments(about):
        return {"x": about["input"], "t": about["timestep"], **about["c"]}

    model = model.clone()
    model.set_model_unet_function_wrapper(noted)
    noise = nodes.EmptyLatentImage().generate(32, 32)[0]
    both = drawn.encoded(clip, text)
    nodes.KSampler().sample(model, 3, 3, 1.0, "euler", "normal", both, both, noise)
    noisy, sigma, denoised = (value.clone() for value in calls[0])
    sampling = drawn.model.get_model_object("model_sampling")
    scaled, timestep = sampling.calculate_input(sigma, noisy), sampling.timestep(sigma)
    predicted = {}
    with customised(base, drawn.concepts, [1.0] * 3) as tokens:
        places = base.word_places(text, tokens)
        said = Said({number: [each.places(places)] for number, each in enumerate(tokens.by_word)})
        context = base.context([text], tokens)
        layers = with_sites(base.layers(("all_linear",), ("all_linear",)))
        with at_own_words(layers, tokens.by_word, said):
            predicted["by word"] = base.predict(scaled, timestep, context)
        predicted["plain"] = base.predict(scaled, timestep, context)
    by_word, plain = (sampling.calculate_denoised(sigma, each, noisy) for each in predicted.values())
    assert relative_error(denoised, by_word) < 1e-5 and relative_error(denoised, plain) > 1e-3


def test_concepts_that_act_everywhere_stand_beside_them(drawn):
    plain = made_concept("tim", "lora")
    for beside in (False, True):
        loaded = drawn.merged([*drawn.concepts, plain], beside=beside)
        alone = drawn.merged([plain], beside=beside)
        assert torch.equal(drawn.picture(loaded, "a <tim>"), drawn.picture(alone, "a <tim>"))
        assert relative_error(drawn.picture(loaded, "a <tim>, <tom>"), drawn.picture(alone, "a <tim>, man man")) > 1e-3


def test_a_plain_lora_acts_at_its_word_where_that_is_chosen(drawn, told):
    plain = made_concept("tim", "lora")
    with torch.inference_mode():
        model, clip, _ = merging.ConceptMerge.execute(
            drawn.model, drawn.clip, {"concept0": ((plain, 1.0),)}, "sum", act_on="own words"
        ).args
    assert "of its energy is in layers that read the picture" in told[0] and not model.patches
    base = (drawn.model, drawn.clip)
    assert torch.equal(drawn.picture((model, clip), "a man"), drawn.picture(base, "a man"))
    said, unsaid = (drawn.picture(loaded, "a <tim>") for loaded in ((model, clip), (drawn.model, clip)))
    assert relative_error(said, unsaid) > 1e-4
    everywhere = drawn.merged([plain])
    assert relative_error(drawn.picture(everywhere, "a <tim>"), said) > 1e-4


def test_an_ordinary_word_calls_as_well_and_reads_as_it_did(drawn):
    spoken = of_layers(
        {layer: adapter.weight_shape for layer, adapter in made("any", 1).layers.items()},
        "dog", 7, 128, method="lora", triggers=("dog",),
    )  # fmt: skip
    spoken = type(spoken)("dog", spoken.layers, {}, spoken.recipe)
    loaded = drawn.merged([spoken], act_on="own words")
    texts = [drawn.encoded(clip, "a (dog:1.2) and a man, dog")[0][0] for clip in (loaded[1], drawn.clip)]
    assert torch.equal(*texts)
    base = (drawn.model, drawn.clip)
    assert torch.equal(drawn.picture(loaded, "a man"), drawn.picture(base, "a man"))
    assert relative_error(drawn.picture(loaded, "a dog"), drawn.picture(base, "a dog")) > 1e-3


def test_one_concept_of_a_merge_holds_each_at_its_own_words(drawn):
    whole = concept_inside(drawn.sum[0], "three")
    again = drawn.merged([whole])
    for text in ("a <tom>", "<ida> and <rex>"):
        assert relative_error(drawn.picture(again, text), drawn.picture(drawn.sum, text)) < 1e-5
    mixed, _ = drawn.merged([drawn.concepts[0], made_concept("tim", "lora")])
    with pytest.raises(ValueError, match="tom act at their own words alone and tim everywhere"):
        concept_inside(mixed)


def test_what_cannot_be_by_word_is_refused_in_words(drawn):
    tom, loaded = drawn.concepts[0], (drawn.model, drawn.clip)
    with pytest.raises(ValueError, match="tom acts at its own words alone, which need no hook"):
        merging.ConceptHook.execute(*loaded, {"concept0": tom})
    with pytest.raises(ValueError, match="block is for concepts that act everywhere"):
        merging.BlockLoRAMerge.execute(*loaded, {"concept0": tom}, "as set")
    with pytest.raises(ValueError, match="fusion is for concepts that act everywhere"):
        merging.ConceptFusion.execute(*loaded, {"concept0": tom}, "a {concept}", 1, 0.1)
    with pytest.raises(ValueError, match="ties is for concepts that act everywhere"):
        notices.merge_by(HostModel(*loaded), [(tom, 1.0)], Merge("ties"))
    with pytest.raises(ValueError, match="was trained on 'sd15'"):
        notices.merge_by(HostModel(*loaded), [(foreign_concept("rex"), 1.0)], SUMMED, act_on="own words")

    def couple(hidden, context, value, _options):
        return hidden, *(torch.cat([text, text], dim=1) for text in (context, value))

    model = drawn.sum[0].clone()
    model.set_model_attn2_patch(couple)
    with pytest.raises(ValueError, match="another node changes the texts that the model reads"):
        drawn.picture((model, drawn.sum[1]), "a <tom>")
    drawn.picture((model, drawn.sum[1]), "a man")


def test_nothing_is_left_on_the_model(drawn):
    before = traces(drawn.model, drawn.clip)
    picture = drawn.picture(drawn.sum, "a <tom>")
    assert traces(drawn.model, drawn.clip) == before

    def cancel(*_):
        raise comfy.model_management.InterruptProcessingException

    hooked = drawn.sum[0].clone()
    hooked.set_model_attn2_output_patch(cancel)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        drawn.picture((hooked, drawn.sum[1]), "a <tom>")
    assert traces(drawn.model, drawn.clip) == before and hooks_on(drawn.model, drawn.clip) == 0
    assert torch.equal(drawn.picture(drawn.sum, "a <tom>"), picture)


def test_a_compiled_model_is_drawn_as_it_was_before_and_that_is_told_once(drawn, caplog):
    traced = drawn.model.clone()
    set_torch_compile_wrapper(traced, backend="eager")
    assert (
        relative_error(drawn.picture((traced, drawn.clip), "a man"), drawn.picture((drawn.model, drawn.clip), "a man"))
        < 1e-5
    )
    loaded = merge_into(traced, drawn.clip, [(drawn.concepts[0], 1.0)])
    for _ in range(2):
        assert relative_error(drawn.picture(loaded, "a <tom>"), drawn.picture(drawn.alone, "a <tom>")) < 1e-5
    assert sum("the model is compiled" in line.getMessage() for line in caplog.records) == 1


def test_a_layer_that_a_kernel_goes_around_is_named(drawn, caplog):
    block = drawn.model.model.diffusion_model.middle_block[1].transformer_blocks[0].attn2
    plain = block.to_k
    block.to_k = FusedKernel(plain)
    try:
        drawn.picture(drawn.merged(drawn.concepts), "a <tom>")
    finally:
        block.to_k = plain
    (line,) = [record.getMessage() for record in caplog.records if "without being called" in record.getMessage()]
    assert line.startswith("1 of ") and "attn2.to_k" in line and "concepts at their own words" in line


def test_two_text_models_and_layerwise_words(checkpoint):
    model, clip, _ = tiny_models.load(checkpoint("vega"))
    host = HostModel(model, clip)
    shapes = {name: shape for name, shape in host.shapes.items() if name.endswith(("attn2.to_k", "attn2.to_v"))}
    layers, made_here = host.cross_attention_layers, []
    for seed, name in enumerate(("tom", "ida")):
        concept = of_layers(shapes, name, seed, 2048, architecture="sdxl")
        made_here.append(concept)
    rows = 0.1 * torch.randn(layers, 2, 2048, generator=torch.Generator().manual_seed(9))
    by_layer = type(concept)("ida", concept.layers, {"<ida>": rows}, concept.recipe)
    noise = nodes.EmptyLatentImage().generate(64, 64)[0]

    @torch.inference_mode()
    def picture(concepts, text, acting=True):
        changed, knowing = merge_into(model, clip, [(each, 1.0) for each in concepts])
        said, unsaid = encode_prompt(knowing, text), encode_prompt(knowing, "a car")
        drawing = changed if acting else merge_into(model, clip, [(by_layer, 0.0)])[0]
        return nodes.common_ksampler(drawing, 5, 2, 3.0, "euler", "normal", said, unsaid, noise)[0]["samples"].clone()

    tom = picture(made_here[:1], "a <tom>")
    assert torch.equal(picture(made_here, "a <tom>"), tom)
    layered = picture([by_layer], "an <ida> here")
    assert torch.equal(picture([made_here[0], by_layer], "an <ida> here"), layered)
    assert relative_error(picture([by_layer], "an <ida> here", acting=False), layered) > 1e-4
