"""Regionally controllable sampling: each region's own prompt in every cross-attention layer.

Mix-of-Show (Gu et al. 2023, section 3.3): the global prompt is attended everywhere; inside regions the result
is replaced by that of the regions' prompts, averaged where they overlap.  Soft masks blend instead of
replacing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..layerwise import cross_attention_transformers
from .geometry import Region, grid_of, region_weights


def blend_regions(outside: Tensor, inside: Tensor, weights: Tensor) -> Tensor:
    """outside * (1 - cover) + mean of inside * cover, with cover = min(1, sum of weights).

    outside: (B, T, D); inside: (R, B, T, D); weights: (R, T) in 0..1.  Returns (B, T, D).
    Where no region is, `outside` comes back bit for bit; under one full region, its `inside` does.
    """
    total = weights.sum(0)
    shares = weights / total.clamp(min=1e-6)
    cover = total.clamp(max=1.0)[:, None].to(outside)
    mean = torch.einsum("rbtd,rt->btd", inside, shares.to(outside))
    return torch.where(cover == 1, mean, outside + cover * (mean - outside))


@contextmanager
def regional_attention(
    unet: nn.Module, regions: Sequence[Region], contexts: Tensor, latent_size: tuple[int, int]
) -> Iterator[None]:
    """Within the block every cross-attention of a diffusers U-Net listens to the regions.

    contexts: (R, B, T, D), each region's text for each row of the batch (its negative for unconditional rows), or
    (R, B, L, T, D) with one for each of the U-Net's transformers.
    latent_size: (height, width) of the latents.  The U-Net's own processors come back on leaving.
    """
    if not regions:
        yield
        return
    before = dict(unet.attn_processors)
    if contexts.dim() == 5:
        transformers = cross_attention_transformers(unet)
        own = {
            path: _RegionalProcessor(regions, contexts[:, :, index], latent_size)
            for index, path in enumerate(transformers)
        }
        regional = {name: own[name.split(".transformer_blocks.")[0]] for name in before if ".attn2." in name}
    else:
        regional = dict.fromkeys(
            (name for name in before if ".attn2." in name), _RegionalProcessor(regions, contexts, latent_size)
        )
    unet.set_attn_processor(before | regional)
    try:
        yield
    finally:
        unet.set_attn_processor(before)


class _RegionalProcessor:
    """A diffusers attention processor for one sampling run."""

    def __init__(self, regions: Sequence[Region], contexts: Tensor, latent_size: tuple[int, int]):
        self.regions, self.contexts, self.latent_size = regions, contexts, latent_size
        self.weights: dict[int, Tensor] = {}

    def __call__(self, attention: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, *args, **kwargs):
        query = _heads(attention.to_q(hidden_states), attention.heads)
        everywhere = self._attend(attention, query, encoder_hidden_states)
        inside = torch.stack([self._attend(attention, query, context) for context in self.contexts])
        blended = blend_regions(everywhere, inside, self._weights_for(hidden_states.shape[1]).to(everywhere))
        return attention.to_out[1](attention.to_out[0](blended))

    def _attend(self, attention: nn.Module, query: Tensor, context: Tensor) -> Tensor:
        key, value = (_heads(project(context), attention.heads) for project in (attention.to_k, attention.to_v))
        return rearrange(F.scaled_dot_product_attention(query, key, value), "b h t d -> b t (h d)")

    def _weights_for(self, tokens: int) -> Tensor:
        if tokens not in self.weights:
            grid = grid_of(tokens, *self.latent_size)
            self.weights[tokens] = region_weights(self.regions, *grid).flatten(1)
        return self.weights[tokens]


def _heads(features: Tensor, heads: int) -> Tensor:
    return rearrange(features, "b t (h d) -> b h t d", h=heads)
