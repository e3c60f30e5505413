"""A MODEL and its CLIP as nodes hand them on together, and what is asked of both again and again."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import comfy.model_patcher
import comfy.sd
from torch import Tensor, nn

from .families.family import HostFamily
from .families.lookup import host_family_of
from .layers import HostLayer, base_sample, host_places, known_hash, mark_of
from .text.layerwise import cross_attention_layers
from .text.words import word_rows


@dataclass(frozen=True, eq=False)
class HostModel:
    """Both stay as they are; whoever changes one makes clones, and a HostModel of those."""

    model: comfy.model_patcher.ModelPatcher
    clip: comfy.sd.CLIP

    @property
    def family(self) -> HostFamily:
        """Raises AdapterError, naming what the model is, for one that concepts cannot be made for."""
        return host_family_of(self.model)

    @property
    def architecture(self) -> str:
        """The family as concept files name it."""
        return self.family.family.name

    @property
    def network(self) -> nn.Module:
        """The denoiser."""
        return self.model.model.diffusion_model

    @cached_property
    def places(self) -> dict[str, HostLayer]:
        """Canonical name -> layer, or site of one, of both."""
        return host_places(self.model, self.clip)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of the weight there."""
        return {name: place.shape for name, place in self.places.items()}

    @property
    def latent_format(self) -> Any:
        return self.model.get_model_object("latent_format")

    @property
    def scale(self) -> int:
        """Pixels of the picture to one of the latent."""
        return self.latent_format.spacial_downscale_ratio

    @property
    def mark(self) -> str:
        """Tells this base from others, in whatever precision: `fingerprint.base_mark`."""
        return mark_of(self.model, self.clip)

    @property
    def known_hash(self) -> str:
        """The weights' hash where a training has asked for it before, else ""."""
        return known_hash(self.model, self.clip)

    @property
    def sample(self) -> str:
        """A few numbers of the loader's own weights: `fingerprint.weights_sample`."""
        return base_sample(self.model)

    @property
    def cross_attention_layers(self) -> int:
        return cross_attention_layers(self.model)

    def word_rows(self, words: str) -> Tensor:
        """(k, width) rows of the token tables for some words."""
        return word_rows(self.clip, words)
