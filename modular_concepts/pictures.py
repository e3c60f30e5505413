"""Pictures between tensors and Pillow: (C, H, W) in 0..1 <-> eight bits a channel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


def to_pixels(picture: Tensor) -> np.ndarray:
    """(3, H, W) in 0..1 -> (H, W, 3) uint8; (H, W) of a mask stays so.  What is beyond 0..1 is cut."""
    values = (picture.detach().cpu().float().clamp(0, 1) * 255).round().byte()
    return (values if values.dim() == 2 else rearrange(values, "c h w -> h w c")).numpy()


def to_image(picture: Tensor) -> Image:
    """(3, H, W) or (H, W) in 0..1 -> a Pillow image."""
    from PIL import Image

    return Image.fromarray(to_pixels(picture))


def from_image(image: Image) -> Tensor:
    """A Pillow image -> (3, H, W) float32 in 0..1, (1, H, W) of one channel."""
    pixels = torch.from_numpy(np.array(image))
    return rearrange(pixels if pixels.dim() == 3 else pixels[:, :, None], "h w c -> c h w").float() / 255


def as_batch(image: Image) -> Tensor:
    """A Pillow image -> (1, H, W, 3) float32 in 0..1, as hosts pass pictures on."""
    return rearrange(from_image(image), "c h w -> 1 h w c")
