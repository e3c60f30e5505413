"""Regions in a diffusion transformer, whose one attention joins text and picture (Stable Diffusion 3).

Regions' texts ride behind the global one in the context, and a mask in the attention says who hears whom: a text its
own tokens and the whole picture, as it does when it is alone; a position the whole picture and, of the texts, the one
whose it is.  Where several share a position, the logarithm of their shares is added to what it hears of each, so that
equal texts in any regions are one text.  A text that no position hears is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...modular_concepts.errors import AdapterError
from ...modular_concepts.regions.moment import Moment
from ...modular_concepts.regions.shares import Division, Places
from .cross_attention import MOMENT
from .kinds import kinds_of

OVERRIDE = "optimized_attention_override"


def positions_of(network: Any, latent_size: tuple[int, int]) -> int:
    """How many tokens a network of patches makes of a latent (height, width); 0 for one that has no patches."""
    patch = getattr(network, "patch_size", None)
    return math.prod(math.ceil(side / patch) for side in latent_size) if isinstance(patch, int) else 0


class JointListening:
    """What one sampling's calls of the network get: longer contexts, and a mask in the attention.

    contexts, negatives: (1, T, D) for each region.
    """

    def __init__(self, places: Places, contexts: Sequence[Tensor], negatives: Sequence[Tensor]):
        self.places, self.texts = places, list(zip(contexts, negatives, strict=True))
        self._masks: dict[tuple, _Mask | None] = {}

    def prepared(self, network: Any, context: Tensor, options: dict) -> tuple[Tensor, dict, list[int]]:
        """(context, transformer_options, how many tokens each region's text has) for one call of the network."""
        moment: Moment = options[MOMENT]
        division = self.places.division(positions_of(network, moment.latent_size), moment, context)
        kinds = kinds_of(options)
        present = [part is not None for part in division.regions]
        lengths = [
            max(text.shape[1] for text in both) if there else 0 for there, both in zip(present, self.texts, strict=True)
        ]
        own_length = 0 if division.covered else context.shape[1]
        each = len(context) // len(kinds)
        longer = [context[:, :own_length]]
        for there, length, both in zip(present, lengths, self.texts, strict=True):
            if there:
                padded = [F.pad(both[kind], (0, 0, 0, length - both[kind].shape[1])) for kind in kinds]
                longer.append(torch.cat([text.expand(each, -1, -1) for text in padded]).to(context))
        mask = self._mask(division, [own_length, *lengths], kinds, each)
        if mask is not None:
            options = {**options, OVERRIDE: _Masked(mask, options.get(OVERRIDE))}
        return torch.cat(longer, dim=1), options, lengths

    def _mask(self, division: Division, lengths: Sequence[int], kinds: Sequence[int], each: int) -> _Mask | None:
        """(1 or B, 1, all tokens, all tokens) to add to the attention's logits; None where nothing is kept apart."""
        key = (division, *lengths, *kinds, each)
        if key not in self._masks:
            masks = [self._mask_of(division, lengths, kind) for kind in kinds]
            same = all(torch.equal(mask, masks[0]) for mask in masks)
            whole = masks[0][None] if same else torch.stack(masks).repeat_interleave(each, dim=0)
            positions = division.texts.shape[1]
            self._masks[key] = _Mask(whole[:, None], positions) if bool(whole.any()) else None
        return self._masks[key]

    def _mask_of(self, division: Division, lengths: Sequence[int], kind: int) -> Tensor:
        """(all tokens, all tokens) for rows of one kind of prompt."""
        apart = torch.block_diag(*(torch.ones(length, length) for length in lengths if length))
        texts, positions = len(apart), division.texts.shape[1]
        mask = torch.zeros(texts + positions, texts + positions)
        mask[:texts, :texts] = apart.log()
        shares = [share[:, None].expand(-1, length) for share, length in zip(division.texts, lengths, strict=True)]
        mask[texts:, :texts] = torch.cat(shares, dim=1).log()
        start = lengths[0]
        for length, both in zip(lengths[1:], self.texts, strict=True):
            if length:
                mask[:, start + both[kind].shape[1] : start + length] = -torch.inf  # padding
            start += length
        return mask


class _Mask:
    """A mask where it is needed: a context may lie on another device, in another precision, than the attention."""

    def __init__(self, values: Tensor, positions: int):
        """values: (1 or B, 1, T, T) for texts and then the picture's positions."""
        self._values: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self.whole, self.tokens, self.positions = values, values.shape[-1], positions

    def like(self, query: Tensor) -> Tensor:
        """On the device and in the dtype of a query, which kernels ask for; moved once."""
        key = (query.device, query.dtype)
        if key not in self._values:
            self._values[key] = self.whole.to(query.device, query.dtype)
        return self._values[key]


class _Masked:
    """The host's attention with a mask, where text and picture are joined."""

    def __init__(self, mask: _Mask, before):
        self.mask, self.before = mask, before

    def __call__(self, attention, query: Tensor, key: Tensor, value: Tensor, *args, **more):
        # (B, heads, T, D) where the host need not split heads any more, else (B, T, heads * D).
        tokens = query.shape[2 if more.get("skip_reshape") else 1]
        if tokens == self.mask.tokens:
            more = {**more, "mask": self.mask.like(query)}
        elif tokens != self.mask.positions:  # the picture to itself, which some blocks have besides
            raise AdapterError(
                f"an attention of the model joins {tokens} tokens, where texts and picture have {self.mask.tokens}; "
                "regions cannot be kept apart in it, so draw this picture without regions"
            )
        if self.before is not None:
            return self.before(attention, query, key, value, *args, **more)
        return attention(query, key, value, *args, **more)
