"""Promise 4: the base is never touched.  And: a merged file, a stack and a sum are one and the same."""

from dataclasses import replace

import pytest
import torch
from laws import EFFECT, filled_adapter, relative_error
from untrained_toy import filled_concept, picture, traces, untrained_base

from modular_concepts.adapters.basis import OrthogonalBasis, slot_indices
from modular_concepts.concept import Concept
from modular_concepts.errors import AdapterError
from modular_concepts.files.concept import load_concept, save_concept
from modular_concepts.merging.as_concept import merged_concept
from modular_concepts.merging.methods import Merge
from modular_concepts.models.targets import Targets, concept_layers
from modular_concepts.sampling import SampleSettings, customised, sample
from modular_concepts.toy.standard import BY_NAME, pictures_of
from modular_concepts.training.loop import Listeners
from modular_concepts.training.settings import TrainSettings
from modular_concepts.training.teach import Subject, problem_for, train_concept

SETTINGS = TrainSettings(
    method="orthogonal", rank=2, steps=3, batch=2, adapter_lr=0.02, token_lr=0.1, token_vectors=2, warmup=0
)
ATTENTION = Targets(("attention",))
PROMPT = "a man on the beach"


def subject(name: str = "tom") -> Subject:
    drawn, texts = pictures_of(BY_NAME[name], 4)
    return Subject(name, drawn, texts, BY_NAME[name].class_word, fingerprint=f"four of {name}")


def train(name: str = "tom", callback=None, **changes) -> Concept:
    settings = replace(SETTINGS, name=name, **changes)
    return train_concept(untrained_base(), subject(name), settings, ATTENTION, Listeners(callback))[0]


@pytest.fixture(scope="module")
def trio() -> list[Concept]:
    """Two trained in slots of their own, one made."""
    return [train("tom", slot=0), train("tim", slot=1), filled_concept("minka", 3)]


def draw(concepts, strengths, prompt=PROMPT, how="sum"):
    with customised(untrained_base(), concepts, strengths, how) as tokens:
        return picture(prompt, tokens=tokens)


@pytest.mark.parametrize("method", ["lora", "orthogonal", "block", "block_orthogonal"])
def test_training_leaves_the_base_as_it_was(method):
    before, state = traces(untrained_base()), torch.get_rng_state()
    told = []
    concept = train(callback=lambda at: told.append(at.step), method=method, slot=0, blocks=3)
    assert told == [1, 2, 3]
    assert traces(untrained_base()) == before and torch.equal(torch.get_rng_state(), state)
    moved = {name: adapter.delta().norm() for name, adapter in concept.layers.items()}
    assert set(moved) == set(concept_layers(untrained_base(), ATTENTION)) and min(moved.values()) > 1e-4
    assert relative_error(draw([concept], [1.0], "a <tom> on the beach"), picture(PROMPT)) > EFFECT / 10


def test_masks_in_pixels_weigh_the_latents_that_stand_for_them():
    masks = torch.zeros(4, 1, 32, 32)
    masks[:, :, 1, 0] = 1
    problem = problem_for(untrained_base(), replace(subject(), masks=masks))
    assert problem.examples.masks.shape == (4, 1, 16, 16)
    assert problem.examples.masks[0, 0, 0, 0] == 0.25 and problem.examples.masks.sum() == 1


def test_a_callback_sees_the_words_as_they_are_learned():
    seen = []
    train(callback=lambda at: seen.append(at.tokens["<tom>"].clone()), slot=0)
    assert len(seen) == 3 and not seen[0].requires_grad
    assert relative_error(seen[2], seen[0]) > EFFECT / 10


def test_a_cancel_or_an_exception_leaves_the_base_as_it_was(trio):
    before = traces(untrained_base())
    partial = train(callback=lambda at: at.step == 1, slot=0)
    assert partial.recipe.training["steps_done"] == 1 and partial.recipe.training["finished"] is False
    assert traces(untrained_base()) == before

    def fail(*_):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        train(callback=fail, slot=0)
    assert traces(untrained_base()) == before
    with pytest.raises(RuntimeError, match="on purpose"), customised(untrained_base(), trio, [1.0] * 3) as tokens:
        assert traces(untrained_base()) != before  # hooks are on
        sample(untrained_base(), ["a <tom>"], [0], tokens, SampleSettings(steps=1), callback=fail)
    assert traces(untrained_base()) == before


def test_three_cycles_of_merging_and_drawing_leave_the_base_as_it_was(trio):
    before, plain = traces(untrained_base()), picture(PROMPT)
    drawn = [draw(trio, [1.0, 0.5, -0.3]) for _ in range(3)]
    assert torch.equal(drawn[0], drawn[2]) and relative_error(drawn[0], plain) > EFFECT
    assert traces(untrained_base()) == before and torch.equal(picture(PROMPT), plain)


def test_strength_0_is_the_base_bit_for_bit(trio):
    plain = picture(PROMPT)
    assert torch.equal(draw(trio, [0.0, 0.0, 0.0]), plain)
    assert torch.equal(draw([], []), plain)
    only = draw(trio, [0.0, 0.0, 1.0])
    assert torch.equal(draw(trio[2:], [1.0]), only) and relative_error(only, plain) > EFFECT


@pytest.mark.parametrize("how", ["sum", "mean"])
def test_a_merged_file_draws_what_the_stack_draws(trio, how, tmp_path):
    strengths, prompt = [1.0, 0.5, -0.3], "a <minka> and a <tom>"
    merged = merged_concept("three", trio, strengths, Merge(how))
    save_concept(merged, tmp_path / "three.safetensors")
    loaded = load_concept(tmp_path / "three.safetensors")
    stack = draw(trio, strengths, prompt, how)
    assert relative_error(draw([merged], [1.0], prompt), stack) < 1e-5
    assert torch.equal(draw([loaded], [1.0], prompt), draw([merged], [1.0], prompt))
    assert relative_error(draw([merged], [0.0], prompt), stack) > EFFECT
    assert set(loaded.tokens) == {"<tom>", "<tim>", "<minka>"}
    assert loaded.recipe.triggers == ("<tom>", "<tim>", "<minka>")
    parts = loaded.recipe.origin["parts"]
    assert [(part["name"], part["strength"]) for part in parts] == list(
        zip(["tom", "tim", "minka"], strengths, strict=True)
    )
    assert parts[0]["origin"]["fingerprint"] == "four of tom"


def test_a_block_merge_draws_what_its_sum_draws():
    blocks = [train(name, method="block", slot=slot, blocks=3) for slot, name in enumerate(("tom", "tim"))]
    strengths, prompt = [1.0, 1.0], "a <tom>"
    assert relative_error(draw(blocks, strengths, prompt, "block"), draw(blocks, strengths, prompt)) < 1e-5
    merged = merged_concept("two", blocks, strengths, Merge("block"))
    assert relative_error(draw([merged], [1.0], prompt), draw(blocks, strengths, prompt)) < 1e-5


def test_the_recipe_tells_how_it_was_made(trio):
    recipe, base = trio[1].recipe, untrained_base()
    assert (recipe.method, recipe.rank, recipe.alpha, recipe.slot, recipe.slot_policy) == (
        "orthogonal",
        2,
        2.0,
        1,
        "slot",
    )
    assert (recipe.base_hash, recipe.architecture) == (base.hash, "toy")
    assert (recipe.triggers, recipe.class_word) == (("<tim>",), "man")
    assert recipe.basis == OrthogonalBasis().identity
    assert (recipe.origin["pictures"], recipe.origin["fingerprint"]) == (4, "four of tim")
    for adapter in trio[1].layers.values():
        width = adapter.lora_down.shape[1]
        assert torch.equal(adapter.lora_down, OrthogonalBasis().columns(width, slot_indices(width, 2, 1)))


def test_a_trigger_is_lower_case_as_prompts_are_read():
    drawn, _ = pictures_of(BY_NAME["tom"], 2)
    shouting = Subject("TOM", drawn, ["a <tom>", "a <tom> at night"], "man")
    concept, _ = train_concept(untrained_base(), shouting, replace(SETTINGS, slot=0, steps=1), ATTENTION)
    assert list(concept.tokens) == ["<tom>"]
    assert relative_error(draw([concept], [1.0], "a <TOM>"), draw([concept], [1.0], "a <tom>")) == 0
    assert relative_error(draw([concept], [1.0], "a <tom>"), draw([concept], [1.0], "a <tim>")) > 1e-4


def test_two_concepts_of_one_trigger_are_refused(trio):
    twin = replace(trio[1], name="other tom", tokens={"<tom>": trio[1].tokens["<tim>"]})
    for use in (lambda: draw([trio[0], twin], [1.0, 1.0]), lambda: merged_concept("two", [trio[0], twin], [1.0, 1.0])):
        with pytest.raises(AdapterError, match="tom and other tom both answer to <tom>"):
            use()


def test_concepts_on_two_orthogonal_bases_are_refused(trio):
    on_bases = [
        replace(concept, recipe=replace(concept.recipe, method="orthogonal", basis=basis))
        for concept, basis in zip(trio[:2], ("a" * 16, "b" * 16), strict=True)
    ]
    with pytest.raises(AdapterError, match="trained on shared basis a{16}, .* on b{16}"):
        draw(on_bases, [1.0, 1.0])


def test_a_concept_of_another_base_is_refused(trio):
    before = traces(untrained_base())
    foreign = replace(trio[0], recipe=replace(trio[0].recipe, architecture="sd15"))
    with pytest.raises(AdapterError, match="tom was trained on 'sd15', this base is 'toy'"):
        draw([foreign], [1.0])
    with pytest.raises(AdapterError, match="they were trained on different architectures"):
        merged_concept("two", [trio[1], foreign], [1.0, 1.0])
    layer = next(iter(trio[0].layers))
    misfit = replace(trio[0], layers={layer: filled_adapter("lora", 12, 16, 2)})
    with pytest.raises(AdapterError, match=r"tom, unet.*the adapter is for a weight of shape \(12, 16\)"):
        draw([misfit], [1.0])
    unknown = replace(trio[0], layers={"unet.nowhere.to_q": trio[0].layers[layer]})
    with pytest.raises(AdapterError, match="tom, unet.nowhere.to_q: the base has no layer of this name"):
        draw([unknown], [1.0])
    narrow = replace(trio[0], tokens={"<tom>": torch.ones(2, 64)})
    with pytest.raises(AdapterError, match="64 wide"):
        draw([narrow], [1.0], "a <tom>")
    assert traces(untrained_base()) == before


def test_a_learned_word_starts_from_the_description_one_vector_for_each_word():
    base, words = untrained_base(), "man red shirt blue hat"
    made = replace(subject(), description=words)
    settings = replace(SETTINGS, slot=0, token_lr=0.0, token_noise=0.0)
    concept, _ = train_concept(base, made, settings, ATTENTION)
    assert torch.equal(concept.tokens["<tom>"], base.word_rows(words)) and len(base.word_rows(words)) == 5
    assert concept.recipe.training["description"] == words
    told, called = base.context([f"a {words} on the beach"], {}), base.context(["a <tom> on the beach"], concept.tokens)
    assert relative_error(called, told) < 1e-6


def test_the_standard_concepts_describe_themselves_in_words_that_the_base_knows():
    assert BY_NAME["tom"].description == "man red shirt brown hair blue hat"
    assert BY_NAME["omar"].description == "man dotted white shirt black hair"
    assert BY_NAME["mint"].description == ""
    base = untrained_base()
    assert not [c.name for c in BY_NAME.values() if base.unknown_words(c.description, [])]


def test_what_cannot_be_trained_is_refused():
    drawn, texts = pictures_of(BY_NAME["tom"], 2)
    settings = replace(SETTINGS, slot=0)
    for made, words in (
        (Subject("tom", drawn, [texts[0], "a man"], "man"), "caption 'a man' does not contain the trigger"),
        (Subject("tom", drawn, texts, "zeppelin"), "class word 'zeppelin'"),
        (Subject("tom", drawn, texts, ""), "class word ''"),
        (Subject("tom", drawn, texts[:1], "man"), "2 pictures but 1 captions"),
        (Subject("tom", drawn, texts, "man", description="man with a zeppelin"), "does not know zeppelin"),
    ):
        with pytest.raises(AdapterError, match=words):
            train_concept(untrained_base(), made, settings, ATTENTION)


def test_a_trigger_beyond_what_the_text_model_reads_is_refused(trio):
    base, concept, long = untrained_base(), trio[0], "a man " * 19
    fits, cut = f"a <{concept.name}> {long}", f"{long} a <{concept.name}>"
    with customised(base, [concept], [1.0]) as tokens:
        base.context([fits], tokens)
        with pytest.raises(AdapterError, match=f"<{concept.name}> stands beyond the 40 tokens"):
            base.context([cut], tokens)


def test_a_word_follows_its_concepts_strength_from_the_class_word_to_what_was_learned():
    base, concept = untrained_base(), filled_concept("tom", 1)
    (rows,), (start,) = concept.tokens.values(), [base.word_rows("man")]
    for strength, wanted in (
        (0.0, start.expand_as(rows)),
        (0.25, 0.75 * start + 0.25 * rows),
        (1.0, rows),
        (1.5, rows),
        (-1.0, start.expand_as(rows)),
    ):
        with customised(base, [concept], [strength]) as tokens:
            assert torch.allclose(tokens["<tom>"], wanted, atol=1e-6), strength
    with customised(base, [concept], [0.0]) as tokens:
        faded = picture("a <tom> on the beach", tokens=tokens)
    # At strength 0 the trigger is as many class words as it has vectors.
    assert torch.equal(faded, picture("a man man on the beach"))
    layered = replace(concept, tokens={"<tom>": rows.repeat(4, 1, 1)})
    with customised(base, [layered], [0.25]) as tokens:
        assert torch.allclose(tokens["<tom>"][2], 0.75 * start + 0.25 * rows, atol=1e-6)
    nameless = replace(concept, recipe=replace(concept.recipe, class_word=""))
    with customised(base, [nameless], [0.25]) as tokens:
        assert torch.equal(tokens["<tom>"], rows)
