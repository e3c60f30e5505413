"""All merge methods, by name, and the walk through the layers that is the same for each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..adapters.low_rank import LowRank, check_adapter, together
from ..adapters.sites import aligned
from ..errors import AdapterError
from ..settings.merging import ACT_ON, METHOD_HELP
from .blocks import BLOCK, MergedBlocks
from .custom_diffusion import CUSTOM_DIFFUSION
from .dense import MergedDense
from .fusion import FUSION
from .method import MOMENTS, TEXTS, LayerStack, Mergeable, Method
from .options import Evidence, MergeOptions
from .sparse import DARE, MAGNITUDE, TIES
from .sums import AVERAGE, MEAN, SUM, MergedLayer, MergedSum, average_strengths
from .truncation import SVD

DEFAULTS, NOTHING = MergeOptions(), Evidence()
Merged = MergedLayer | MergedSum | MergedBlocks | MergedDense

METHODS = {
    method.name: method for method in (SUM, MEAN, AVERAGE, BLOCK, FUSION, CUSTOM_DIFFUSION, MAGNITUDE, DARE, TIES, SVD)
}


@dataclass(frozen=True, eq=False)
class Merge:
    """How concepts become one.

    how: one of `METHODS`.  sum: W0 + sum_i strength_i delta_i (Po et al. 2024, Eq. 1).
    literal: for "block", Zhu's sum of strengths = 1, which runs each of k concepts at 1/k; else strength 1 keeps
    each concept as it was trained.
    evidence: what some methods must know beside the adapters.
    act_on: which concepts act at their own words alone (`own_words.split`), where nothing is merged.
    """

    how: str = "sum"
    literal: bool = False
    options: MergeOptions = DEFAULTS
    evidence: Evidence = NOTHING
    act_on: str = ACT_ON.default

    @property
    def method(self) -> Method:
        """Raises AdapterError for a name that no method has, and for literal strengths of any but "block"."""
        if self.how not in METHODS:
            raise AdapterError(f"merge method {self.how!r} is unknown; choose one of {', '.join(METHOD_HELP)}")
        if not self.literal:
            return METHODS[self.how]
        if self.how != BLOCK.name:
            raise AdapterError(f"literal strengths belong to the block merge, not to {self.how!r}")
        return Method(BLOCK.name, BLOCK.merge_layer, average_strengths, BLOCK.check)


SUMMED = Merge()
Pairs = Sequence[tuple[Mergeable, float]]


def merge_concepts(
    concepts: Sequence[Mergeable],
    strengths: Sequence[float],
    how: str = "sum",
    literal: bool = False,
    options: MergeOptions = DEFAULTS,
    evidence: Evidence = NOTHING,
) -> dict[str, Merged]:
    """One merged layer for each layer that any concept has; strengths are the papers' lambda or alpha.

    how and all after it: as `Merge`.
    Raises AdapterError that names the concepts and the layer when they do not fit together.
    """
    return dict(merge_layers(_pair_up(concepts, strengths), Merge(how, literal, options, evidence)))


def add_concepts(
    weights: Mapping[str, Tensor],
    concepts: Sequence[Mergeable],
    strengths: Sequence[float],
    how: str = "sum",
    literal: bool = False,
    options: MergeOptions = DEFAULTS,
    evidence: Evidence = NOTHING,
) -> None:
    """Merge concepts into weights that are ours to change, layer by layer: W0 becomes W in its own memory.

    weights: layer -> weight, for every layer that a concept has, on any device.  Beside them there is never more than
    one layer's factors, and its delta for the methods that drop single weights.  Half merged if it raises.
    """
    for layer, merged in merge_layers(_pair_up(concepts, strengths), Merge(how, literal, options, evidence)):
        merged.add_to(weights[layer])


def merge_layers(stack: Pairs, merge: Merge = SUMMED) -> Iterator[tuple[str, Merged]]:
    """(layer, what is merged there) of pairs (concept, strength), for each layer that any concept has.

    Raises AdapterError that names the concepts and the layer when they do not fit together.
    """
    method, concepts = merge.method, [concept for concept, _ in stack]
    _check_strengths(stack)
    strengths = method.strengths([float(strength) for _, strength in stack])
    method.check(concepts)
    _check_evidence(method, concepts, merge.evidence)
    by_concept = aligned([concept.layers for concept in concepts])
    for layer in {name: None for layers in by_concept for name in layers}:
        owners = [index for index, layers in enumerate(by_concept) if layer in layers]
        adapters = together([by_concept[index][layer] for index in owners])
        names = [concepts[index].name for index in owners]
        _check_layer(layer, names, adapters)
        evidence = _take_evidence(merge.evidence, owners)
        yield (
            layer,
            method.merge_layer(
                LayerStack(layer, names, adapters, [strengths[index] for index in owners], merge.options, evidence)
            ),
        )


def _pair_up(concepts: Sequence[Mergeable], strengths: Sequence[float]) -> Pairs:
    if concepts and len(concepts) != len(strengths):
        raise AdapterError(f"{len(strengths)} strengths for {len(concepts)} concepts; give one for each")
    return list(zip(concepts, strengths, strict=False))


def _take_evidence(evidence: Evidence, owners: Sequence[int]) -> Evidence:
    """What belongs to some of the concepts, by their numbers."""
    moments = [evidence.moments[index] for index in owners] if evidence.moments else []
    texts = [evidence.texts[index] for index in owners] if evidence.texts else []
    return Evidence(moments, texts, evidence.usual)


def _check_evidence(method: Method, concepts: Sequence[Mergeable], evidence: Evidence) -> None:
    if method.needs == MOMENTS and len(evidence.moments) != len(concepts):
        raise AdapterError(
            f"{method.name} needs the moments of every concept's inputs ({len(evidence.moments)} for {len(concepts)} "
            "concepts); record them first, or merge by sum"
        )
    if method.needs == TEXTS and (len(evidence.texts) != len(concepts) or evidence.usual is None):
        raise AdapterError(
            f"the {method.name} merge needs text features of every concept and of ordinary captions; give the model "
            "that they belong to, or merge by sum"
        )


def _check_strengths(stack: Pairs) -> None:
    if not stack:
        raise AdapterError("there is nothing to merge; give at least one concept")
    for concept, strength in stack:
        if not math.isfinite(strength):
            raise AdapterError(f"{concept.name}: strength is {strength}; it must be a finite number")


def _check_layer(layer: str, names: Sequence[str], adapters: Sequence[LowRank]) -> None:
    for name, adapter in zip(names, adapters, strict=True):
        check_adapter(f"{name}, {layer}", adapter)
        if adapter.weight_shape != adapters[0].weight_shape:
            raise AdapterError(
                f"{layer}: {names[0]} is for a weight of shape {adapters[0].weight_shape}, {name} for "
                f"{adapter.weight_shape}; they were trained on different base models"
            )
