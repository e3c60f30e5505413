"""Sizes for pictures that keep their aspect: each near the training area, each side a multiple of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LONGEST = 4  # times the shorter side


def bucket(height: int, width: int, size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """(height, width) to train a picture at: the aspect closest to its own with about, at most, the area of `size`.

    Sides are multiples of `multiple`; no side is more than LONGEST times the other.
    """
    area = size[0] * size[1]
    candidates = []
    for one in range(multiple, math.isqrt(area * LONGEST) + 1, multiple):
        other = area // one // multiple * multiple
        if other and max(one, other) <= LONGEST * min(one, other):
            candidates += [(one, other), (other, one)]
    if not candidates:
        return multiple, multiple
    aspect = math.log(width / height)
    return min(candidates, key=lambda side: (abs(math.log(side[1] / side[0]) - aspect), -side[0] * side[1]))


def stacked(pictures: Sequence[Tensor]) -> Tensor | list[Tensor]:
    """One tensor (N, ...) of pictures that have one size, or the list of them."""
    return torch.stack(list(pictures)) if len({picture.shape for picture in pictures}) == 1 else list(pictures)


def sizes_of(pictures: Tensor | Sequence[Tensor]) -> list[tuple[int, int]]:
    """(height, width) of each picture or latent."""
    return [(picture.shape[-2], picture.shape[-1]) for picture in pictures]
