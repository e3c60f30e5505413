"""Cross-attention, where a base has it: its projections, its maps, and where words stand in the text that it reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from ..families.unet import CROSS_ATTENTION


class CrossAttention(NamedTuple):
    """The projections whose outputs make the attention map, (B, places, heads * d) and (B, tokens, heads * d)."""

    to_q: nn.Module
    to_k: nn.Module
    heads: int


def cross_attentions_of(network: nn.Module) -> list[CrossAttention]:
    """Those of a U-Net, as diffusers and hosts name them; empty for networks that attend in another way."""
    return [
        CrossAttention(module.to_q, module.to_k, module.heads)
        for name, module in network.named_modules()
        if name.split(".")[-1] == CROSS_ATTENTION and all(hasattr(module, part) for part in ("to_q", "to_k", "heads"))
    ]


def first_positions(ids: Tensor, wanted: Sequence[int]) -> Tensor:
    """(B, T) token ids -> (B, len(wanted)) int64: where each wanted id stands first, -1 for nowhere."""
    matches = ids[:, None, :] == torch.tensor(list(wanted), device=ids.device)[:, None]
    return torch.where(matches.any(dim=2), matches.int().argmax(dim=2), -1)


def word_places(ids: Sequence[int], extra: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Trigger word -> where its ids stand among a prompt's, for those that are there at all."""
    words = {number: word for word, numbers in extra.items() for number in numbers}
    places: dict[str, list[int]] = {}
    for place, number in enumerate(ids):
        if number in words:
            places.setdefault(words[number], []).append(place)
    return places


def attention_map(queries: Tensor, keys: Tensor, heads: int, positions: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) at some text tokens, mean over heads: (B, vectors, places), at least float32.

    positions: (B, vectors) int64; what is below 0 reads token 0 and has to be left out afterwards.
    """
    at_least = torch.promote_types(queries.dtype, torch.float32)
    q, k = (rearrange(one.to(at_least), "b t (h d) -> b h t d", h=heads) for one in (queries, keys))
    attention = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1).mean(dim=1)
    wanted = positions.clamp(min=0)[:, None].expand(-1, attention.shape[1], -1)
    return attention.gather(2, wanted.to(attention.device)).mT
