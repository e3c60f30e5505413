"""Every picture comes as often as it should, in batches of one size."""

from dataclasses import replace

import pytest
import torch
from tiny_problem import EVERYTHING, problem_with_everything, tiny_basis

from modular_concepts.seeds import seeded
from modular_concepts.training.batches import draw_batches
from modular_concepts.training.run import Run
from modular_concepts.training.shuffle import Shuffle

GROUPS = [0, 0, 1, 0, 2]


def test_one_size_is_taken_in_the_shuffled_order():
    order, generator = Shuffle(torch.arange(5), seeded(1), [3] * 5), seeded(1)
    expected = torch.cat([torch.randperm(5, generator=generator) for _ in range(3)])
    assert torch.equal(torch.cat([order.take(3) for _ in range(5)]), expected)


def test_a_batch_has_one_size_and_every_picture_comes_equally_often():
    order = Shuffle(torch.arange(5), seeded(1), GROUPS)
    batches = [order.take(2) for _ in range(500)]
    assert all(len({GROUPS[index] for index in batch.tolist()}) == 1 for batch in batches)
    counts = torch.cat(batches).bincount(minlength=5)
    assert counts.sum() == 1000 and (counts - 200).abs().max() <= 3
    assert len(order.pending) < 5 * 3


def test_repeats_are_counted():
    order = Shuffle(torch.tensor([0, 1, 1, 1, 2]), seeded(1))
    counts = torch.cat([order.take(5) for _ in range(10)]).bincount()
    assert counts.tolist() == [10, 30, 10]


def test_what_is_left_is_gone_on_from_without_pictures_that_are_gone():
    order, again = (Shuffle(torch.arange(5), seeded(1), GROUPS) for _ in range(2))
    for _ in range(3):
        order.take(2)
    again.set_pending(order.pending)
    again.generator.set_state(order.generator.get_state())
    assert all(torch.equal(order.take(2), again.take(2)) for _ in range(10))
    fewer = Shuffle(torch.arange(3), seeded(1))
    fewer.set_pending(torch.tensor([4, 2, 3, 0]))
    assert fewer.pending.tolist() == [2, 0]


@pytest.mark.parametrize("groups", [None, GROUPS, [0, 1, 2, 3, 4], [0, 0, 0, 0, 1]])
@pytest.mark.parametrize("batch", [1, 3, 7])
def test_what_a_run_leaves_is_possible_and_a_picture_more_is_not(groups, batch):
    order = Shuffle(torch.tensor([0, 1, 1, 2, 3, 4]), seeded(2), groups, batch)
    for _ in range(200):
        order.take(batch)
        assert torch.equal(order.possible(order.pending), order.pending)
    endless = torch.cat([order.pending, torch.zeros(order.batch + 2, dtype=torch.int64)])
    assert len(order.possible(endless)) < len(endless)


def batches(**changed):
    problem = problem_with_everything()
    run = Run(problem, replace(EVERYTHING, **changed), tiny_basis())
    return problem, [batch for _ in range(200) for batch in draw_batches(problem, run)[:1]]


def test_captions_vary_as_asked_and_keep_their_first_part():
    problem, drawn = batches(caption_dropout=0.25)
    captions = [caption for batch in drawn for caption in batch.captions]
    assert 0.2 < captions.count("") / len(captions) < 0.3
    said = {caption for caption in captions if caption}
    assert {caption.split(", ")[0] for caption in said} == {text.split(", ")[0] for text in problem.examples.captions}
    assert {"a <x> man, on, the beach", "a <x> man, the beach, on"} <= said
    whole = {tuple(sorted(caption.split(", "))) for caption in said}
    assert whole == {tuple(sorted(text.split(", "))) for text in problem.examples.captions}
    _, plain = batches(caption_dropout=0.0, shuffle_tags=False)
    assert {caption for batch in plain for caption in batch.captions} == set(problem.examples.captions)


def test_half_of_the_pictures_are_mirrored():
    problem, drawn = batches()
    examples, turned, count = problem.examples, 0, 0
    for batch in drawn:
        for latent in batch.latents:
            count += 1
            turned += any(torch.equal(latent, own) for own in examples.mirrored)
            assert any(torch.equal(latent, own) for own in [*examples.latents, *examples.mirrored])
    assert 0.45 < turned / count < 0.55
