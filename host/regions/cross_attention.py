"""Cross-attention of the host's U-Nets that listens to each region's own text.

Regions' texts ride behind the global one as further tokens of the context, so that keys and values of all come
from one product; a replacement of the attention takes them apart again, attends to each, and blends before the
output projection, just as the headless sampler does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import comfy.ldm.modules.attention as host_attention
import comfy.model_patcher
import torch
from torch import Tensor, nn

from ...modular_concepts.errors import AdapterError
from ...modular_concepts.regions.attention import attend_by_region, with_regions
from ...modular_concepts.regions.shares import Places
from ..families.cross_attention import blocks_of, patch_texts, replace_attention, replacements_in, text_patches_in
from ..merging.by_word import NO_WORDS, Behind
from ..text.layerwise import PickLayer, choose, joined
from ..text.word_places import Wording
from .kinds import POSITIVE, kinds_of

DISPLACED = (
    "a node behind Regional Concepts (an IP adapter, attention couple or other regions) has taken over the model's "
    "cross-attention, which regions cannot share; leave one of the two out"
)
MOMENT = "modular_concepts_moment"  # in transformer_options: the `Moment` of this call of the network


class Listening:
    """The patches of one sampling; what they compute depends on nothing but the call and the regions.

    contexts, negatives: (1, T, D) for each region, (1, L, T, D) where it is layer-wise.
    apart: whether rows of the negative prompt must ask the regions too; else one negative holds everywhere.
    says: what each of the regions' texts and negatives says; nothing where it is left out.
    """

    def __init__(
        self,
        places: Places,
        contexts: Sequence[Tensor],
        negatives: Sequence[Tensor],
        apart: bool,
        says: Sequence[tuple[Wording, Wording]] = (),
    ):
        self.places, self.apart = places, apart
        self._says = [*says, *[(NO_WORDS, NO_WORDS)] * (len(contexts) - len(says))]
        pairs = [_same_length(c, n) for c, n in zip(contexts, negatives, strict=True)]
        self.lengths = [positive.shape[-2] for positive, _ in pairs]
        self.texts = [joined(texts) for texts in zip(*pairs, strict=True)]

    def patch(self, model: comfy.model_patcher.ModelPatcher) -> None:
        """Let a clone's cross-attention listen."""
        patch_texts(model, self.append_texts)
        replace_cross_attention(model, self.attend)
        self.blocks = set(blocks_of(model.model.diffusion_model))

    def prepared(self, _network: nn.Module, context: Tensor, options: dict) -> tuple[Tensor, dict, list]:
        """(context, transformer_options, how many tokens each region's text has) for one call of the network.

        Raises AdapterError where another node has put itself in the place of what `patch` did.
        """
        refuse_displaced(self, options)
        return context, options, self.lengths

    @property
    def every_wording(self) -> list[Wording]:
        return [wording for both in self._says for wording in both]

    def wordings(self, options: dict) -> list[list[Behind]]:
        """For each prompt of a batch the regions' texts, as `append_texts` puts them behind it."""
        return [
            [Behind(length, both[kind]) for length, both in zip(self.lengths, self._says, strict=True)]
            for kind in kinds_of(options)
        ]

    def append_texts(self, hidden: Tensor, context: Tensor, value: Tensor, options: dict) -> tuple:
        """Put all regions' texts behind the global one: (rows, T, D) -> (rows, T + all of theirs, D)."""
        kinds = kinds_of(options)
        texts = [choose(self.texts[kind], options).to(context) for kind in kinds]
        each = len(context) // len(kinds)
        longer = torch.cat([context, torch.cat([text.expand(each, -1, -1) for text in texts])], dim=1)
        return hidden, longer, longer if value is context else torch.cat([value, longer[:, context.shape[1] :]], dim=1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, options: dict) -> Tensor:
        """Attention to the global text, blended with that to each region's where it holds."""
        lengths = [key.shape[1] - sum(self.lengths), *self.lengths]
        texts = list(zip(key.split(lengths, dim=1), value.split(lengths, dim=1), strict=True))
        division = self.places.division(query.shape[1], options[MOMENT], query)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return attention(query, key, value, options)

        kinds = kinds_of(options)
        if self.apart or set(kinds) == {POSITIVE}:
            return attend_by_region(attend, query, texts, division)
        attended, each = attend(query, *texts[0]), len(query) // len(kinds)
        for chunk, kind in enumerate(kinds):
            if kind == POSITIVE:  # in the others the regions would say the same again
                rows = slice(chunk * each, (chunk + 1) * each)
                regional = [(k[rows], v[rows]) for k, v in texts[1:]]
                attended[rows] = with_regions(attend, query[rows], attended[rows], regional, division)
        return attended


class Sigmas:
    """How far a sampling is, in the steps that matter: the latest start or end of a region that it has reached."""

    def __init__(self, places: Places, model: comfy.model_patcher.ModelPatcher):
        turns = {turn for region in places.regions for turn in (region.start, region.end)} - {0.0, 1.0}
        sampling: Any = model.get_model_object("model_sampling")
        self.sigmas = {turn: float(sampling.percent_to_sigma(turn)) for turn in sorted(turns)}

    def progress(self, sigma: Tensor) -> float:
        """sigma: (B,) noise of the rows, the same for all."""
        if not self.sigmas:
            return 0.0
        now = float(sigma.flatten()[0])
        return max((turn for turn, reached in self.sigmas.items() if now <= reached), default=0.0)


def replace_cross_attention(model: comfy.model_patcher.ModelPatcher, attend: Callable[..., Tensor]) -> None:
    """Have a clone call `attend` (query, key, value, options) in every cross-attention of its U-Net."""
    for name, number in blocks_of(model.model.diffusion_model):
        replace_attention(model, Attending(attend), name, number)


class Attending:
    """Ours in the place of a cross-attention: one object for each, and no room for another node's beside it."""

    def __init__(self, attend: Callable[..., Tensor]):
        self.attend = attend

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, options: dict) -> Tensor:
        return self.attend(query, key, value, options)

    def add(self, *_args: object, **_more: object) -> None:
        """What some packs call on a replacement that they find; regions cannot share the attention."""
        raise AdapterError(DISPLACED)


def refuse_displaced(heard: Listening, options: Mapping) -> None:
    """Raise AdapterError where a cross-attention is no longer ours, or another node changes the texts that it hears."""
    replaced = replacements_in(options)
    others = [one for one in replaced.values() if not isinstance(one, Attending)]
    patches = text_patches_in(options)
    ours = [patch for patch in patches if isinstance(getattr(patch, "__self__", None), Listening)]
    strange = [patch for patch in patches if patch not in ours and not isinstance(patch, PickLayer)]
    if others or strange or len(ours) != 1 or not heard.blocks <= set(replaced):
        raise AdapterError(DISPLACED)


def attention(query: Tensor, key: Tensor, value: Tensor, options: Mapping) -> Tensor:
    """The host's own, as it is without a replacement."""
    return host_attention.optimized_attention(
        query,
        key,
        value,
        options["n_heads"],
        attn_precision=options["attn_precision"],
        transformer_options=options,
    )


def _same_length(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two contexts repeated to one number of tokens, which attention does not notice."""
    length = math.lcm(first.shape[-2], second.shape[-2])
    first, second = (one.repeat(*[1] * (one.dim() - 2), length // one.shape[-2], 1) for one in (first, second))
    return first, second
