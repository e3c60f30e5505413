"""Regions that nobody drew: where the words of concepts are heard in the first steps, made smooth and disjoint.

A word's cross-attention shows early where its subject will stand (FreeFuse and TARA build on it).  The maps of all
layers and of some steps are averaged; each position goes to the word that is heard there most, measured by the word's
own loudest place, and to none where all are faint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from .geometry import grid_of

if TYPE_CHECKING:
    from jaxtyping import Float

FAINT = 0.45  # of a word's loudest place
SOFT = 1 / 12  # of the picture's shorter side: how wide the maps are blurred, so that no speck is a region


@dataclass
class HeardWords:
    """Collects how much of each position's attention goes to each region's words, over layers and steps.

    positions: for each region, where its words stand in the text of `length` tokens.
    """

    positions: Sequence[Sequence[int]]
    length: int
    latent_size: tuple[int, int]
    _sums: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def hear(self, query: Float[Tensor, "b t d"], key: Float[Tensor, "b _ d"], heads: int) -> None:
        """query: (B, T, heads * d), key: (B, tokens, heads * d), tokens a multiple of the text's length."""
        query, key = (rearrange(one, "b t (h d) -> b h t d", h=heads).float() for one in (query, key))
        heard = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1).mean((0, 1))  # (T, tokens)
        heard = reduce(heard, "t (repeats tokens) -> t tokens", "sum", tokens=self.length)
        shares = torch.stack([heard[:, list(positions)].sum(-1) for positions in self.positions])
        grid = grid_of(shares.shape[1], *self.latent_size)
        shares = rearrange(shares, "r (h w) -> r h w", h=grid[0]).cpu()
        self._sums[grid] = self._sums.get(grid, 0) + shares

    def maps(self) -> Float[Tensor, "regions height width"]:
        """(R, height, width) of the latent; coarse and fine layers count alike, the finest of several not at all.

        The finest layers see texture where others see subjects.
        """
        sizes = sorted(self._sums, key=lambda grid: grid[0] * grid[1])
        chosen = sizes[:-1] if len(sizes) > 1 else sizes
        wide = [F.interpolate(self._sums[grid][None], size=self.latent_size, mode="bilinear")[0] for grid in chosen]
        return torch.stack([one / one.amax().clamp(min=1e-12) for one in wide]).mean(0)


def disjoint_masks(
    maps: Float[Tensor, "regions height width"], faint: float = FAINT, soft: float = SOFT
) -> Float[Tensor, "regions height width"]:
    """(R, height, width) maps of any scale -> masks of 0 and 1 of the same size, no position in two of them.

    Each is one piece, that with the region's loudest place; every region keeps at least that place.
    """
    reach = max(1, round(soft * min(maps.shape[1:])))
    maps = _blurred(maps.float(), reach)
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    loud = (maps - low) / (high - low).clamp(min=1e-12)
    owners = torch.cat([torch.full_like(loud[:1], faint), loud]).argmax(0)
    every = torch.stack([(owners == number).float() for number in range(len(maps) + 1)])
    owners = _blurred(every, reach).argmax(0)  # specks go to whom they lie among
    masks = torch.stack([(owners == number + 1).float() for number in range(len(maps))])
    for number, mask in enumerate(masks):
        inside = loud[number] if not mask.any() else loud[number] * mask
        place = inside.flatten().argmax()
        masks[:, place // mask.shape[1], place % mask.shape[1]] = 0.0
        mask[place // mask.shape[1], place % mask.shape[1]] = 1.0
        mask.copy_(_piece(mask, int(place)))
    return masks


def _piece(mask: Tensor, place: int) -> Tensor:
    """The part of a mask (height, width) that hangs together with one of its places."""
    piece = torch.zeros_like(mask)
    piece.view(-1)[place] = 1.0
    while True:
        wider = F.max_pool2d(piece[None], 3, 1, 1)[0] * mask
        if torch.equal(wider, piece):
            return piece
        piece = wider


def _blurred(maps: Tensor, reach: int) -> Tensor:
    """Mean over a square of 2 reach + 1 cells, twice, so that it falls off gently; the border repeats outside."""
    for _ in range(2):
        padded = F.pad(maps[None], (reach,) * 4, mode="replicate")[0]
        maps = F.avg_pool2d(padded[:, None], 2 * reach + 1, stride=1)[:, 0]
    return maps
