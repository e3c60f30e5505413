"""Boxes and masks: from what a person draws to one weight per token of a layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import AdapterError
from ..settings import drawing as declared

if TYPE_CHECKING:
    from jaxtyping import Float32

OVERLAPS = declared.OVERLAP.choices
_MOST_PIXELS = 2**20


@dataclass(frozen=True)
class Region:
    """A prompt and where it holds.

    box: (left, top, right, bottom), fractions 0..1 of the picture; mask: (H, W) in 0..1 of any size instead.
    With neither it has no place yet, and one must be found before it can be drawn (`regions/find.py`).
    feather: width of the soft edge, half of it on each side, as a fraction of the picture's shorter side.
    strength: how far the prompt replaces the global one inside, 0..1.
    pixels: box and feather count pixels of a picture that is not known yet; see `placed`.
    concepts: names of those that act here; None is those whose trigger word stands in the prompt, () is none.
    start, end: the part of the sampling in which it holds, 0..1 of the way from noise to picture.
    control: what ControlNets and adapters are multiplied with here; 0 leaves the region free of them.
    priority: who lies on top where regions overlap, if priority decides; of equals the later one.
    """

    prompt: str
    box: tuple[float, float, float, float] | None = None
    mask: Tensor | None = None
    negative: str | None = None
    feather: float = declared.FEATHER.default
    strength: float = declared.STRENGTH.default
    pixels: bool = False
    concepts: tuple[str, ...] | None = None
    start: float = declared.START.default
    end: float = declared.END.default
    priority: int = declared.PRIORITY.default
    control: float = declared.CONTROL.default

    def __post_init__(self):
        if self.box is not None and self.mask is not None:
            raise AdapterError(f"region {self.prompt!r} has a box and a mask; give one of them")
        for setting, value in ((declared.STRENGTH, self.strength), (declared.CONTROL, self.control)):
            if not setting.allows(value):
                what = f"region {self.prompt!r} has {setting.name} {value}"
                raise AdapterError(f"{what}; it must be {setting.reach}")
        if not 0 <= self.start < self.end <= 1:
            raise AdapterError(
                f"region {self.prompt!r} holds from {self.start:g} to {self.end:g} of the sampling; "
                "give 0 <= start < end <= 1"
            )
        if isinstance(self.concepts, str):
            raise AdapterError(f"region {self.prompt!r} names its concepts as one text; give a tuple of names")
        if not 0 <= self.feather <= (_MOST_PIXELS if self.pixels else 1):
            raise AdapterError(
                f"region {self.prompt!r} has a feather of {self.feather:g}"
                f"{' pixels' if self.pixels else ''}; it must be from 0 to the picture's shorter side"
                f"{'' if self.pixels else ', which is 1'}"
            )
        if self.mask is not None and not (
            self.mask.dim() == 2 and self.mask.numel() and bool(torch.isfinite(self.mask).all())
        ):
            raise AdapterError(
                f"region {self.prompt!r} has a mask of shape {tuple(self.mask.shape)}; "
                "give (height, width) finite numbers from 0 to 1"
            )
        if self.box is not None:
            left, top, right, bottom = self.box
            most = math.inf if self.pixels else 1
            if not (all(map(math.isfinite, self.box)) and 0 <= left < right <= most and 0 <= top < bottom <= most):
                unit, limit = ("pixels", "") if self.pixels else ("fractions", " <= 1")
                raise AdapterError(
                    f"region {self.prompt!r} has the box {self.box}; "
                    f"give left, top, right, bottom as {unit}, 0 <= left < right{limit} and 0 <= top < bottom{limit}"
                )

    @property
    def unplaced(self) -> bool:
        return self.box is None and self.mask is None

    def holds(self, progress: float) -> bool:
        """Whether it holds at this point of the sampling: from `start` on, and before `end`."""
        return self.start <= progress and (progress < self.end or self.end == 1)

    def placed(self, width: int, height: int) -> Region:
        """The same in fractions of a picture of this size.  AdapterError for a box in pixels that leaves it."""
        if not self.pixels:
            return self
        box = None
        if self.box is not None:
            left, top, right, bottom = self.box
            if right > width or bottom > height:
                raise AdapterError(
                    f"region {self.prompt!r} reaches to ({right:g}, {bottom:g}), but the picture is only "
                    f"{width} x {height} pixels; move it inside or make the picture larger"
                )
            box = (left / width, top / height, right / width, bottom / height)
        return replace(self, box=box, feather=self.feather / min(width, height), pixels=False)


def region_from(
    prompt: str,
    box: tuple[float, float, float, float] | None,
    pixels: bool,
    mask: Tensor | None,
    feather: float,
    strength: float,
    negative: str,
    **more: Any,
) -> Region:
    """A region from what a person filled in: a mask, (H, W) or (1, H, W), takes the place of the box.

    box: None without a mask is a place still to be found.
    more: `concepts`, `start`, `end`, `priority` and `control` as `Region` has them.
    """
    if mask is not None and mask.dim() == 3:
        if len(mask) != 1:
            raise AdapterError(f"region {prompt!r} has {len(mask)} masks; give one, a region for each")
        mask = mask[0]
    if mask is None and box is not None and not pixels and max(box) > 1 and all(map(math.isfinite, box)):
        raise AdapterError(
            f"region {prompt!r} has the box {box}, which reaches outside the picture: as fractions all four are "
            "at most 1; correct them, or set units to pixels"
        )
    box = None if mask is not None else box
    return Region(prompt, box, mask, negative.strip() or None, feather, strength, pixels, **more)


def region_weights(
    regions: Sequence[Region], height: int, width: int, overlap: str = "average"
) -> Float32[Tensor, "{len(regions)} {height} {width}"]:
    """(R, height, width) float32 in 0..1: how much of each cell of a feature grid a region covers.

    A box's edges snap to the nearest grid line, so neighbours leave no gap; a box too small for the grid
    keeps the one cell of its centre.  A mask is averaged over each cell.  Feathers blur what that gives, so
    neighbours with one feather still add up to 1; then the strength multiplies.
    overlap: "average" lets all have what they cover; with "priority" the highest takes its own and those below
    what is left of the cell, so that the sum is never above 1.
    """
    declared.OVERLAP.check(overlap)
    weights = torch.zeros(len(regions), height, width)
    for weight, region in zip(weights, regions, strict=True):
        weight.copy_(_find_cover(region, height, width))
        if region.feather:
            weight.copy_(_blur(weight, region.feather * min(height, width)))
        if region.strength != 1:
            weight.mul_(region.strength)
    if overlap == "priority":
        left = torch.ones(height, width)
        for number in sorted(range(len(regions)), key=lambda own: (regions[own].priority, own), reverse=True):
            weights[number] = torch.minimum(weights[number], left)
            left = left - weights[number]
    return weights


def refuse_unplaced(regions: Sequence[Region]) -> None:
    """Raise AdapterError for a region that nobody has given a place."""
    for region in regions:
        if region.unplaced:
            raise AdapterError(
                f"region {region.prompt!r} has no place; give it a box or a mask, or draw it with a sampler that "
                "finds places"
            )


def _find_cover(region: Region, height: int, width: int) -> Tensor:
    refuse_unplaced([region])
    if region.pixels:
        raise AdapterError(f"region {region.prompt!r} counts pixels of a picture that nobody named; place it first")
    if region.mask is not None:
        mask = region.mask.float().cpu()[None, None]
        return F.interpolate(mask, size=(height, width), mode="area")[0, 0].clamp(0, 1)
    left, top, right, bottom = cast(tuple[float, float, float, float], region.box)  # it has a place
    cover = torch.zeros(height, width)
    cover[_snap(top, bottom, height), _snap(left, right, width)] = 1.0
    return cover


def _blur(cover: Tensor, cells: float) -> Tensor:
    """Mean over a square of `cells` cells, which may be a broken number; the picture's border repeats outside."""
    reach = math.ceil((cells - 1) / 2)
    if reach < 1:
        return cover
    kernel = torch.ones(2 * reach + 1, dtype=torch.float64)  # or a cover of 1 would come back as 0.9999999
    kernel[[0, -1]] = (cells - (2 * reach - 1)) / 2
    kernel = kernel / kernel.sum()
    padded = F.pad(cover.double()[None, None], (reach, reach, reach, reach), mode="replicate")
    rows = F.conv2d(padded, kernel[None, None, :, None])
    return F.conv2d(rows, kernel[None, None, None, :])[0, 0].clamp(0, 1).float()


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
