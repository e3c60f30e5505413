"""The heat map shows every pair, and the darker the louder; drawn without matplotlib."""

from dataclasses import replace

import pytest
import torch
from untrained_toy import filled_concept

from modular_concepts.crosstalk.heatmap import CELL, COLOURS, draw_report
from modular_concepts.crosstalk.measures import crosstalk_table, distinct_names


def concepts(count: int):
    return [filled_concept(f"c{index}", index) for index in range(count)]


def drawn(some):
    return draw_report(distinct_names(some), crosstalk_table(some))


@pytest.mark.parametrize("count", [2, 3, 8])
def test_a_picture_has_room_for_every_pair(count):
    picture = drawn(concepts(count))
    assert picture.shape[0] == 1 and picture.shape[3] == 3 and picture.dtype == torch.float32
    assert picture.min() >= 0 and picture.max() <= 1 and picture.shape[2] > 2 * count * CELL


def test_colours_say_how_much():
    one = filled_concept("one", 1)
    twins = drawn([one, replace(one, name="other")])
    apart = drawn([one, filled_concept("two", 2)])
    darkest = torch.tensor(COLOURS[-1]) / 255

    def dark_cells(picture):
        return ((picture - darkest).abs().amax(-1) < 0.01).sum() / CELL**2

    assert dark_cells(twins) > 1 > dark_cells(apart)
