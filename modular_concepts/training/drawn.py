"""What a base draws by itself for a training, once: class pictures, and company."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ..data.latents import kept
from ..models.base import Base
from ..sampling import SampleSettings, sample

COMPANY_SEED = 100_000  # others than class pictures begin with, of which there are fewer


class Draw(Protocol):
    """`sampling.sample`, or what a host has in its place."""

    __name__: str

    def __call__(self, *args: Any, **options: Any) -> Tensor: ...


@dataclass(frozen=True)
class Prior:
    """Which pictures a base draws by itself: of which class, how many, from which seed on, how.

    draw: `sampling.sample`, or what a host has in its place.
    """

    class_word: str
    count: int
    seed: int = 0
    settings: SampleSettings = SampleSettings()
    draw: Draw = sample

    def size(self, base: Base) -> tuple[int, int]:
        """(height, width) that is drawn."""
        return self.settings.height or base.size[0], self.settings.width or base.size[1]


def how_drawn(base: Base, prior: Prior, prompts: Sequence[str]) -> str:
    """How pictures were made and not their bits, so that a training resumes where drawing is not exact to the bit."""
    return f"{base.hash} {prior.draw.__name__} {prompts} {prior.seed} {prior.settings}"


def fingerprint_of(made: str) -> str:
    return sha256(made.encode()).hexdigest()[:16]


def drawn_pictures(
    base: Base, prior: Prior, prompts: Sequence[str], callback: Callable[[int, int], None] | None = None
) -> Tensor:
    """(N, 3, H, W) in 0..1, one for each prompt."""
    seeds = range(prior.seed, prior.seed + len(prompts))
    return prior.draw(base, prompts, seeds, None, prior.settings, callback=callback)


def drawn_latents(
    base: Base,
    made: str,
    sizes: Sequence[tuple[int, int]],
    draw_anew: Callable[[], list[Tensor]],
    cache: Path | None = None,
) -> list[Tensor]:
    """What `draw_anew` gives, or what it gave before, from a file in `cache`; sizes: of each, (height, width)."""
    return draw_anew() if cache is None else kept(base, cache, made, draw_anew, sizes)
