"""Regions that nobody drew: disjoint, in one piece, where their words are heard."""

import pytest
import torch
import torch.nn.functional as F
from laws import relative_error, seeded

from modular_concepts.errors import AdapterError
from modular_concepts.regions.find import HeardWords, disjoint_masks
from modular_concepts.regions.geometry import Region, region_weights
from modular_concepts.regions.shares import Places


def hill(height: int, width: int, row: float, column: float, spread: float) -> torch.Tensor:
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
    return torch.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (2 * spread**2))


@pytest.mark.parametrize("scale", [1.0, 1e-4, 300.0])
def test_each_hill_is_a_region_whatever_its_height(scale):
    maps = torch.stack([hill(16, 48, 8, 8, 4), 0.2 * hill(16, 48, 8, 24, 4), hill(16, 48, 8, 40, 4)]) * scale
    maps = maps + 0.01 * scale * torch.rand(maps.shape, generator=seeded(1))
    masks = disjoint_masks(maps)
    assert set(masks.unique().tolist()) == {0.0, 1.0} and masks.sum(0).max() == 1
    for mask, column in zip(masks, (8, 24, 40), strict=True):
        assert mask[8, column] == 1 and 30 < mask.sum() < 160
        assert mask[:, abs(torch.arange(48) - column) > 10].sum() == 0
    assert masks.sum(0)[0, 16] == 0  # what no word is heard at is nobody's
    assert torch.equal(disjoint_masks(maps.flip(0)), masks.flip(0))


def test_a_far_echo_is_cut_off_and_a_hill_within_another_keeps_its_place():
    echo = hill(16, 48, 8, 8, 4) + 0.9 * hill(16, 48, 8, 40, 3)
    mask, small = disjoint_masks(torch.stack([echo, hill(16, 48, 8, 24, 3)]))
    assert mask[8, 8] == 1 and mask[:, 30:].sum() == 0 and small[8, 24] == 1
    same = hill(9, 9, 4, 4, 3)
    masks = disjoint_masks(torch.stack([same, same, same]))
    assert masks.sum(0).max() == 1 and masks.flatten(1).sum(1)[0] > 1


def test_what_is_heard_is_the_softmax_over_the_text_however_often_it_is_repeated():
    generator = seeded(2)
    query, key = torch.randn(1, 8, 6, generator=generator), torch.randn(1, 5, 6, generator=generator)
    once, thrice = (HeardWords([[1], [2, 3]], 5, (4, 8)) for _ in range(2))
    once.hear(query, key, 2)
    thrice.hear(query, key.repeat(1, 3, 1), 2)
    heads = [(q @ k.mT / 3**0.5).softmax(-1) for q, k in zip(query[0].split(3, -1), key[0].split(3, -1), strict=True)]
    share = torch.stack(heads).mean(0)
    expected = torch.stack([share[:, 1], share[:, 2:4].sum(-1)]).unflatten(1, (2, 4))
    expected = F.interpolate(expected[None], size=(4, 8), mode="bilinear")[0]
    assert relative_error(once.maps(), expected / expected.max()) < 1e-5
    assert relative_error(thrice.maps(), once.maps()) < 1e-5


def test_the_finest_layers_do_not_count():
    heard = HeardWords([[0]], 2, (8, 8))
    generator = seeded(3)
    key, coarse = torch.randn(1, 2, 4, generator=generator), torch.randn(1, 16, 4, generator=generator)
    heard.hear(coarse, key, 1)
    before = heard.maps()
    heard.hear(torch.randn(1, 64, 4, generator=generator), key, 1)
    assert torch.equal(heard.maps(), before)


def test_a_region_without_a_place_cannot_be_drawn():
    region = Region("a dog")
    assert region.unplaced and not Region("a dog", (0.0, 0.0, 1.0, 1.0)).unplaced
    for attempt in (lambda: region_weights([region], 4, 4), lambda: Places([region])):
        with pytest.raises(AdapterError, match="region 'a dog' has no place; give it a box or a mask"):
            attempt()
