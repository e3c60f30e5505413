"""Company: canvases are what their captions say, half by half; without it everything is as it was, to the bit."""

from dataclasses import replace

import pytest
import torch
from laws import seeded
from tiny_problem import (
    EVERYTHING,
    RESUME_SETTINGS,
    assert_same,
    hook_count,
    learned,
    problem_with_everything,
    tiny_basis,
    tiny_problem,
    weights_hash,
)
from untrained_toy import traces, untrained_base

from bench.given_base import with_base
from modular_concepts.errors import AdapterError
from modular_concepts.families import SD15, SDXL, TOY
from modular_concepts.models.targets import Targets
from modular_concepts.sampling import SampleSettings
from modular_concepts.text.company import phrased, subjects_beside
from modular_concepts.toy.vocabulary import CLASSES
from modular_concepts.training.batches import draw_batches
from modular_concepts.training.checkpoint import checkpoint_settings
from modular_concepts.training.company import Company, Mate, joined
from modular_concepts.training.drawn import Prior
from modular_concepts.training.estimate import LiveMemory, rehearse
from modular_concepts.training.loop import Keeping, train
from modular_concepts.training.memory import memory_advice
from modular_concepts.training.problem import Examples
from modular_concepts.training.run import Run
from modular_concepts.training.settings import METHODS, TrainSettings
from modular_concepts.training.teach import Subject, check_training, company_examples, problem_for, train_concept

QUICK = SampleSettings(steps=2, batch=24)
PLACES = ("on the beach", "in the snow")
SETTINGS = TrainSettings(method="lora", rank=2, steps=4, batch=4, company=1.0)

# --- two in one caption ---

BESIDE = {
    "a <tom> on the beach": ("a <tom> and a dog on the beach", "a dog and a <tom> on the beach", "a dog on the beach"),
    "a photo of <tom>": ("a photo of <tom> and a dog", "a photo of a dog and <tom>", "a photo of a dog"),
    "a photo of a happy <TOM>, evening": (
        "a photo of a happy <TOM> and a dog, evening",
        "a photo of a dog and a happy <TOM>, evening",
        "a photo of a dog, evening",
    ),
    "my friend <tom> at sea": ("my friend <tom> and a dog at sea", "a dog and my friend <tom> at sea", "a dog at sea"),
    "photo of man <tom> wearing a hat in the snow": (
        "photo of man <tom> wearing a hat and a dog in the snow",
        "photo of a dog and man <tom> wearing a hat in the snow",
        "photo of a dog in the snow",
    ),
    "1girl, <tom>, beach": ("1girl, <tom> and a dog, beach", "1girl, a dog and <tom>, beach", "1girl, a dog, beach"),
    "photo of<tom>s hat": ("photo of<tom>s hat and a dog", "photo of a dog and <tom>s hat", "photo of a dog"),
    "a man on <tom>": ("a man on <tom> and a dog", "a dog and a man on <tom>", "a dog"),
    "a man in the snow, <tom> style": (
        "a man in the snow, <tom> style and a dog",
        "a dog and a man in the snow, <tom> style",
        "a dog",
    ),
}  # fmt: skip


@pytest.mark.parametrize("caption", BESIDE)
def test_a_caption_names_both_in_the_order_of_their_places(caption):
    said = phrased(caption, "<tom>", "man")
    assert said.before + said.phrase + said.after == caption
    assert (said.beside("a dog", True), said.beside("a dog", False), said.of("a dog")) == BESIDE[caption]


def test_half_of_the_company_is_of_the_concepts_own_class_where_that_is_a_subject():
    for company in [family.company for family in (SD15, SDXL, TOY)] + [subjects_beside]:
        nouns = [phrase.split()[1] for phrase in company("dog", 60)]
        assert nouns.count("dog") == 30 and len(set(nouns)) >= 8
        assert {phrase.split()[1] for phrase in company("style", 60)} == set(nouns)
        assert all(phrase.split()[0] in ("a", "an") for phrase in company("dog", 60))
    assert subjects_beside("old woman", 2) == ["an old woman", "a man"]
    phrases = untrained_base().company("man", 48)
    assert {phrase.split()[1] for phrase in phrases} == set(CLASSES)
    assert 12 < sum(" with " in phrase for phrase in phrases) < 36 and phrases == untrained_base().company("man", 48)


# --- what the base draws ---


def subject_of(count=4, sizes=((32, 32),), **more) -> Subject:
    pictures = [torch.rand(3, *sizes[n % len(sizes)], generator=seeded(n)) for n in range(count)]
    pictures = torch.stack(pictures) if len(sizes) == 1 else pictures
    return Subject("x", pictures, [f"a <x> {PLACES[n % 2]}" for n in range(count)], "man", **more)


def drawing(told=None, count=8, size=(None, None)) -> Prior:
    def draw(base, prompts, seeds, *_, callback=None):
        if told is not None:
            told.append((list(prompts), list(seeds)))
        height, width = size if size[0] else base.size
        return torch.stack([torch.rand(3, height, width, generator=seeded(seed)) for seed in seeds])

    return Prior("man", count, 7, SampleSettings(2, height=size[0], width=size[1]), draw)


def in_company(**more) -> Subject:
    subject = subject_of(**more)
    return replace(subject, company=company_examples(untrained_base(), subject, drawing(count=16)))


def test_company_is_drawn_once_in_the_surroundings_of_the_captions(tmp_path):
    told = []
    first, again = (company_examples(untrained_base(), subject_of(), drawing(told), cache=tmp_path) for _ in range(2))
    ((prompts, seeds),) = told
    assert seeds == list(range(7, 15)) and all(prompt.endswith(PLACES) for prompt in prompts)
    assert prompts == [f"{mate.before}{mate.phrase}{mate.after}" for mate in first.mates]
    assert [len(first.invited(f"a <x> {place}")) for place in PLACES] == [4, 4]
    assert torch.equal(first.latents[16], again.latents[16]) and first.fingerprint == again.fingerprint
    other = company_examples(untrained_base(), subject_of(), drawing(told, count=6), cache=tmp_path)
    assert len(told) == 2 and other.fingerprint != first.fingerprint


def test_company_is_as_high_as_each_of_the_pictures_and_keeps_its_aspect():
    subject = subject_of(sizes=((32, 48), (48, 32), (32, 64)))
    company = company_examples(untrained_base(), subject, drawing(size=(32, 48)))
    assert {height: tuple(latents.shape) for height, latents in company.latents.items()} == {
        16: (8, 12, 16, 24),
        24: (8, 12, 24, 36),
    }
    low, high = (untrained_base().decode(company.latents[height][:1]) for height in (16, 24))
    shrunk = torch.nn.functional.interpolate(high, size=(32, 48), mode="bicubic", antialias=True)
    assert (shrunk - low).square().mean() < 0.2 * low.var()


def test_a_caption_that_says_the_word_twice_is_drawn_without_it():
    subject = replace(subject_of(2), captions=["a <x> on the beach, <x>"] * 2)
    told = []
    company_examples(untrained_base(), subject, drawing(told))
    assert all("<x>" not in prompt for prompt in told[0][0]) and told[0][0][0] == "a man on the beach, a man"


# --- what a canvas is ---


def batches(subject, count=12, **changed):
    problem = problem_for(untrained_base(), subject, flip=bool(changed.get("flip")))
    run = Run(problem, replace(SETTINGS, **changed))
    return problem, run, [draw_batches(problem, run) for _ in range(count)]


@pytest.mark.parametrize("flip", [False, True])
def test_each_half_of_a_canvas_is_who_its_caption_says(flip):
    subject = in_company()
    problem, _, drawn = batches(subject, flip=flip)
    base, company, lefts, turned = untrained_base(), subject.company, [], 0
    for (batch,) in drawn:
        assert len(batch.captions) == 2 and batch.latents.shape == (2, 12, 16, 32) and batch.masks is None
        assert torch.equal(batch.weights, torch.full((2,), 0.5))
        for latent, caption in zip(batch.latents, batch.captions, strict=True):
            lefts.append(caption.startswith("a <x> and "))
            concept, other = latent.split(16, -1)[:: 1 if lefts[-1] else -1]
            (place,) = (place for place in PLACES if caption.endswith(place))
            (number,) = (n for n, drawn in enumerate(company.latents[16]) if torch.equal(drawn, other))
            mate = company.mates[number]
            assert (mate.before, mate.after) == ("", f" {place}")
            both = ("a <x>", mate.phrase) if lefts[-1] else (mate.phrase, "a <x>")
            assert caption == f"{both[0]} and {both[1]} {place}"
            numbers = [n for n in range(4) if subject.captions[n].endswith(place)]
            shown = [torch.equal(concept, base.encode(subject.pictures[n][None])[0]) for n in numbers]
            mirrored = [torch.equal(concept, base.encode(subject.pictures[n].flip(-1)[None])[0]) for n in numbers]
            assert any(shown) or (flip and any(mirrored))
            turned += any(mirrored)
    assert 0 < sum(lefts) < len(lefts) and (turned > 0) == flip


def test_the_whole_canvas_counts_and_only_the_concepts_half_may_have_its_word():
    masks = (torch.rand(4, 1, 16, 16, generator=seeded(3)) > 0.5).float()
    _, _, drawn = batches(in_company(masks=masks), attention_regularisation=0.1)
    for (batch,) in drawn:
        for caption, mask, attended in zip(batch.captions, batch.masks, batch.attended, strict=True):
            left = caption.startswith("a <x> and ")
            halves = [half.split(16, -1)[:: 1 if left else -1] for half in (mask, attended)]
            (shown, beside), (seen, unseen) = halves
            assert beside.eq(1).all() and unseen.eq(0).all() and torch.equal(shown, seen)
            assert any(torch.equal(shown, each) for each in masks)


def test_class_pictures_come_beside_canvases_as_before():
    prior = Examples(torch.randn(3, 12, 16, 16, generator=seeded(4)), ["a man"] * 3)
    _, _, drawn = batches(in_company(prior=prior), company=0.5)
    kinds = [[tuple(batch.latents.shape) for batch in parts] for parts in drawn]
    assert [(2, 12, 16, 32), (4, 12, 16, 16)] in kinds and [(8, 12, 16, 16)] in kinds
    assert all(parts[-1].captions[-4:] == ["a man"] * 4 for parts in drawn)


def test_pictures_of_several_sizes_have_company_of_their_height():
    sizes = ((32, 48), (48, 32))
    subject = subject_of(sizes=sizes)
    subject = replace(subject, company=company_examples(untrained_base(), subject, drawing(size=(32, 32))))
    _, _, drawn = batches(subject)
    assert {tuple(batch.latents.shape) for (batch,) in drawn} == {(2, 12, 16, 40), (2, 12, 24, 40)}


def test_a_share_of_the_steps_is_in_company():
    subject = in_company()
    for share in (0.25, 0.75):
        _, _, drawn = batches(subject, 200, company=share)
        wide = sum(batch.latents.shape[-1] == 32 for (batch,) in drawn) / 200
        assert abs(wide - share) < 0.12
    _, _, drawn = batches(subject, 100, company=0.5, batch=1)
    assert {(len(batch.captions), batch.latents.shape[-1]) for (batch,) in drawn} == {(1, 16), (1, 32)}


def test_what_varies_captions_varies_those_of_canvases():
    subject = replace(subject_of(), captions=[f"a <x>, {place}, a, the" for place in PLACES * 2])
    subject = replace(subject, company=company_examples(untrained_base(), subject, drawing()))
    _, _, drawn = batches(subject, 40, shuffle_tags=True, caption_dropout=0.3)
    texts = [caption for (batch,) in drawn for caption in batch.captions]
    said = [text for text in texts if text]
    assert 0.1 < texts.count("") / len(texts) < 0.5 and len(set(said)) > 10
    assert all(" and " in text.split(",")[0] and "<x>" in text.split(",")[0] for text in said)


def test_joined_keeps_frames():
    one, two = torch.randn(2, 3, 1, 4, 5, generator=seeded(1)), torch.randn(2, 3, 1, 4, 7, generator=seeded(2))
    canvas = joined(one, two, torch.tensor([True, False]))
    assert canvas.shape == (2, 3, 1, 4, 12)
    assert torch.equal(canvas[0, ..., :5], one[0]) and torch.equal(canvas[1, ..., 7:], one[1])


# --- the training ---


def accompanied(problem, **changed):
    """The tiny problem among others; its text model knows no "and"."""
    context, positions = problem.base.context, problem.base.trigger_positions

    def read(call):
        return lambda captions, tokens: call([caption.replace(" and", ",") for caption in captions], tokens)

    heard = with_base(problem, context=read(context), trigger_positions=read(positions))
    latents = {height: torch.randn(3, 4, height, 7, generator=seeded(height)) for height in (4, 6)}
    captions = {caption: phrased(caption, "<x>") for caption in problem.examples.captions}
    mates = [Mate("a man", "", ""), Mate("the man", "", ""), Mate("man", "", " on the beach")]
    return replace(heard, company=Company(latents, mates, captions, "of-three"), **changed)


def taught(settings, folder=None, problem=None, **keeping):
    problem = accompanied(tiny_problem()) if problem is None else problem
    return learned(train(problem, settings, keeping=Keeping(folder, **keeping), basis=tiny_basis()))


def test_without_a_share_company_changes_nothing():
    with_it = taught(RESUME_SETTINGS)
    assert_same(with_it, learned(train(tiny_problem(), RESUME_SETTINGS, basis=tiny_basis())))
    beside = taught(replace(RESUME_SETTINGS, company=0.5))
    assert not torch.equal(with_it["unet.to_v.up"], beside["unet.to_v.up"])


def test_the_same_seed_gives_the_same_concept_and_the_base_is_untouched():
    problem, settings = accompanied(tiny_problem()), replace(RESUME_SETTINGS, company=0.5)
    before = weights_hash(problem)
    assert_same(taught(settings, problem=problem), taught(settings, problem=problem))
    assert weights_hash(problem) == before and hook_count(problem) == 0
    other = taught(replace(settings, seed=1), problem=problem)
    assert not torch.equal(other["token.<x>"], taught(settings, problem=problem)["token.<x>"])


@pytest.mark.parametrize("step", [1, 7, 12])
def test_a_resumed_training_ends_bit_for_bit_where_it_would_have(step, tmp_path):
    settings = replace(EVERYTHING, company=0.5, keep_checkpoints=100)
    problem = accompanied(problem_with_everything())
    whole = taught(settings, tmp_path / "whole", problem)
    checkpoint = tmp_path / "whole" / f"step-{step:08d}.safetensors"
    assert_same(taught(settings, problem=problem, resume=checkpoint), whole)


def test_a_checkpoint_of_before_goes_on_and_another_company_is_said(tmp_path):
    settings, problem = replace(RESUME_SETTINGS, steps=6, keep_checkpoints=100), accompanied(tiny_problem())
    taught(settings, tmp_path / "old", tiny_problem())
    assert_same(
        taught(settings, resume=tmp_path / "old" / "step-00000003.safetensors"),
        learned(train(tiny_problem(), settings, basis=tiny_basis())),
    )
    beside, third = replace(settings, company=0.5), "step-00000003.safetensors"
    with pytest.raises(AdapterError, match="company was 0.0, is now 0.5"):
        taught(beside, resume=tmp_path / "old" / third)
    taught(beside, resume=tmp_path / "old" / third, accept_changes=True)
    taught(beside, tmp_path / "new")
    assert checkpoint_settings(tmp_path / "new")["company"] == 0.5
    other = replace(problem, company=replace(problem.company, fingerprint="other"))
    with pytest.raises(AdapterError, match="step-00000003.safetensors cannot be resumed: the pictures of company are"):
        taught(beside, problem=other, resume=tmp_path / "new" / third)
    taught(beside, problem=other, resume=tmp_path / "new" / third, accept_changes=True)
    taught(settings, resume=tmp_path / "new" / third, accept_changes=True)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_in_company_and_says_so(method):
    before, own = traces(untrained_base()), method in ("own_words", "custom_diffusion")
    targets = Targets(("cross_attention_kv",)) if own else Targets(("cross_attention",))
    settings = replace(SETTINGS, method=method, company=0.5, steps=2, slot=0)
    concept, result = train_concept(untrained_base(), in_company(), settings, targets)
    assert result.finished and concept.recipe.training["company"] == 0.5
    assert all(adapter.lora_up.abs().max() > 0 for adapter in concept.layers.values())
    assert traces(untrained_base()) == before


def test_attention_stays_in_the_concepts_half_without_any_mask():
    settings = replace(SETTINGS, attention_regularisation=1.0)
    problem = problem_for(untrained_base(), in_company())
    plain = train(problem, replace(settings, attention_regularisation=0.0))
    assert train(problem, settings).losses[0] > plain.losses[0] + 0.05


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_estimate_is_that_of_the_widest_step(share):
    problem = problem_for(untrained_base(), in_company())
    settings = replace(SETTINGS, company=share, steps=6)
    estimate = rehearse(problem, settings)
    with LiveMemory() as live:
        train(problem, settings)
    assert 0.85 * live.peak < estimate.memory_bytes < 1.15 * live.peak
    assert estimate.seconds_per_step > 0


# --- refusals ---


def test_a_caption_without_room_for_company_is_refused_before_anything_is_drawn():
    base, settings = untrained_base(), replace(SETTINGS, token_vectors=4)
    short = subject_of(2)
    check_training(base, short, settings)
    long = replace(short, captions=["a <x> on the beach", f"{'red ' * 33}<x>"])
    check_training(base, long, replace(settings, company=0.0))
    with pytest.raises(AdapterError, match="<x>' is too long for company: with a .* before it, <x> stands beyond what"):
        check_training(base, long, settings)


def test_memory_that_runs_out_over_one_canvas_is_told_with_the_way_out():
    assert memory_advice(replace(SETTINGS, batch=1)).startswith("set company to 0 (its pictures are twice as wide), ")
    assert "company" not in memory_advice(SETTINGS) + memory_advice(replace(SETTINGS, batch=1, company=0.0))


def test_company_that_cannot_be_is_refused_in_words():
    subject, base = in_company(), untrained_base()
    with pytest.raises(AdapterError, match="company needs pictures of others that the base drew, and there are none"):
        train_concept(base, replace(subject, company=None), SETTINGS)
    with pytest.raises(AdapterError, match="company was drawn for other pictures or captions than these"):
        problem_for(base, replace(subject, captions=["the <x>"] * 4))
    with pytest.raises(AdapterError, match="company was drawn for other pictures or captions than these"):
        problem_for(base, replace(subject, pictures=torch.rand(4, 3, 48, 48)))
    three = replace(subject.company, latents={16: subject.company.latents[16][:, :3]})
    with pytest.raises(AdapterError, match="company has latents of 3 channels, the concept's pictures 12"):
        problem_for(base, replace(subject, company=three))
    frames = replace(subject.company, latents={16: subject.company.latents[16][:, :, None].expand(-1, -1, 4, -1, -1)})
    with pytest.raises(AdapterError, match="these are several frames each; set company to 0"):
        problem_for(base, replace(subject, company=frames))
    for share in (-0.1, 1.5, float("nan"), "half", True):
        with pytest.raises(AdapterError, match="company is"):
            TrainSettings(company=share)
