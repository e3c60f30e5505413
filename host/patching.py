"""Concepts in the host's MODEL and CLIP: one adapter for each layer, whatever the number of concepts.

The loaded model is never written by us: the host's ModelPatcher keeps every weight aside before it patches a
clone's, and brings it back.
"""

from __future__ import annotations

from collections.abc import Sequence

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
from comfy.weight_adapter.base import WeightAdapterBase
from torch import Tensor

from ..modular_concepts.adapters import ConvGeometry, LowRank
from ..modular_concepts.concept import Concept
from ..modular_concepts.errors import AdapterError
from ..modular_concepts.fitting import fitted
from ..modular_concepts.merge import (
    DEFAULTS,
    NOTHING,
    Evidence,
    Merged,
    MergedBlocks,
    MergedDense,
    MergedLayer,
    MergedSum,
    MergeOptions,
)
from .clip import class_words_of, learned_words, with_tokens, word_rows
from .layers import architecture_of, host_layers
from .layerwise import cross_attention_layers, refuse_other_layers, with_layers

INSIDE = "modular_concepts"
# One summand: up, down, rows, out_features, and what its product is multiplied with.
Summand = tuple[Tensor, Tensor, Tensor | None, int, float]


class MergedWeight(WeightAdapterBase):
    """All concepts of one layer as one of the host's adapters, for weights and for bypass.

    weights: the summands of each part (one part, or one for each block), or ((values,),) of a dense merge; plain, so
    that the host can move the tensors.  They are the concepts' own: nothing is copied before a weight is patched.
    """

    name = "modular concepts"

    def __init__(self, loaded_keys: set[str], weights: Sequence[Sequence[tuple]]):
        self.loaded_keys, self.weights = loaded_keys, weights
        self._beside: Merged | None = None
        self._on: torch.device | None = None

    @classmethod
    def of(cls, merged: Merged) -> MergedWeight:
        if isinstance(merged, MergedDense):
            return cls(set(), [((merged.values,),)])
        parts = merged.parts if isinstance(merged, MergedBlocks) else (merged,)
        return cls(set(), [_summands(part) for part in parts])

    def merged(self) -> Merged:
        if len(self.weights[0][0]) == 1:
            return MergedDense(*self.weights[0][0])
        parts = tuple(_sum_of(summands) for summands in self.weights)
        return parts[0] if len(parts) == 1 else MergedBlocks(parts, parts[0].out_features)

    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset,
        function,
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight=None,
    ) -> Tensor:
        """weight + strength * delta, in place as the host expects.

        The host hands a copy of the base's weight whenever a strength changed, and all concepts are added to it in one
        product: a changed strength patches anew, which is exact and nearly as quick as the arithmetic allows.  Adding
        only the difference would not be exact, keeping sums would cost a second set of weights.  Bypass changes a
        strength at once and costs at every step: half as much again for fifteen concepts of rank 20 at 256 pixels
        (`bench/merge.py`).
        """
        merged = self.merged().to(weight.device)
        if function(weight) is weight:
            return merged.add_to(weight, strength)
        weight += function((strength * merged.delta().reshape(weight.shape)).to(weight.dtype))
        return weight

    def h(self, x: Tensor, base_out: Tensor) -> Tensor:
        """What bypass adds to a layer's output; the host tells of convolutions in attributes."""
        conv = ConvGeometry(**getattr(self, "kw_dict", {})) if getattr(self, "is_conv", False) else None
        if self._beside is None or self._on != x.device:
            # Joined and moved once, for the host does not see the tensors inside the parts.
            self._beside, self._on = self.merged().to(x.device), x.device
        return self.multiplier * self._beside.residual(x, conv)


def _summands(part: MergedLayer | MergedSum) -> tuple[Summand, ...]:
    if isinstance(part, MergedLayer):
        return ((part.up, part.down, part.rows, part.out_features, 1.0),)
    return tuple(
        (a.lora_up.detach(), a.lora_down.detach(), a.rows, a.out_features, strength * a.scale)
        for a, strength in zip(part.adapters, part.strengths, strict=True)
    )


def _sum_of(summands: Sequence[Summand]) -> MergedSum:
    adapters = [
        LowRank(up, down, float(len(down)), "lora" if rows is None else "block", rows, out)
        for up, down, rows, out, _ in summands
    ]
    return MergedSum(tuple(adapters), tuple(strength for *_, strength in summands))


def merged(
    model: comfy.model_patcher.ModelPatcher,
    clip: comfy.sd.CLIP,
    stack: Sequence[tuple[Concept, float]],
    how: str = "sum",
    literal: bool = False,
    options: MergeOptions = DEFAULTS,
    evidence: Evidence = NOTHING,
) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP]:
    """Clones of MODEL and CLIP with the concepts in their weights, and their words in the CLIP.

    how and all after it: as `merge_concepts`.  Raises AdapterError for concepts that do not fit the model, each other,
    or are in it already.
    """
    if not stack:
        raise AdapterError("there is nothing to merge; connect at least one concept")
    concepts, strengths = [concept for concept, _ in stack], [strength for _, strength in stack]
    before = concepts_in(model)
    for concept in concepts:
        if concept.name in before:
            raise AdapterError(
                f"{concept.name} is in this model already; take the model from before the first merge, or leave "
                "the concept out"
            )
    layers = host_layers(model, clip)
    shapes = {name: layer.module.weight.shape for name, layer in layers.items()}
    adapters, tokens = fitted(
        architecture_of(model),
        shapes,
        concepts,
        strengths,
        how,
        literal,
        options,
        evidence,
        lambda words: word_rows(clip, words),
    )
    refuse_other_layers(tokens, cross_attention_layers(model))
    patches: dict[str, dict[str, MergedWeight]] = {"unet": {}, "text_encoder": {}}
    for name, adapter in adapters.items():
        patches[layers[name].part][layers[name].key] = MergedWeight.of(adapter)
    model, clip = (
        model.clone(),
        with_tokens(clip.clone(), tokens, class_words_of(concepts), learned_words(concepts)),
    )
    model.add_patches(patches["unet"])
    clip.add_patches(patches["text_encoder"])
    if any(rows.dim() == 3 for rows in tokens.values()):
        with_layers(model)
    model.set_attachments(INSIDE, (*before, *(concept.name for concept in concepts)))
    return model, clip


def concepts_in(model: comfy.model_patcher.ModelPatcher) -> tuple[str, ...]:
    """Names of the concepts that were merged into a MODEL."""
    return model.get_attachment(INSIDE) or ()
