"""Captions that training cannot change are read once; what the base is told stays what it was."""

from typing import NamedTuple

import torch
from tiny_problem import learned, tiny_basis, tiny_problem
from torch import Tensor

from bench.given_base import with_base
from modular_concepts.training.loop import train
from modular_concepts.training.problem import Examples
from modular_concepts.training.settings import TrainSettings
from modular_concepts.training.text_features import TextFeatures

SETTINGS = TrainSettings(rank=2, slot=1, steps=6, batch=2, adapter_lr=1e-2)
PRIOR = ("a man", "the man", "a man on the beach", "a man")


def problem_that_tells(told, text_trained=False, context=lambda tensor: tensor):
    """A problem with class pictures whose `encode` notes what it reads."""
    latents = torch.randn(4, 4, 6, 5, generator=torch.Generator().manual_seed(5))
    problem = tiny_problem(prior=Examples(latents, PRIOR))
    layers = {name: layer for name, layer in problem.layers.items() if text_trained or name.startswith("unet")}

    def encode(captions, tokens):
        told.append(tuple(captions))
        return context(problem.base.context(captions, tokens))

    return with_base(problem, layers=layers, context=encode)


def test_class_captions_are_read_once_and_alone():
    told = []
    train(problem_that_tells(told), SETTINGS, basis=tiny_basis())
    alone = [captions[0] for captions in told if "<x>" not in captions[0]]
    assert sorted(alone) == sorted(set(PRIOR)) and all(len(own) == 1 for own in told if "<x>" not in own[0])
    alive = [captions for captions in told if "<x>" in captions[0]]
    assert len(alive) == SETTINGS.steps and all(len(captions) == SETTINGS.batch for captions in alive)


def test_a_trained_text_model_reads_every_caption_every_time():
    told = []
    train(problem_that_tells(told, text_trained=True), SETTINGS, basis=tiny_basis())
    assert len(told) == SETTINGS.steps and all(len(captions) == 2 * SETTINGS.batch for captions in told)


def test_what_is_learned_is_as_if_all_were_read_together():
    once = learned(train(problem_that_tells([]), SETTINGS, basis=tiny_basis()))
    told = []
    together = learned(train(problem_that_tells(told, context=Odd), SETTINGS, basis=tiny_basis()))
    assert sum(len(captions) == 2 * SETTINGS.batch for captions in told) == SETTINGS.steps
    for name, tensor in once.items():
        assert torch.allclose(tensor, together[name], rtol=1e-4, atol=1e-6), name


class Odd(list):
    """A context that is no tensor and no named tuple is never taken apart."""

    def __init__(self, tensor):
        super().__init__([tensor])

    def __getattr__(self, name):
        return getattr(self[0], name)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return function(*(arg[0] if isinstance(arg, Odd) else arg for arg in args), **(kwargs or {}))


class Two(NamedTuple):
    text: Tensor
    pooled: Tensor


def test_named_tuples_are_joined_part_by_part_in_the_captions_order():
    problem = problem_that_tells([])
    rows = {"<x>": torch.ones(2, 8, requires_grad=True)}

    def encode(captions, tokens):
        text = problem.base.context(captions, tokens)
        return Two(text, text.mean(dim=1))

    captions = ["a <x> man", "a man", "the <x>", "", "a man"]
    features = TextFeatures(with_base(problem, context=encode), rows, trained=False)
    found, expected = features(captions), encode(captions, rows)
    assert isinstance(found, Two)
    assert all(torch.allclose(own, other, atol=1e-6) for own, other in zip(found, expected, strict=True))
    found.text.sum().backward()
    assert rows["<x>"].grad.abs().max() > 0


def test_a_long_caption_lengthens_those_beside_it():
    problem = problem_that_tells([])

    def encode(captions, tokens):
        text = problem.base.context(captions, tokens)
        return text if any("beach" in caption for caption in captions) else text[:, :6]

    rows = {"<x>": torch.ones(2, 8)}
    features = TextFeatures(with_base(problem, context=encode), rows, trained=False)
    assert features(["a <x> man on the beach", "a man"]).shape[1] == 8
    assert features(["a <x> man", "a man"]).shape[1] == 6
