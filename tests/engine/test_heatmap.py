"""The crosstalk report: a picture of every pair and figures in words, drawn without matplotlib."""

from dataclasses import replace

import pytest
import torch
from untrained_toy import filled_concept

from modular_concepts.crosstalk import crosstalk_table
from modular_concepts.errors import AdapterError
from modular_concepts.heatmap import CELL, COLOURS, crosstalk_report


def concepts(count: int):
    return [filled_concept(f"c{index}", index) for index in range(count)]


@pytest.mark.parametrize("count", [2, 3, 8])
def test_a_report_says_every_pair(count):
    some = concepts(count)
    picture, text = crosstalk_report(some)
    assert picture.shape[0] == 1 and picture.shape[3] == 3 and picture.dtype == torch.float32
    assert picture.min() >= 0 and picture.max() <= 1 and picture.shape[2] > 2 * count * CELL
    for (first, second), figures in crosstalk_table(some)["pairs"].items():
        assert f"{first} x {second}: crosstalk {figures['crosstalk']:.4f}" in text


def test_colours_say_how_much():
    one = filled_concept("one", 1)
    twins, _ = crosstalk_report([one, replace(one, name="other")])
    apart, _ = crosstalk_report([one, filled_concept("two", 2)])
    darkest = torch.tensor(COLOURS[-1]) / 255

    def dark_cells(picture):
        return ((picture - darkest).abs().amax(-1) < 0.01).sum() / CELL**2

    assert dark_cells(twins) > 1 > dark_cells(apart)


def test_same_slots_are_named():
    recipe = replace(filled_concept("a", 1).recipe, basis="f" * 16, slot=3)
    pair = [replace(filled_concept(name, seed), recipe=recipe) for seed, name in enumerate(("tom", "tim"))]
    assert "tom and tim were trained in the same slot, 3" in crosstalk_report(pair)[1]
    assert "same slot" not in crosstalk_report(concepts(2))[1]


def test_nothing_to_compare_is_said():
    with pytest.raises(AdapterError, match="connect at least two"):
        crosstalk_report(concepts(1))
    words = [replace(concept, layers={}) for concept in concepts(2)]
    with pytest.raises(AdapterError, match="no two of these concepts have a layer in common"):
        crosstalk_report(words)
