"""All merge methods, by name, and the walk through the layers that is the same for each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from ..adapters.low_rank import LowRank, check_adapter, together
from ..adapters.sites import aligned
from ..choices import FAMILIES
from ..errors import AdapterError
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


def merge_concepts(
    concepts: Sequence[Mergeable],
    strengths: Sequence[float],
    how: str = "sum",
    literal: bool = False,
    options: MergeOptions = DEFAULTS,
    evidence: Evidence = NOTHING,
) -> dict[str, Merged]:
    """One merged layer for each layer that any concept has; strengths are the papers' lambda or alpha.

    how: one of `METHODS`.  sum: W0 + sum_i strength_i delta_i (Po et al. 2024, Eq. 1).
    literal: for "block", Zhu's sum of strengths = 1, which runs each of k concepts at 1/k; else strength 1 keeps
    each concept as it was trained.
    Raises AdapterError that names the concepts and the layer when they do not fit together.
    """
    return dict(_merged_layers(concepts, strengths, _chosen(how, literal), options, evidence))


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
    for layer, merged in _merged_layers(concepts, strengths, _chosen(how, literal), options, evidence):
        merged.to(weights[layer].device).add_to(weights[layer])


def _chosen(how: str, literal: bool) -> Method:
    if how not in METHODS:
        raise AdapterError(f"merge family {how!r} is unknown; choose one of {', '.join(FAMILIES)}")
    if not literal:
        return METHODS[how]
    if how != BLOCK.name:
        raise AdapterError(f"literal strengths belong to the block merge, not to {how!r}")
    return Method(BLOCK.name, BLOCK.merge_layer, average_strengths, BLOCK.check)


def _merged_layers(
    concepts: Sequence[Mergeable],
    strengths: Sequence[float],
    method: Method,
    options: MergeOptions,
    evidence: Evidence,
) -> Iterator[tuple[str, Merged]]:
    strengths = method.strengths(_checked_strengths(concepts, strengths))
    method.check(concepts)
    _check_evidence(method, concepts, evidence)
    stack = aligned([concept.layers for concept in concepts])
    for layer in {name: None for layers in stack for name in layers}:
        owners = [index for index, layers in enumerate(stack) if layer in layers]
        adapters = together([stack[index][layer] for index in owners])
        names = [concepts[index].name for index in owners]
        _check_layer(layer, names, adapters)
        there = LayerStack(
            layer, names, adapters, [strengths[index] for index in owners], options, _of(evidence, owners)
        )
        yield layer, method.merge_layer(there)


def _of(evidence: Evidence, owners: Sequence[int]) -> Evidence:
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


def _checked_strengths(concepts: Sequence[Mergeable], strengths: Sequence[float]) -> list[float]:
    if not concepts:
        raise AdapterError("there is nothing to merge; give at least one concept")
    if len(concepts) != len(strengths):
        raise AdapterError(f"{len(strengths)} strengths for {len(concepts)} concepts; give one for each")
    for concept, strength in zip(concepts, strengths, strict=True):
        if not math.isfinite(strength):
            raise AdapterError(f"{concept.name}: strength is {strength}; it must be a finite number")
    return [float(strength) for strength in strengths]


def _check_layer(layer: str, names: Sequence[str], adapters: Sequence[LowRank]) -> None:
    for name, adapter in zip(names, adapters, strict=True):
        check_adapter(f"{name}, {layer}", adapter)
        if adapter.weight_shape != adapters[0].weight_shape:
            raise AdapterError(
                f"{layer}: {names[0]} is for a weight of shape {adapters[0].weight_shape}, {name} for "
                f"{adapter.weight_shape}; they were trained on different base models"
            )
