"""Boxes and masks: from what a person draws to one weight per token of a layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import AdapterError


@dataclass(frozen=True)
class Region:
    """A prompt and where it holds.

    box: (left, top, right, bottom), fractions 0..1 of the picture; mask: (H, W) in 0..1 of any size instead.
    """

    prompt: str
    box: tuple[float, float, float, float] | None = None
    mask: Tensor | None = None
    negative: str | None = None

    def __post_init__(self):
        if (self.box is None) == (self.mask is None):
            raise AdapterError(f"region {self.prompt!r} needs either a box or a mask")
        if self.mask is not None and not (
            self.mask.dim() == 2 and self.mask.numel() and bool(torch.isfinite(self.mask).all())
        ):
            raise AdapterError(
                f"region {self.prompt!r} has a mask of shape {tuple(self.mask.shape)}; "
                "give (height, width) finite numbers from 0 to 1"
            )
        if self.box is not None:
            left, top, right, bottom = self.box
            if not (all(map(math.isfinite, self.box)) and 0 <= left < right <= 1 and 0 <= top < bottom <= 1):
                raise AdapterError(
                    f"region {self.prompt!r} has the box {self.box}; "
                    "give left, top, right, bottom as fractions, "
                    "0 <= left < right <= 1 and 0 <= top < bottom <= 1"
                )


def fractions(box: Sequence[float], width: int, height: int) -> tuple[float, float, float, float]:
    """A box as fractions: as it is when all values are at most 1, else taken as pixels of (width, height)."""
    if len(box) != 4:
        raise AdapterError(f"a box has four numbers (left, top, right, bottom), not {len(box)}")
    if max(box) <= 1:
        return tuple(float(value) for value in box)
    left, top, right, bottom = box
    return left / width, top / height, right / width, bottom / height


def region_weights(regions: Sequence[Region], height: int, width: int) -> Tensor:
    """(R, height, width) float32 in 0..1: how much of each cell of a feature grid a region covers.

    A box's edges snap to the nearest grid line, so neighbours leave no gap; a box too small for the grid
    keeps the one cell of its centre.  A mask is averaged over each cell.
    """
    weights = torch.zeros(len(regions), height, width)
    for weight, region in zip(weights, regions, strict=True):
        if region.mask is not None:
            mask = region.mask.to(weight)[None, None]
            weight.copy_(F.interpolate(mask, size=(height, width), mode="area")[0, 0].clamp(0, 1))
            continue
        left, top, right, bottom = region.box
        rows, columns = _snap(top, bottom, height), _snap(left, right, width)
        weight[rows, columns] = 1.0
    return weights


def _snap(low: float, high: float, cells: int) -> slice:
    first, last = round(low * cells), round(high * cells)
    if first == last:
        first = min(int((low + high) / 2 * cells), cells - 1)
        last = first + 1
    return slice(first, last)


def grid_of(tokens: int, height: int, width: int) -> tuple[int, int]:
    """(rows, columns) of a layer of `tokens` positions on a (height, width) latent, halved until it fits."""
    rows, columns = height, width
    while rows * columns > tokens and rows > 1:
        rows, columns = math.ceil(rows / 2), math.ceil(columns / 2)
    if rows * columns != tokens:
        raise AdapterError(
            f"a layer has {tokens} positions, which is no halving of the {height} x {width} latent; "
            "choose a picture size that is a multiple of 64"
        )
    return rows, columns
