"""Regions as a picture: where each one holds, in a colour of its own, with its number, concepts and prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import AdapterError
from ..pictures import as_batch, to_image
from ..text.triggers import TRIGGER
from .geometry import Region, region_weights

if TYPE_CHECKING:
    from jaxtyping import Float

LONGEST = 640  # pixels of the drawn picture's longer side
PAPER, INK = (250, 248, 244), (28, 26, 34)
COLOURS = (
    (214, 72, 66), (46, 118, 190), (58, 152, 88), (222, 150, 32),
    (132, 82, 176), (22, 154, 160), (204, 92, 148), (112, 104, 60),
)  # fmt: skip
FILL = 0.5
_FONT, _LINE, _PAD, _GAP = 24, 28, 6, 3  # readable where a node shows the picture at half its size


Chip = tuple[int, int, int, int]  # left, top, right, bottom of what is written about a region


def draw_regions(
    regions: Sequence[Region],
    width: int,
    height: int,
    overlap: str = "average",
    under: Float[Tensor, "h w 3"] | None = None,
) -> Float[Tensor, "1 _ _ 3"]:
    """(1, H, W, 3) in 0..1, in the shape of a picture of (width, height); soft edges and overlaps are seen.

    under: (H, W, 3) in 0..1, a picture to draw upon.  Raises AdapterError when there is no region, and for one that
    leaves the picture.
    """
    from PIL import ImageDraw, ImageFont

    if not regions:
        raise AdapterError("there is no region to show; connect a Concept Region")
    placed = [region.placed(width, height) for region in regions]
    scale = LONGEST / max(width, height)
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    weights = region_weights(placed, size[1], size[0], overlap)
    shares = weights / weights.sum(0).clamp(min=1)
    paper = torch.tensor(PAPER, dtype=torch.float32)[:, None, None].expand(3, *size[::-1]) / 255
    if under is not None:
        paper = F.interpolate(under.movedim(-1, 0)[None].float().cpu(), size=size[::-1], mode="nearest-exact")[0]
    colours = torch.tensor([COLOURS[index % len(COLOURS)] for index in range(len(regions))]) / 255
    cover = shares.sum(0)
    painted = paper * (1 - FILL * cover) + FILL * torch.einsum("rhw,rc->chw", shares, colours)
    image = to_image(painted)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(_FONT)
    chips: list[Chip] = []
    for number, (region, weight) in enumerate(zip(placed, weights, strict=True), 1):
        left, top, right, bottom = _bounds(region, weight)
        colour = COLOURS[(number - 1) % len(COLOURS)]
        if region.box is not None:
            pen.rectangle((left, top, right - 1, bottom - 1), outline=colour, width=3)
        lines = _wrapped(label(number, region), font, max(right - left - 4 * _PAD, 120))
        chips.append(_free_place(_chip_box((left + _PAD, top + _PAD), lines, font, size), chips, size))
        _chip(pen, chips[-1], lines, font, colour)
    return as_batch(image)


def label(number: int, region: Region) -> str:
    """ "2 tom + hat: a <tom> on the beach", with what differs from a plain region behind it."""
    names = concept_names(region)
    text = f"{number} {' + '.join(names) or 'no concept'}: {region.prompt.strip() or '(no prompt)'}"
    more = []
    if region.strength != 1:
        more.append(f"strength {region.strength:g}")
    if (region.start, region.end) != (0.0, 1.0):
        more.append(f"from {region.start:g} to {region.end:g}")
    if region.priority:
        more.append(f"priority {region.priority}")
    return text + (f" ({', '.join(more)})" if more else "")


def concept_names(region: Region) -> tuple[str, ...]:
    """Those it names, or the trigger words in its prompt."""
    return tuple(TRIGGER.findall(region.prompt)) if region.concepts is None else tuple(region.concepts)


def _bounds(region: Region, weights: Tensor) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) in the drawn picture's pixels."""
    height, width = weights.shape
    if region.box is not None:
        left, top, right, bottom = region.box
        return round(left * width), round(top * height), round(right * width), round(bottom * height)
    rows, columns = (weights > 0.5).any(1).nonzero(), (weights > 0.5).any(0).nonzero()
    if not len(rows):
        return 0, 0, width, height
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _wrapped(text: str, font, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines if len(lines) <= 5 else [*lines[:4], lines[4] + " ..."]


def _chip_box(corner: tuple[int, int], lines: Sequence[str], font, size: tuple[int, int]) -> Chip:
    """Around these lines, inside the picture even where the region is narrow."""
    wide = int(max(font.getlength(line) for line in lines)) + 2 * _PAD
    high = len(lines) * _LINE + 2 * _PAD
    left, top = (
        max(0, min(place, most - side - 2)) for place, most, side in zip(corner, size, (wide, high), strict=True)
    )
    return left, top, left + wide, top + high


def _free_place(box: Chip, taken: Sequence[Chip], size: tuple[int, int]) -> Chip:
    """The box, or the nearest place beside, above or below others where it covers none; the box where there is none."""
    left, top, wide, high = box[0], box[1], box[2] - box[0], box[3] - box[1]
    beside = taken[-12:]  # enough, and quick with many regions
    lefts = [left, *(edge for near in beside for edge in (near[2] + _GAP, near[0] - _GAP - wide))]
    tops = [top, *(edge for near in beside for edge in (near[3] + _GAP, near[1] - _GAP - high))]
    free = [
        (abs(x - left) + abs(y - top), (x, y, x + wide, y + high))
        for x in lefts
        for y in tops
        if x >= 0 and y >= 0 and x + wide < size[0] and y + high < size[1]
        and not any(x < near[2] and near[0] < x + wide and y < near[3] and near[1] < y + high for near in taken)
    ]  # fmt: skip
    return min(free)[1] if free else box


def _chip(pen, box: Chip, lines: Sequence[str], font, colour) -> None:
    pen.rounded_rectangle(box, 5, fill=PAPER, outline=colour, width=2)
    for row, line in enumerate(lines):
        pen.text((box[0] + _PAD, box[1] + _PAD - 1 + row * _LINE), line, INK, font)
