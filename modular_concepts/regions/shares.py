"""Whose each position of a layer is: from regions to the shares of texts and concepts, at any size and moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .geometry import Region, grid_of, refuse_unplaced, region_weights
from .moment import Moment

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True, eq=False)
class Part:
    """The positions of a layer that one text or concept holds.

    index: (n,) int64, or None for all of them.  share: (n, 1) in 0..1, or None where it has them wholly.
    """

    index: Tensor | None
    share: Tensor | None

    @classmethod
    def of(cls, weights: Float[Tensor, " positions"], like: Tensor) -> Part | None:
        """weights: (T,) in 0..1; like: of the layer's device and dtype.  None for a part of nothing."""
        index = weights.nonzero()[:, 0]
        if not len(index):
            return None
        share = None if bool((weights[index] == 1).all()) else weights[index, None].to(like)
        return cls(None if len(index) == len(weights) else index.to(like.device), share)

    @property
    def everything(self) -> bool:
        return self.index is None and self.share is None


class Division:
    """How the positions of one layer are divided between the global text and the regions' at one moment.

    shares: (R, T) float32, each region's; their sum is at most 1, and the rest is the global text's.
    like: a tensor of the layer's device and dtype.
    """

    def __init__(self, shares: Float[Tensor, "regions positions"], like: Tensor | None = None):
        like = shares if like is None else like
        rest = (1 - shares.sum(0)).clamp(min=0)
        rest = torch.where(rest < 1e-6, 0.0, rest)
        self.texts = torch.cat([rest[None], shares])  # (1 + R, T) float32: how much of each position is each text's
        self.rest = rest.to(like)
        self.covered = not bool(rest.any())  # nothing is left to the global text
        self.regions = tuple(Part.of(share, like) for share in shares)
        # Each position belongs wholly to one text, so that nothing need be weighed.
        self.replaced = all(part is None or part.share is None for part in self.regions)


class Places:
    """All divisions of one sampling, each worked out once.

    overlap: as `region_weights`.  scale: pixels of the picture to one of the latent, for regions in pixels.
    """

    def __init__(self, regions: Sequence[Region], overlap: str = "average", scale: int = 1):
        self.regions, self.overlap, self.scale = tuple(regions), overlap, scale
        refuse_unplaced(self.regions)
        region_weights(self.regions[:0], 1, 1, overlap)  # refuses an overlap that is none
        self._known: dict[tuple, Division] = {}
        self._fixed: tuple[int, int] | None = None
        self._run: object = None

    def fix(self, latent_size: tuple[int, int], run: object = None, fresh: bool = False) -> None:
        """Regions in pixels count those of a picture of this size, (height, width) in the latent, from now on.

        Only the first call counts, unless it is for a `fresh` picture of another run.  Never called, regions in pixels
        count those of whatever is drawn.
        """
        if self._fixed is None or (fresh and run != self._run):
            self._fixed, self._run = latent_size, run
            self._known.clear()

    def division(self, tokens: int, moment: Moment, like: Tensor) -> Division:
        """For a layer of `tokens` positions, at a moment of the sampling."""
        size, holding = moment.latent_size, tuple(region.holds(moment.progress) for region in self.regions)
        key = (tokens, size, holding, like.device, like.dtype)
        if key not in self._known:
            self._known[key] = Division(self._shares(grid_of(tokens, *size), size, holding), like)
        return self._known[key]

    def _shares(self, grid: tuple[int, int], latent_size: Sequence[int], holding: Sequence[bool]) -> Tensor:
        height, width = (side * self.scale for side in self._fixed or latent_size)
        placed = [region.placed(width, height) for region in self.regions]
        shares = torch.zeros(len(placed), grid[0] * grid[1])
        now = [number for number, holds in enumerate(holding) if holds]
        weights = region_weights([placed[number] for number in now], *grid, self.overlap).flatten(1)
        shares[now] = weights / weights.sum(0).clamp(min=1)
        return shares
