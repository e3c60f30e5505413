"""What a person can choose about a merge beside the strengths, and what some families must know beside adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..choices import DENSITY, RANK, RIDGE, SEED
from ..errors import AdapterError
from .moments import Moment


@dataclass(frozen=True)
class MergeOptions:
    """density: share of weights that stay, for magnitude, dare and ties.  seed: for dare's draws.

    rank: the merged layers' largest rank, for svd.  ridge: damping of fusion, relative to the inputs' variance.
    Raises AdapterError for values that cannot work.
    """

    density: float = DENSITY
    seed: int = SEED
    rank: int = RANK
    ridge: float = RIDGE

    def __post_init__(self):
        if not 0 < self.density <= 1:
            raise AdapterError(f"density is {self.density}; it must be above 0 and at most 1")
        if self.rank < 1:
            raise AdapterError(f"rank is {self.rank}; it must be at least 1")
        if not 0 < self.ridge < math.inf:
            raise AdapterError(f"ridge is {self.ridge}; it must be a positive number, such as {RIDGE}")


@dataclass(frozen=True, eq=False)
class Evidence:
    """What concepts' layers read, one entry for each concept in order; see `merging/moments.py` and `customisation`.

    moments: layer -> second moments of its inputs, (n, n) or in few directions, for fusion.
    texts: (rows, width) text features of prompts with the concept, and usual: (width, width) second moments of
    ordinary captions', for custom_diffusion.
    """

    moments: Sequence[Mapping[str, Tensor | Moment]] = ()
    texts: Sequence[Tensor] = ()
    usual: Tensor | None = None
