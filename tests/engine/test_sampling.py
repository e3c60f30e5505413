"""Sampling: a picture is a function of its prompt and seed, whatever else is drawn beside it."""

import pytest
import torch
from laws import EFFECT, relative_error
from untrained_toy import QUICK, picture, traces, untrained_base

from modular_concepts.errors import AdapterError
from modular_concepts.sampling import SampleSettings, sample

PROMPTS = ("a man on the beach", "a red car at night", "a cat in the snow")


def test_a_seed_gives_the_same_picture_and_another_seed_another():
    first = picture(PROMPTS[0], seed=3)
    assert first.shape == (3, 32, 32) and first.min() >= 0 and first.max() <= 1
    torch.rand(5)
    assert torch.equal(picture(PROMPTS[0], seed=3), first)
    assert relative_error(picture(PROMPTS[0], seed=4), first) > EFFECT
    assert relative_error(picture(PROMPTS[1], seed=3), first) > EFFECT


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_a_picture_does_not_depend_on_its_batch(batch):
    settings = SampleSettings(steps=2, cfg=4.0, batch=batch)
    together = sample(untrained_base(), PROMPTS, [7, 5, 7], settings=settings)
    for shown, prompt, seed in zip(together, PROMPTS, [7, 5, 7], strict=True):
        assert relative_error(shown, picture(prompt, seed)) < 1e-5


def test_sampling_leaves_the_base_and_the_global_random_state_alone():
    state, before = torch.get_rng_state(), traces(untrained_base())
    drawn = picture(PROMPTS[0])
    assert torch.equal(torch.get_rng_state(), state) and traces(untrained_base()) == before
    assert not drawn.requires_grad


def test_without_guidance_the_base_runs_once_and_reads_no_negative():
    sizes = []
    handle = untrained_base().unet.register_forward_pre_hook(lambda _module, args: sizes.append(len(args[0])))
    try:
        alone = picture(PROMPTS[0], settings=SampleSettings(steps=2, cfg=1.0))
        assert sizes == [1, 1]
        ignored = picture(PROMPTS[0], settings=SampleSettings(steps=2, cfg=1.0, negative=PROMPTS[1]))
        guided = picture(PROMPTS[0])
        assert sizes == [1, 1, 1, 1, 2, 2]
    finally:
        handle.remove()
    assert torch.equal(alone, ignored)
    assert relative_error(guided, alone) > EFFECT
    against = picture(PROMPTS[0], settings=SampleSettings(steps=2, cfg=4.0, negative=PROMPTS[1]))
    assert relative_error(against, guided) > EFFECT


def test_a_learned_word_with_the_rows_of_a_known_word_means_the_same():
    rows = untrained_base().word_rows("man")
    assert rows.shape == (1, 128)
    assert torch.equal(picture("a <x> on the beach", tokens={"<x>": rows}), picture(PROMPTS[0]))
    other = picture("a <x> on the beach", tokens={"<x>": untrained_base().word_rows("car")})
    assert relative_error(other, picture(PROMPTS[0])) > EFFECT / 10


def test_sizes_of_the_base_and_its_multiples():
    wide = picture(PROMPTS[0], settings=SampleSettings(steps=1, width=96))
    assert wide.shape == (3, 32, 96)
    assert picture(PROMPTS[0], settings=SampleSettings(steps=1, height=8, width=40)).shape == (3, 8, 40)


def test_progress_counts_every_step_of_every_batch():
    told = []
    settings = SampleSettings(steps=2, cfg=1.0, batch=2)
    sample(untrained_base(), PROMPTS, [0, 1, 2], settings=settings, callback=lambda *at: told.append(at))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 33}, "33 x 32"),
        ({"height": 0}, "32 x 0"),
        ({"width": -8}, "-8 x 32"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": -3}, "steps is -3"),
        ({"steps": 1001}, "1000 noise levels"),
        ({"batch": 0}, "batch is 0"),
        ({"cfg": float("nan")}, "cfg is nan"),
    ],
)
def test_settings_that_cannot_work_are_named(changes, words):
    with pytest.raises(AdapterError, match=words):
        picture(PROMPTS[0], settings=SampleSettings(**({"steps": 1} | changes)))


def test_prompts_and_seeds_that_cannot_work_are_named():
    for prompts, seeds, words in (
        (PROMPTS, [1, 2], "3 prompts but 2 seeds"),
        ([], [], "no prompt"),
        (PROMPTS[:1], [-1], "seed -1"),
        (PROMPTS[:1], [2**63], "seed 9223372036854775808"),
    ):
        with pytest.raises(AdapterError, match=words):
            sample(untrained_base(), prompts, seeds, settings=QUICK)
