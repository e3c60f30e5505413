"""Keep what a learned word attends to inside the masks.

Each vector's cross-attention map, mean over heads and over the layers of one resolution, divided by its maximum,
costs its mean outside the mask; the costs of all vectors and resolutions add up.
Source: Mix-of-Show (Gu et al. 2023), its code's attention regularisation without `reg_full_identity`; the
maximum here is of each picture's own map, so that a picture's cost does not depend on the others in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.cross_attention import CrossAttention, attention_map


class Watch:
    """Queries and keys of the last prediction, in the order of the attentions."""

    def __init__(self, attentions: Sequence[CrossAttention]):
        self.attentions = attentions
        self.seen: list[dict[str, Tensor]] = []
        self.open = False

    @contextmanager
    def listening(self) -> Generator[None]:
        """Within the block a prediction is seen; what backward computes again, outside of it, is not."""
        self.seen, self.open = [{} for _ in self.attentions], True
        try:
            yield
        finally:
            self.open = False

    def take_maps(self, positions: Tensor) -> dict[int, Tensor]:
        """Number of places -> (B, vectors, places): attention that the tokens at `positions` get; then forgotten."""
        seen, self.seen = self.seen, []
        by_places: dict[int, list[Tensor]] = {}
        for attention, parts in zip(self.attentions, seen, strict=True):
            if len(parts) == 2:
                map = attention_map(parts["q"], parts["k"], attention.heads, positions)
                by_places.setdefault(map.shape[-1], []).append(map)
        return {places: torch.stack(maps).mean(dim=0) for places, maps in by_places.items()}


@contextmanager
def watched(attentions: Sequence[CrossAttention]) -> Generator[Watch]:
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
