"""Keep what a learned word attends to inside the masks.

Each vector's cross-attention map, mean over heads and over the layers of one resolution, divided by its maximum,
costs its mean outside the mask; the costs of all vectors and resolutions add up.
Source: Mix-of-Show (Gu et al. 2023), its code's attention regularisation without `reg_full_identity`; the
maximum here is of each picture's own map, so that a picture's cost does not depend on the others in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
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
    found = ids[:, None, :] == torch.tensor(list(wanted), device=ids.device)[:, None]
    return torch.where(found.any(dim=2), found.int().argmax(dim=2), -1)


class Watch:
    """Queries and keys of the last prediction, in the order of the attentions."""

    def __init__(self, attentions: Sequence[CrossAttention]):
        self.attentions = attentions
        self.seen: list[dict[str, Tensor]] = []
        self.open = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block a prediction is seen; what backward computes again, outside of it, is not."""
        self.seen, self.open = [{} for _ in self.attentions], True
        try:
            yield
        finally:
            self.open = False

    def take_maps(self, positions: Tensor) -> dict[int, Tensor]:
        """Number of places -> (B, vectors, places): attention that the tokens at `positions` get; then forgotten."""
        seen, self.seen = self.seen, []
        found: dict[int, list[Tensor]] = {}
        for attention, own in zip(self.attentions, seen, strict=True):
            if len(own) == 2:
                map = attention_map(own["q"], own["k"], attention.heads, positions)
                found.setdefault(map.shape[-1], []).append(map)
        return {places: torch.stack(maps).mean(dim=0) for places, maps in found.items()}


@contextmanager
def watched(attentions: Sequence[CrossAttention]) -> Iterator[Watch]:
    """Within the block the outputs of all to_q and to_k can be seen, with what adapters add to them."""
    watch = Watch(attentions)

    def hook(number: int, part: str):
        def see(_module: nn.Module, _args: tuple, output: Tensor) -> None:
            if watch.open:
                watch.seen[number][part] = output

        return see

    handles = []
    try:
        for number, attention in enumerate(attentions):
            handles.append(attention.to_q.register_forward_hook(hook(number, "q")))
            handles.append(attention.to_k.register_forward_hook(hook(number, "k")))
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def attention_map(queries: Tensor, keys: Tensor, heads: int, positions: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) at some text tokens, mean over heads: (B, vectors, places), at least float32.

    positions: (B, vectors) int64; what is below 0 reads token 0 and has to be left out afterwards.
    """
    at_least = torch.promote_types(queries.dtype, torch.float32)
    q, k = (value.to(at_least).unflatten(-1, (heads, -1)).transpose(1, 2) for value in (queries, keys))
    attention = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1).mean(dim=1)
    wanted = positions.clamp(min=0)[:, None].expand(-1, attention.shape[1], -1)
    return attention.gather(2, wanted.to(attention.device)).mT


def attention_outside(maps: dict[int, Tensor], positions: Tensor, masks: Tensor) -> Tensor:
    """Mean over the pictures whose caption has the word: sum over vectors and resolutions of the attention outside.

    maps: of `Watch.take_maps`.  positions: (B, vectors), below 0 where the caption lacks the vector.
    masks: (B, 1, H, W) in 0..1, in the latents' size; a full mask costs nothing.
    """
    there = (positions >= 0).to(masks)
    total = masks.new_zeros(())
    for places, map in maps.items():
        shrink = round(math.sqrt(masks[0, 0].numel() / places))
        size = (-(-masks.shape[2] // shrink), -(-masks.shape[3] // shrink))
        outside = 1 - F.interpolate(masks, size=size, mode="area").flatten(2)
        relative = map / map.amax(dim=-1, keepdim=True).clamp(min=1e-12)
        cost = (relative * outside).sum(dim=-1) / outside.sum(dim=-1).clamp(min=1e-12)
        total = total + (cost.to(masks) * there).sum()
    return total / there.any(dim=1).sum().clamp(min=1)
