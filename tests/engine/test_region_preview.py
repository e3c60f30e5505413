"""The picture of regions: its shape, its colours where they hold, its labels."""

from __future__ import annotations

import pytest
import torch

from modular_concepts.errors import AdapterError
from modular_concepts.regions.geometry import Region
from modular_concepts.regions.preview import COLOURS, FILL, LONGEST, PAPER, _free_place, draw_regions, label

LEFT = Region("a <tom> on the beach", (0.0, 0.0, 0.5, 1.0))
RIGHT = Region("a <tim> on the beach", (0.5, 0.0, 1.0, 1.0), concepts=("tim", "hat"))


def colour_at(picture: torch.Tensor, x: float, y: float) -> torch.Tensor:
    _, height, width, _ = picture.shape
    return picture[0, int(y * height), int(x * width)] * 255


def filled(number: int, share: float = 1.0) -> torch.Tensor:
    paper, colour = torch.tensor(PAPER, dtype=torch.float32), torch.tensor(COLOURS[number], dtype=torch.float32)
    return paper + FILL * share * (colour - paper)


@pytest.mark.parametrize(("width", "height"), [(96, 32), (32, 96), (512, 512), (1000, 24)])
def test_it_has_the_pictures_shape_and_a_readable_size(width, height):
    picture = draw_regions([LEFT, RIGHT], width, height)
    assert picture.shape[0] == 1 and picture.shape[3] == 3 and max(picture.shape[1:3]) == LONGEST
    assert picture.shape[2] / picture.shape[1] == pytest.approx(width / height, rel=0.03)
    assert picture.min() >= 0 and picture.max() <= 1


def test_each_region_is_filled_with_its_colour_and_the_rest_is_paper():
    gap = Region("a dog", (0.6, 0.5, 1.0, 1.0))
    picture = draw_regions([LEFT, gap], 64, 64)
    assert torch.allclose(colour_at(picture, 0.25, 0.75), filled(0), atol=1)
    assert torch.allclose(colour_at(picture, 0.8, 0.9), filled(1), atol=1)
    assert torch.allclose(colour_at(picture, 0.8, 0.3), torch.tensor(PAPER, dtype=torch.float32), atol=1)


def test_masks_and_soft_edges_are_seen():
    mask = torch.zeros(8, 8)
    mask[4:, 4:] = 0.5
    picture = draw_regions([Region("", mask=mask)], 64, 64)
    assert torch.allclose(colour_at(picture, 0.9, 0.9), filled(0, 0.5), atol=1.5)
    soft = draw_regions([Region("a", (0.0, 0.0, 0.5, 1.0), feather=0.2)], 64, 64)
    assert torch.allclose(colour_at(soft, 0.55, 0.9), filled(0, 0.25), atol=4)


def test_an_overlap_is_shared_or_given_to_the_one_on_top():
    above = Region("b", (0.0, 0.0, 1.0, 1.0), priority=-1)
    shared, ordered = (draw_regions([LEFT, above], 64, 64, overlap) for overlap in ("average", "priority"))
    assert torch.allclose(colour_at(shared, 0.25, 0.75), (filled(0) + filled(1)) / 2, atol=1)
    assert torch.allclose(colour_at(ordered, 0.25, 0.75), filled(0), atol=1)


def test_a_picture_lies_under_it():
    under = torch.zeros(4, 4, 3)
    assert colour_at(draw_regions([LEFT], 4, 4, under=under), 0.9, 0.9).max() < 1


def test_labels_say_who_is_there_and_what_is_unusual():
    assert label(1, LEFT) == "1 tom: a <tom> on the beach"
    assert label(2, RIGHT) == "2 tim + hat: a <tim> on the beach"
    assert label(3, Region("a cat", (0, 0, 1, 1), concepts=())) == "3 no concept: a cat"
    late = Region("", (0, 0, 1, 1), strength=0.5, start=0.2, priority=3)
    assert label(4, late) == "4 no concept: (no prompt) (strength 0.5, from 0.2 to 1, priority 3)"


def test_what_cannot_be_shown_is_refused():
    with pytest.raises(AdapterError, match="there is no region to show; connect a Concept Region"):
        draw_regions([], 64, 64)
    with pytest.raises(AdapterError, match=r"reaches to \(80, 8\), but the picture is only 64 x 64"):
        draw_regions([Region("a", (0, 0, 80, 8), pixels=True)], 64, 64)


def test_a_label_makes_way_for_those_before_it():
    taken = [(10, 10, 60, 40)]
    assert _free_place((100, 10, 150, 40), taken, (200, 100)) == (100, 10, 150, 40)
    assert _free_place((20, 15, 70, 45), taken, (200, 100)) == (20, 43, 70, 73)
    assert _free_place((20, 15, 70, 45), taken, (200, 60)) == (63, 15, 113, 45), "beside, where there is no room below"
    assert _free_place((20, 15, 70, 45), taken, (80, 60)) == (20, 15, 70, 45), "nowhere: then as it was"
