"""Where a sampling is just now: the one thing that tells it to the attention, to the gate and to ControlNets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Moment:
    """One call of the network.

    latent_size: (height, width) of the latent.  progress: how far the sampling is, 0..1.
    lengths: how many tokens each region's text has behind the global one's, where a context holds them all.
    text: where it does not, whose keys and values are asked for: 0 for the global text, then the regions'.
    positions: how many tokens the picture has where a layer reads it in one row with the texts.
    """

    latent_size: tuple[int, int]
    progress: float = 0.0
    lengths: tuple[int, ...] | None = None
    text: int = 0
    positions: int = 0


Now = Callable[[], Moment]


class Clock:
    """The moment of a sampling that goes on: whoever draws sets it, whatever acts by region asks."""

    def __init__(self, moment: Moment):
        self._moment = moment

    def __call__(self) -> Moment:
        return self._moment

    def at(self, progress: float) -> None:
        self._moment = replace(self._moment, progress=progress)

    def read(self, text: int) -> None:
        """Keys and values that come next are this text's."""
        self._moment = replace(self._moment, text=text)
