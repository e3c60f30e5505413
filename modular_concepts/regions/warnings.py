"""What a person should know of regions before they are drawn: too small, empty, or in one another's place."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from .geometry import Region, region_weights

FINEST = (128, 128)  # of a latent whose size is not known yet: that of 1024 x 1024 pixels
FAINT = 0.1  # the brightest place of a mask, from 0 to 1, that is painted in white by no one


def doubtful_places(
    regions: Sequence[Region], size: tuple[int, int] | None = None, overlap: str = "average"
) -> list[str]:
    """A sentence for each region that draws nothing or hardly anything, and for each two in the same place.

    size: (height, width) of the latent, or None where it is not known yet.  overlap: as `region_weights`.
    Regions without a place, and those in pixels of a picture whose size is not known, are compared as they are.
    """
    sentences = [sentence for region in regions for sentence in _alone(region, size)]
    there = [region for region in regions if region.strength and (region.box is not None or _drawn(region))]
    for first, second in itertools.combinations(there, 2):
        if first.start < second.end and second.start < first.end and _same_place(first, second, size):
            sentences.append(_shared(first, second, overlap))
    return sentences


def _alone(region: Region, size: tuple[int, int] | None) -> list[str]:
    if region.strength == 0:
        return [f"region {region.prompt!r} has strength 0, so the global prompt is drawn there"]
    if region.mask is not None and not _drawn(region):
        return [f"region {region.prompt!r} has an empty mask, so it draws nothing; paint where it is"]
    if region.mask is not None and region.mask.max() < FAINT:
        return [
            f"region {region.prompt!r} has a mask that is nearly black all over, so hardly anything of it is drawn; "
            "paint where it is in white"
        ]
    if region.box is None or region.pixels:
        return []
    (left, top, right, bottom), (height, width) = region.box, size or FINEST
    if (right - left) * width >= 1 and (bottom - top) * height >= 1:
        return []
    grid = f"one of the {width} x {height} positions in which the picture is drawn" if size else "what can be drawn"
    return [
        f"region {region.prompt!r} is smaller than {grid}: it gets one position wide or high, in which hardly anything "
        "shows; make it larger"
    ]


def _drawn(region: Region) -> bool:
    return region.mask is not None and bool((region.mask > 0).any())


def _same_place(first: Region, second: Region, size: tuple[int, int] | None) -> bool:
    if first.pixels or second.pixels:
        return first.pixels == second.pixels and first.box is not None and first.box == second.box
    one, other = region_weights([first, second], *(size or FINEST)) > 0
    return torch.equal(one, other)


def _shared(first: Region, second: Region, overlap: str) -> str:
    both = f"regions {first.prompt!r} and {second.prompt!r} are in the same place"
    if overlap == "average":
        return f"{both}: they share it, and a mixture of both is drawn there; move one, or write both into one prompt"
    above, below = (first, second) if first.priority > second.priority else (second, first)
    return f"{both}: {above.prompt!r} lies on top of {below.prompt!r}, which is hardly drawn; move one"
