"""What a training step measures, as pure functions: the noise that it draws and the mean that it takes.

Latents are (B, C, ...) of any number of dimensions.  `models/schedules.py` has what the base predicts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Float32


def draw_noise(shape: tuple[int, ...], generator: torch.Generator, offset: float = 0.0) -> Float32[Tensor, "b c ..."]:
    """Gaussian noise (B, C, ...) float32, on the CPU so that every device sees the same.

    offset: size of one more Gaussian, shared by all pixels of a channel.
    """
    noise = torch.randn(shape, generator=generator)
    if offset:
        noise = noise + offset * torch.randn(*shape[:2], *[1] * (len(shape) - 2), generator=generator)
    return noise


def masked_mean(
    error: Float[Tensor, "b c *rest"], mask: Float[Tensor, "b 1 *#rest"] | None = None
) -> Float[Tensor, " b"]:
    """Mean over the pixels that the mask keeps, sum(error * mask) / sum(mask): (B, C, ...) -> (B,).

    mask: (B, 1, ...) in 0..1; a sample with an empty mask counts 0.
    """
    if mask is None:
        return error.flatten(1).mean(dim=1)
    area = mask.expand_as(error).flatten(1).sum(dim=1)
    return (error * mask).flatten(1).sum(dim=1) / area.clamp(min=1e-8)
