"""What is drawn by region in the host, and with which sampler."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...modular_concepts.concept import Concept
from ...modular_concepts.errors import AdapterError
from ...modular_concepts.regions.geometry import Region
from ...modular_concepts.settings.drawing import MODE
from ...modular_concepts.settings.merging import ACT_ON
from ...modular_concepts.stack import Stack


@dataclass(frozen=True)
class Scene:
    """Concepts, regions and texts of one picture.  prompts: the global one and the negative one.

    mode: "merged" has all concepts in the weights, everywhere; concepts that are in the model already are not merged
    again.  "gated" leaves the weights alone and lets each concept act where its regions are, or, if no region has it,
    outside of all of them if the global prompt calls it.  overlap: as `region_weights`.  act_on: as `own_words.split`;
    in gated mode layers that read text act by word, all others by place.
    Raises AdapterError for a mode that is none.
    """

    pairs: Sequence[tuple[Concept, float]]
    regions: Sequence[Region]
    prompts: tuple[str, str]
    mode: str = "merged"
    overlap: str = "average"
    act_on: str = ACT_ON.default

    def __post_init__(self):
        MODE.check(self.mode)
        ACT_ON.check(self.act_on)

    @property
    def stack(self) -> Stack:
        return Stack.of(self.pairs)

    @property
    def texts(self) -> list[str]:
        """All that is said anywhere."""
        return [*self.prompts, *(region.prompt for region in self.regions)]

    @property
    def spoken(self) -> list[tuple[str, str]]:
        """What is said and what is not wanted: of the whole picture, and then of each region."""
        negative = self.prompts[1]
        regional = ((r.prompt, negative if r.negative is None else r.negative) for r in self.regions)
        return [self.prompts, *regional]


@dataclass(frozen=True)
class Sampling:
    """The host's KSampler settings.  Raises AdapterError for numbers that are none."""

    sampler: str
    scheduler: str
    steps: int
    cfg: float
    seed: int
    denoise: float = 1.0

    def __post_init__(self):
        for name in ("cfg", "denoise"):
            if not math.isfinite(getattr(self, name)):
                raise AdapterError(f"{name} is {getattr(self, name)}; it must be a finite number")
