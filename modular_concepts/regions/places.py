"""Whose each position of a layer is: from regions to the shares of texts and concepts, at any size and moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .geometry import Region, grid_of, region_weights


@dataclass(frozen=True, eq=False)
class Part:
    """The positions of a layer that one text or concept holds.

    index: (n,) int64, or None for all of them.  share: (n, 1) in 0..1, or None where it has them wholly.
    """

    index: Tensor | None
    share: Tensor | None

    @classmethod
    def of(cls, weights: Tensor) -> Part | None:
        """weights: (T,) in 0..1.  None for a part of nothing."""
        index = weights.nonzero()[:, 0]
        if not len(index):
            return None
        own = weights[index]
        whole = bool((own == 1).all())
        return cls(None if len(index) == len(weights) else index, None if whole else own[:, None])

    @property
    def everything(self) -> bool:
        return self.index is None and self.share is None

    def to(self, like: Tensor) -> Part:
        return Part(
            None if self.index is None else self.index.to(like.device),
            None if self.share is None else self.share.to(like),
        )


@dataclass(frozen=True, eq=False)
class Division:
    """How the positions of one layer are divided between the global text and the regions' at one moment.

    shares: (R, T) float32, each region's; their sum is at most 1, and the rest is the global text's.
    """

    shares: Tensor

    @cached_property
    def rest(self) -> Tensor:
        """(T,): what is left of each position for the global text; exactly 1 outside of all regions."""
        rest = (1 - self.shares.sum(0)).clamp(min=0)
        return torch.where(rest < 1e-6, 0.0, rest)

    @cached_property
    def regions(self) -> tuple[Part | None, ...]:
        return tuple(Part.of(own) for own in self.shares)

    @cached_property
    def replaced(self) -> bool:
        """Whether each position belongs wholly to one text, so that nothing need be weighed."""
        return all(part is None or part.share is None for part in self.regions)

    def to(self, like: Tensor) -> Division:
        """The same with everything that is worked out from it, for a layer of this device and dtype."""
        moved = Division(self.shares)
        own = {"rest": self.rest.to(like), "replaced": self.replaced}
        own["regions"] = tuple(part and part.to(like) for part in self.regions)
        moved.__dict__.update(own)
        return moved


class Places:
    """All divisions of one sampling, each worked out once.

    overlap: as `region_weights`.  scale: pixels of the picture to one of the latent, for regions in pixels.
    """

    def __init__(self, regions: Sequence[Region], overlap: str = "average", scale: int = 1):
        self.regions, self.overlap, self.scale = tuple(regions), overlap, scale
        region_weights(self.regions[:0], 1, 1, overlap)  # refuses an overlap that is none
        self._known: dict[tuple, Division] = {}

    def division(self, tokens: int, latent_size: Sequence[int], progress: float, like: Tensor) -> Division:
        """For a layer of `tokens` positions on a latent of (height, width), at `progress` 0..1 of the sampling."""
        holding = tuple(region.holds(progress) for region in self.regions)
        key = (tokens, *latent_size, holding, like.device, like.dtype)
        if key not in self._known:
            self._known[key] = Division(self._shares(grid_of(tokens, *latent_size), latent_size, holding)).to(like)
        return self._known[key]

    def _shares(self, grid: tuple[int, int], latent_size: Sequence[int], holding: Sequence[bool]) -> Tensor:
        height, width = (side * self.scale for side in latent_size)
        placed = [region.placed(width, height) for region in self.regions]
        shares = torch.zeros(len(placed), grid[0] * grid[1])
        now = [number for number, holds in enumerate(holding) if holds]
        weights = region_weights([placed[number] for number in now], *grid, self.overlap).flatten(1)
        shares[now] = weights / weights.sum(0).clamp(min=1)
        return shares
