"""Regions of which a person should know something before they are drawn."""

from dataclasses import replace

import pytest
import torch

from modular_concepts.regions.geometry import Region
from modular_concepts.regions.warnings import doubtful_places

LEFT, RIGHT = Region("a dog", (0.0, 0.0, 0.5, 1.0)), Region("a cat", (0.5, 0.0, 1.0, 1.0))


def test_regions_apart_say_nothing():
    assert doubtful_places([LEFT, RIGHT, Region("a man", mask=torch.eye(8)), Region("nowhere yet")]) == []


@pytest.mark.parametrize(
    ("region", "words"),
    [
        (Region("a dog", (0.1, 0.1, 0.101, 0.9)), "smaller than one of the 64 x 64 positions"),
        (Region("a dog", mask=torch.zeros(8, 8)), "empty mask"),
        (Region("a dog", mask=torch.eye(8) / 255), "mask that is nearly black all over"),
        (replace(LEFT, strength=0.0), "strength 0"),
    ],
)
def test_a_region_that_draws_nothing(region, words):
    (sentence,) = doubtful_places([region, RIGHT], (64, 64))
    assert "'a dog'" in sentence and words in sentence


def test_a_size_that_is_not_known_is_taken_for_a_large_one():
    small = Region("a dog", (0.0, 0.0, 0.01, 1.0))
    assert doubtful_places([small], (64, 64)) and doubtful_places([small], None) == []
    assert doubtful_places([Region("a dog", (0.0, 0.0, 0.001, 0.001))], None)


@pytest.mark.parametrize(
    "other",
    [
        replace(LEFT, prompt="a cat"),
        Region("a cat", mask=torch.tensor([[1.0, 0.0]])),
        replace(LEFT, prompt="a cat", start=0.5),
    ],
)
def test_two_in_one_place(other):
    (shared,) = doubtful_places([LEFT, other], (64, 64))
    assert "'a dog' and 'a cat' are in the same place: they share it" in shared
    (covered,) = doubtful_places([LEFT, other], (64, 64), "priority")
    assert "'a cat' lies on top of 'a dog'" in covered
    (covered,) = doubtful_places([replace(LEFT, priority=1), other], (64, 64), "priority")
    assert "'a dog' lies on top of 'a cat'" in covered


def test_one_after_the_other_in_one_place_share_nothing():
    assert doubtful_places([replace(LEFT, end=0.5), replace(LEFT, start=0.5)], (64, 64)) == []


def test_boxes_in_pixels_are_compared_before_their_picture_is_known():
    one = Region("a dog", (0, 0, 64, 64), pixels=True)
    assert len(doubtful_places([one, replace(one, prompt="a cat"), replace(one, box=(0, 0, 32, 64))])) == 1
