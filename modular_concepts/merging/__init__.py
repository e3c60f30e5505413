"""Merging: several concepts become one residual per layer, by one of several families; each family its own file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from ..adapters.low_rank import LowRank, check_adapter, together
from ..adapters.sites import aligned, layer_of
from ..choices import FAMILIES
from ..errors import AdapterError
from ..models.layers import is_target
from ..seeds import seeded
from ..storage.room import check_room
from .block_strengths import BlockStrengths
from .blocks import MergedBlocks, check_blocks, merged_blocks
from .custom_diffusion import constrained_factors
from .dense import MergedDense
from .fusion import fused_factors
from .moments import Moment
from .options import Evidence, MergeOptions
from .sparse import dare_merge, magnitude_merge, ties_merge
from .sums import MergedLayer, MergedSum, average_strengths, mean_strengths, merged_delta, merged_factors
from .truncation import truncated

__all__ = [
    "FAMILIES",
    "BlockStrengths",
    "Evidence",
    "MergeOptions",
    "Merged",
    "MergedBlocks",
    "MergedDense",
    "MergedLayer",
    "MergedSum",
    "add_concepts",
    "average_strengths",
    "mean_strengths",
    "merge_concepts",
    "merged_blocks",
    "merged_delta",
    "merged_factors",
]

DEFAULTS, NOTHING = MergeOptions(), Evidence()
SPARSE = ("magnitude", "dare", "ties")
Merged = MergedLayer | MergedSum | MergedBlocks | MergedDense


class Mergeable(Protocol):
    """What merging reads of a concept."""

    name: str
    layers: Mapping[str, LowRank]


def merge_concepts(
    concepts: Sequence[Mergeable],
    strengths: Sequence[float],
    how: str = "sum",
    literal: bool = False,
    options: MergeOptions = DEFAULTS,
    evidence: Evidence = NOTHING,
) -> dict[str, Merged]:
    """One merged layer for each layer that any concept has; strengths are the papers' lambda or alpha.

    how: one of `FAMILIES`.  sum: W0 + sum_i strength_i delta_i (Po et al. 2024, Eq. 1).
    literal: for "block", Zhu's sum of strengths = 1, which runs each of k concepts at 1/k; else strength 1 keeps
    each concept as it was trained.
    Raises AdapterError that names the concepts and the layer when they do not fit together.
    """
    return dict(_merged_layers(concepts, strengths, how, literal, options, evidence))


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
    one layer's factors, and its delta for the families that drop single weights.  Half merged if it raises.
    """
    for layer, merged in _merged_layers(concepts, strengths, how, literal, options, evidence):
        merged.to(weights[layer].device).add_to(weights[layer])


def _merged_layers(
    concepts: Sequence[Mergeable],
    strengths: Sequence[float],
    how: str,
    literal: bool,
    options: MergeOptions,
    evidence: Evidence,
) -> Iterator[tuple[str, Merged]]:
    if how not in FAMILIES:
        raise AdapterError(f"merge family {how!r} is unknown; choose one of {', '.join(FAMILIES)}")
    if literal and how != "block":
        raise AdapterError(f"literal strengths belong to the block merge, not to {how!r}")
    strengths = _checked_strengths(concepts, strengths)
    if how == "mean":
        strengths = mean_strengths(strengths)
    if literal or how == "average":
        strengths = average_strengths(strengths)
    if how == "block":
        _check_partitions(concepts)
    _check_evidence(how, concepts, evidence)
    stack = aligned([concept.layers for concept in concepts])
    for layer in {name: None for layers in stack for name in layers}:
        owners = [index for index, layers in enumerate(stack) if layer in layers]
        adapters = together([stack[index][layer] for index in owners])
        names = [concepts[index].name for index in owners]
        _check_layer(layer, names, adapters)
        if how == "block":
            check_blocks(layer, names, adapters)
        own = [strengths[index] for index in owners]
        yield layer, _merged_layer(layer, names, adapters, own, how, options, _of(evidence, owners))


def _merged_layer(
    layer: str,
    names: Sequence[str],
    adapters: Sequence[LowRank],
    strengths: Sequence[float],
    how: str,
    options: MergeOptions,
    evidence: Evidence,
) -> Merged:
    if how == "block":
        return merged_blocks(adapters, strengths)
    if how == "fusion":
        return fused_factors(adapters, strengths, _moments(layer, names, adapters, evidence), options.ridge)
    if how == "custom_diffusion" and is_target(layer, "cross_attention_kv"):
        return constrained_factors(adapters, strengths, evidence.texts, evidence.usual)
    if how == "svd":
        return truncated(merged_factors(adapters, strengths), options.rank)[0]
    _check_room(layer, adapters, how)
    if how not in SPARSE:
        if any(adapter.kind == "full" for adapter in adapters):
            return MergedDense(merged_delta(adapters, strengths))
        return MergedSum(tuple(adapters), tuple(strengths))
    deltas = [adapter.delta().detach() for adapter in adapters]
    if how == "dare":
        generators = [seeded(options.seed, "dare", name, layer) for name in names]
        return dare_merge(deltas, strengths, options.density, generators)
    return (magnitude_merge if how == "magnitude" else ties_merge)(deltas, strengths, options.density)


def _check_room(layer: str, adapters: Sequence[LowRank], how: str) -> None:
    """Factors of a few kilobytes can stand for a weight that no memory holds; only whole deltas ask for it."""
    full = [adapter for adapter in adapters if adapter.kind == "full"]
    if how in SPARSE or full:
        numbers = math.prod(adapters[0].weight_shape) * (3 + 2 * len(adapters)) + sum(a.lora_down.numel() for a in full)
        shape = " x ".join(map(str, adapters[0].weight_shape))
        check_room(f"{layer}: a weight of {shape} numbers, merged by {how},", 4 * numbers, "merge factors by sum")


def _of(evidence: Evidence, owners: Sequence[int]) -> Evidence:
    """What belongs to some of the concepts, by their numbers."""
    moments, texts = ([each[index] for index in owners] if each else [] for each in (evidence.moments, evidence.texts))
    return Evidence(moments, texts, evidence.usual)


def _moments(
    layer: str, names: Sequence[str], adapters: Sequence[LowRank], evidence: Evidence
) -> list[Tensor | Moment]:
    found = []
    for name, adapter, recorded in zip(names, adapters, evidence.moments, strict=True):
        # What a layer reads, all of its sites read.
        moment = recorded.get(layer, recorded.get(layer_of(layer)))
        if moment is None:
            raise AdapterError(f"{name}: its moments say nothing of {layer}; record them again for this concept")
        inputs = adapter.lora_down[0].numel()
        width = moment.factor.shape[1] if isinstance(moment, Moment) else len(moment)
        if width != inputs:
            raise AdapterError(
                f"{name}: its moments are of {width} inputs of {layer}, which has {inputs}; record them again for this "
                "concept"
            )
        found.append(moment)
    return found


def _check_evidence(how: str, concepts: Sequence[Mergeable], evidence: Evidence) -> None:
    if how == "fusion" and len(evidence.moments) != len(concepts):
        raise AdapterError(
            f"fusion needs the moments of every concept's inputs ({len(evidence.moments)} for {len(concepts)} "
            "concepts); record them first, or merge by sum"
        )
    if how == "custom_diffusion" and (len(evidence.texts) != len(concepts) or evidence.usual is None):
        raise AdapterError(
            "the custom_diffusion merge needs text features of every concept and of ordinary captions; give the model "
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


def _check_partitions(concepts: Sequence[Mergeable]) -> None:
    """Recipes, where there are any, must agree on how the rows were cut."""
    cut = {}
    for concept in concepts:
        recipe = getattr(concept, "recipe", None)
        if recipe is not None and recipe.blocks is not None:
            cut.setdefault((recipe.blocks, recipe.layout or "contiguous"), concept.name)
    if len(cut) > 1:
        said = " but ".join(f"{name} was trained with {n} {layout} blocks" for (n, layout), name in cut.items())
        raise AdapterError(f"{said}; a block merge needs the same number and layout for all, or use sum")
