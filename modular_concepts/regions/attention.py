"""Regionally controllable sampling: each region's own prompt in every cross-attention layer.

Mix-of-Show (Gu et al. 2023, section 3.3): the global prompt is attended everywhere; inside regions the result
is replaced by that of the regions' prompts, averaged where they overlap.  Soft masks blend instead of
replacing.  A region's text is attended to by the positions of the region alone, so that regions cost little.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..families.unet import CROSS_ATTENTION
from ..models.library import LibraryNetwork
from ..text.layerwise import cross_attention_transformers
from .moment import Clock
from .shares import Division, Places

if TYPE_CHECKING:
    from jaxtyping import Float

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend_by_region(
    attend: Attend,
    query: Float[Tensor, "b t d"],
    texts: Sequence[tuple[Float[Tensor, "b _ d"], Float[Tensor, "b _ d"]]],
    division: Division,
) -> Float[Tensor, "b t d"]:
    """rest * attend(q, global text) + sum of share_r * attend(q, text of region r).

    query: (B, T, D); texts: (key, value), each (B, length, D), the global one first; attend: query, key, value to
    (B, T, D).  Outside of all regions the first comes back bit for bit; under one full region, its own does.
    """
    (key, value), *regional = texts
    return with_regions(attend, query, attend(query, key, value), regional, division)


def with_regions(
    attend: Attend,
    query: Float[Tensor, "b t d"],
    everywhere: Float[Tensor, "b t d"],
    texts: Sequence[tuple[Float[Tensor, "b _ d"], Float[Tensor, "b _ d"]]],
    division: Division,
) -> Float[Tensor, "b t d"]:
    """`attend_by_region` where the global text was attended to already, as `everywhere` (B, T, D)."""
    blended = everywhere.clone() if division.replaced else everywhere * division.rest[:, None]
    for (key, value), part in zip(texts, division.regions, strict=True):
        if part is None:
            continue
        inside = attend(query if part.index is None else query[:, part.index], key, value)
        if part.everything:
            return inside
        if part.share is not None:
            inside = inside * part.share
        if part.index is None:
            blended += inside
        elif division.replaced:
            blended.index_copy_(1, part.index, inside)
        else:
            blended.index_add_(1, part.index, inside)
    return blended


@contextmanager
def regional_attention(
    unet: LibraryNetwork,
    places: Places,
    contexts: Tensor | None,
    clock: Clock,
) -> Generator[None]:
    """Within the block every cross-attention of a diffusers U-Net listens to the regions.

    contexts: (R, B, T, D), each region's text for each row of the batch (its negative for unconditional rows), or
    (R, B, L, T, D) with one for each of the U-Net's transformers.
    clock: asked in every layer where the sampling is, and told whose keys and values come next.
    The U-Net's own processors come back on leaving.
    """
    if not places.regions or contexts is None:
        yield
        return
    before = dict(unet.attn_processors)
    transformers = list(cross_attention_transformers(unet))
    regional = {}
    for name in before:
        if CROSS_ATTENTION in name.split("."):
            index = transformers.index(name.split(".transformer_blocks.")[0])
            heard = contexts[:, :, index] if contexts.dim() == 5 else contexts
            regional[name] = _RegionalProcessor(places, heard, clock)
    unet.set_attn_processor(before | regional)
    try:
        yield
    finally:
        unet.set_attn_processor(before)


class _RegionalProcessor:
    """A diffusers attention processor for one sampling run."""

    def __init__(self, places: Places, contexts: Tensor, clock: Clock):
        self.places, self.contexts, self.clock = places, contexts, clock

    def __call__(
        self, attention: LibraryNetwork, hidden_states: Tensor, encoder_hidden_states: Tensor, *args, **kwargs
    ):
        query = attention.to_q(hidden_states)
        texts = []
        for number, text in enumerate((encoder_hidden_states, *self.contexts)):
            self.clock.read(number)
            texts.append((attention.to_k(text), attention.to_v(text)))
        self.clock.read(0)
        division = self.places.division(query.shape[1], self.clock(), query)
        blended = attend_by_region(_attend_in(attention.heads), query, texts, division)
        return attention.to_out[1](attention.to_out[0](blended))


def _attend_in(heads: int) -> Attend:
    def attend(*features: Tensor) -> Tensor:
        query, key, value = (rearrange(one, "b t (h d) -> b h t d", h=heads) for one in features)
        return rearrange(F.scaled_dot_product_attention(query, key, value), "b h t d -> b t (h d)")

    return attend
