"""Masks whose white is not white, as label masks have it: black and one other value is black and white.

What a mask leaves is a weight, so a concept that is painted in the grey 1 of 255 would count for nothing beside all
that has no mask.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ..errors import AdapterError

if TYPE_CHECKING:
    from PIL.Image import Image

TWO_VALUES = "masks of black and one other value are read as black and white"
DIM_MASK = "masks that are nowhere brighter than half count the concept for less than its surroundings elsewhere"
FAINTEST, HALF = 26, 128  # of 255, the brightest place of a mask that is read, and of one that is read without a word


def whiten(image: Image) -> tuple[Image, bool]:
    """A mask as L, and whether its one value beside black, in colour or grey, was made white."""
    colours = image.getcolors(2)  # None where there are more
    values = [] if colours is None else [colour for _, colour in colours]
    bright = [value for value in values if any(value if isinstance(value, tuple) else (value,))]
    if len(bright) != 1 or bright[0] in (255, (255, 255, 255)):
        return image.convert("L"), False
    channels = [channel.point(lambda value: 255 * (value > 0)) for channel in image.split()]
    white = channels[0]
    for channel in channels[1:]:
        white.paste(channel, mask=channel)
    return white, True


def whiten_tensor(mask: Tensor) -> tuple[Tensor, bool]:
    """(H, W) with NaN nowhere, as `whiten` has it."""
    mask = mask.detach().float().clamp(0, 1)
    brightest = mask.max()
    if brightest in (0, 1) or not ((mask == 0) | (mask == brightest)).all():
        return mask, False
    return (mask > 0).float(), True


def check_bright(path: Path | str, cover: Image, size: tuple[int, int]) -> list[str]:
    """What is odd about how bright a mask, L, is where a crop to the aspect of `size` (height, width) keeps it.

    Raises AdapterError for one that is black there, or nearly.
    """
    from PIL import Image as images
    from PIL import ImageOps

    scale = min(cover.width / size[1], cover.height / size[0])
    crop = max(1, round(size[1] * scale)), max(1, round(size[0] * scale))
    within = np.asarray(ImageOps.fit(cover, crop, method=images.Resampling.NEAREST))
    brightest = int(within.max())
    if not brightest:
        raise AdapterError(f"{path}: the mask is black all over, or where the crop keeps it; paint the concept white")
    if brightest < FAINTEST:
        raise AdapterError(
            f"{path}: the mask is nearly black all over, or where the crop keeps it: its brightest grey is "
            f"{brightest} of 255; paint the concept white"
        )
    return [DIM_MASK] if brightest < HALF else []
