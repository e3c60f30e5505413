"""The host's half of a model family: how its models are told, named, spoken to and kept apart by region."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import comfy.model_patcher
import comfy.sd
from torch import Tensor

from ...modular_concepts.families.family import Family

DENOISER = "diffusion_model."  # before the denoiser's weights in a MODEL
Said = Sequence[Mapping[str, list]]
Read = dict[tuple[int, ...], Tensor]


def only_text(_clip: comfy.sd.CLIP, hidden: Mapping[str, Tensor], _pooled: object, _said: Said, _read: Read) -> tuple:
    """Of one text encoder: what it made of the texts, and nothing pooled."""
    return next(iter(hidden.values())), None


@dataclass(frozen=True, eq=False)
class HostFamily:
    """One family in the host.

    matches(MODEL): whether it is of the family.
    weight_names(MODEL): the denoiser's parameter names as canonical names have them -> the patcher's.
    cells(unet_config): of how many of the latent's cells a picture's sides must be multiples.
    clip_model: class of the CLIP's model that holds its text encoders; None where any with one will do.
    put_together(CLIP, hidden, pooled, said, read): (text, pooled or None) that the denoiser is told, of what the text
    encoders that learn words have made of each text; said: the texts as the host's tokenizers read them; read: what
    others made of token ids before, to which more is added.
    """

    family: Family
    matches: Callable[[comfy.model_patcher.ModelPatcher], bool]
    weight_names: Callable[[comfy.model_patcher.ModelPatcher], dict[str, str]]
    cells: Callable[[Mapping], int]
    clip_model: type | None = None
    put_together: Callable[..., tuple[Tensor, Tensor | None]] = only_text
