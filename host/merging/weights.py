"""Concepts in the host's MODEL and CLIP: one adapter for each layer, whatever the number of concepts.

The loaded model is never written by us: the host's ModelPatcher keeps every weight aside before it patches a
clone's, and brings it back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
from comfy.weight_adapter.base import WeightAdapterBase
from torch import Tensor

from ...modular_concepts.adapters.low_rank import ConvGeometry, LowRank
from ...modular_concepts.adapters.own_words import WordResidual
from ...modular_concepts.concept import Concept, same_concept
from ...modular_concepts.errors import AdapterError, listed
from ...modular_concepts.merging import Merged, merged_factors
from ...modular_concepts.merging.as_concept import as_concept
from ...modular_concepts.merging.compatibility import fit, fitting_concepts, learned_words
from ...modular_concepts.merging.lift import lift
from ...modular_concepts.merging.methods import SUMMED, Merge
from ...modular_concepts.merging.own_words import EVERYWHERE, in_one_file, split
from ...modular_concepts.merging.tensors import tensors_of, with_tensors
from ...modular_concepts.stack import Stack
from ..layers import HostLayer
from ..model import HostModel
from ..text.layerwise import refuse_other_layers, with_layers
from ..text.words import with_words
from .activations import set_beside
from .by_word import AtWords, let_act, words_of_residuals

INSIDE = "modular_concepts"
BESIDE = "modular_concepts_beside"


@dataclass(frozen=True, eq=False)
class Inside:
    """A merge that a MODEL went through.

    layers: canonical name -> what was merged there, of MODEL and CLIP.  by_word: what acts at its own words instead.
    """

    stack: tuple[tuple[Concept, float], ...]
    how: str
    layers: Mapping[str, Merged]
    by_word: tuple[WordResidual, ...] = ()


class MergedWeight(WeightAdapterBase):
    """All concepts of one layer as one of the host's adapters, for weights and for bypass.

    weights: the merged layer as the engine made it, and its tensors; the host makes another adapter with copies of
    them on the device where it patches.  They are the concepts' own: nothing is copied before a weight is patched.
    """

    name = "modular concepts"

    def __init__(self, loaded_keys: set[str], weights: tuple[Merged, list[Tensor] | None]):
        merged, moved = weights
        self.merged = merged if moved is None else with_tensors(merged, moved)
        self.loaded_keys = loaded_keys
        self.weights: Any = (self.merged, tensors_of(self.merged) if moved is None else moved)
        self._beside: Merged | None = None
        self._on: torch.device | None = None

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
        only the difference would not be exact, keeping sums would cost a second set of weights.  Activations
        (`activations.py`) take a changed strength at once and cost at every step: half as much again for fifteen
        concepts of rank 20 at 256 pixels (`bench/merge.py`), which a picture of a few steps has not won back.
        """
        if function(weight) is weight:
            return self.merged.add_to(weight, strength)
        return weight.add_(function(strength * self.merged.to(weight.device).delta().reshape(weight.shape)))

    def h(self, x: Tensor, base_out: Tensor) -> Tensor:
        """What bypass adds to a layer's output; the host tells of convolutions in attributes."""
        conv = ConvGeometry(**getattr(self, "kw_dict", {})) if getattr(self, "is_conv", False) else None
        if self._beside is None or self._on != x.device:
            # Joined and moved once, for the host does not see the tensors inside the parts.
            self._beside, self._on = self.merged.to(x.device), x.device
        return self.multiplier * self._beside.residual(x, conv)


def merge_into(
    model: comfy.model_patcher.ModelPatcher,
    clip: comfy.sd.CLIP,
    stack: Sequence[tuple[Concept, float]],
    merge: Merge = SUMMED,
    beside: bool = False,
    act_on: str = EVERYWHERE,
) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP]:
    """Clones of MODEL and CLIP with the concepts in their weights, and their words in the CLIP.

    beside: compute them beside the weights instead (`activations.py`).  act_on: as `own_words.split`; what acts at its
    own words alone is in no weight (`by_word.py`).
    Raises AdapterError for concepts that do not fit the model, each other, or are in it already.
    """
    stack = Stack.of(stack)
    if not stack:
        raise AdapterError("there is nothing to merge; connect at least one concept")
    for concept in stack.concepts:
        if is_inside(model, concept):
            raise AdapterError(
                f"{concept.name} is in this model already; take the model from before the first merge, or leave "
                "the concept out"
            )
    host = HostModel(model, clip)
    concepts = fitting_concepts(host.architecture, host.shapes, stack.concepts)
    divided = split(Stack(zip(concepts, stack.strengths, strict=True)), act_on, merge.how)
    adapters, _ = fit(host.architecture, host.shapes, divided.everywhere, merge)
    words = learned_words(stack, host.word_rows)
    refuse_other_layers(words, host.cross_attention_layers)
    words = words_of_residuals(host, words, divided.by_word)
    model, clip = model.clone(), with_words(clip.clone(), words)
    for part, patcher in (("unet", model), ("text_encoder", clip.patcher)):
        there = {name: place for name, place in host.places.items() if place.part == part}
        _put(adapters, there, patcher, beside)
    let_act(model, [at_words(host, residual) for residual in divided.by_word])
    if stack.layerwise:
        with_layers(model)
    model.set_attachments(INSIDE, (*_merges_in(model), Inside(stack, merge.how, adapters, divided.by_word)))
    return model, clip


def at_words(host: HostModel, residual: WordResidual, texts: frozenset[int] | None = None) -> AtWords:
    """What a residual adds in a MODEL; texts: as `AtWords`."""
    return AtWords(residual, {name: host.places[name] for name in residual.layers}, texts)


def _put(
    merged_layers: Mapping[str, Merged],
    places: Mapping[str, HostLayer],
    patcher: comfy.model_patcher.ModelPatcher,
    beside: bool,
) -> None:
    """Into a clone: the merged layers that have a place there; each site of a fused layer lifted to the whole weight.

    Layers to which nothing is added are left alone: on a GPU the host casts a weight to float16 before it is patched,
    and one in float32 would come back rounded.
    """
    layers: dict[str, list[Merged]] = {}
    for name, merged_layer in merged_layers.items():
        if name in places and not merged_layer.is_zero:
            rows, whole = places[name].rows, places[name].weight
            lifted = merged_layer if rows is None else lift(merged_layer, rows[0], whole.shape[0])
            layers.setdefault(places[name].key, []).append(lifted)
    if not beside:
        for turn in range(max(map(len, layers.values()), default=0)):
            now = {key: parts[turn] for key, parts in layers.items() if turn < len(parts)}
            patcher.add_patches({key: MergedWeight(set(), (part, None)) for key, part in now.items()})
    elif layers:
        before = patcher.get_attachment(BESIDE) or {}
        every = {key: (*before.get(key, ()), *layers.get(key, ())) for key in {**before, **layers}}
        patcher.set_attachments(BESIDE, every)
        set_beside(patcher, every)


def concepts_in(model: comfy.model_patcher.ModelPatcher) -> tuple[str, ...]:
    """Names of the concepts that were merged into a MODEL."""
    return tuple(concept.name for concept in merged_concepts(model))


def is_inside(model: comfy.model_patcher.ModelPatcher, concept: Concept) -> bool:
    """Whether this very concept, and not only one of its name, was merged into a MODEL."""
    return any(same_concept(concept, other) for other in merged_concepts(model))


def merged_concepts(model: comfy.model_patcher.ModelPatcher) -> tuple[Concept, ...]:
    return tuple(concept for merge in _merges_in(model) for concept, _ in merge.stack)


def _merges_in(model: comfy.model_patcher.ModelPatcher) -> tuple[Inside, ...]:
    return model.get_attachment(INSIDE) or ()


def concept_inside(model: comfy.model_patcher.ModelPatcher, name: str = "") -> Concept:
    """All that was merged into a MODEL and its CLIP, by whatever method, as one concept: exactly what is in them.

    name: the concept's; its parts' names otherwise.  Raises AdapterError for a MODEL without concepts.
    """
    merges = _merges_in(model)
    if not merges:
        raise AdapterError("there is no concept in this model; connect the MODEL of Merge Concepts or Fuse Concepts")
    stack = [pair for merge in merges for pair in merge.stack]
    concepts, strengths = Stack.of(stack).concepts, Stack.of(stack).strengths
    parts: dict[str, list[LowRank]] = {}
    for merge in merges:
        for layer, merged_layer in merge.layers.items():
            parts.setdefault(layer, []).append(merged_layer.as_low_rank())
    layers = {
        layer: adapters[0] if len(adapters) == 1 else merged_factors(adapters, [1.0] * len(adapters)).as_low_rank()
        for layer, adapters in parts.items()
    }
    how = ", ".join(dict.fromkeys(merge.how for merge in merges))
    title = (name.strip() or "+".join(concept.name for concept in concepts))[:100]
    by_word = [residual for merge in merges for residual in merge.by_word]
    if by_word and layers:
        names = listed(dict.fromkeys(residual.name for residual in by_word))
        everywhere = [concept.name for concept in concepts if concept.name not in {each.name for each in by_word}]
        raise AdapterError(
            f"{names} act at their own words alone and {listed(everywhere)} everywhere, which one file cannot hold; "
            "save the two kinds apart, each from a merge of its own"
        )
    whole = as_concept(title, concepts, strengths, how, layers)
    return in_one_file(whole, by_word) if by_word else whole
