"""What a person can choose about a merge beside the strengths, and what some methods must know beside adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..settings import merging as declared
from .moments import Moment


@dataclass(frozen=True)
class MergeOptions:
    """Each is declared in `settings/merging.py`.  Raises AdapterError for values that cannot work."""

    density: float = declared.DENSITY.default
    seed: int = declared.SEED.default
    rank: int = declared.RANK.default
    ridge: float = declared.RIDGE.default

    def __post_init__(self):
        for name, setting in declared.MERGING.items():
            setting.check(getattr(self, name))


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
