"""Which of a base's layers get adapters."""

from __future__ import annotations

from dataclasses import dataclass

from ..adapters.sites import Layer
from .base import Base


@dataclass(frozen=True)
class Targets:
    """Which layers get adapters: see `layers.chosen_layers`.  text_encoder None leaves the text encoder out."""

    unet: tuple[str, ...] = ("attention", "feed_forward")
    text_encoder: tuple[str, ...] | None = None


DEFAULT_TARGETS = Targets()
EVERYTHING = Targets(("all_linear",), ("all_linear",))


def concept_layers(base: Base, targets: Targets = DEFAULT_TARGETS) -> dict[str, Layer]:
    """Canonical layer name -> module."""
    return base.layers(targets.unet, targets.text_encoder)
