"""Merging: several concepts become one residual per layer.  Sums and blocks; each family its own file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

from ..adapters import LowRank, check_adapter
from ..errors import AdapterError
from .blocks import MergedBlocks, check_blocks, literal_strengths, merged_blocks
from .sums import MergedLayer, mean_strengths, merged_delta, merged_factors

__all__ = [
    "FAMILIES",
    "MergedBlocks",
    "MergedLayer",
    "mean_strengths",
    "merge_concepts",
    "merged_blocks",
    "merged_delta",
    "merged_factors",
]

FAMILIES = ("sum", "mean", "block")


class Mergeable(Protocol):
    """What merging reads of a concept."""

    name: str
    layers: Mapping[str, LowRank]


def merge_concepts(
    concepts: Sequence[Mergeable], strengths: Sequence[float], how: str = "sum", literal: bool = False
) -> dict[str, MergedLayer | MergedBlocks]:
    """One merged layer for each layer that any concept has; strengths are the papers' lambda or alpha.

    sum: W0 + sum_i strength_i delta_i (Po et al. 2024, Eq. 1).  mean: the same over the number of concepts.
    block: disjoint rows side by side (Zhu et al. 2025); strength 1 keeps each concept as it was trained.
    literal: for "block", Zhu's sum of strengths = 1, which runs each of k concepts at 1/k.
    Raises AdapterError that names the concepts and the layer when they do not fit together.
    """
    if how not in FAMILIES:
        raise AdapterError(f"merge family {how!r} is unknown; choose one of {', '.join(FAMILIES)}")
    if literal and how != "block":
        raise AdapterError(f"literal strengths belong to the block merge, not to {how!r}")
    strengths = _checked_strengths(concepts, strengths)
    if how == "mean":
        strengths = mean_strengths(strengths)
    if literal:
        strengths = literal_strengths(strengths)
    if how == "block":
        _check_partitions(concepts)
    merge = merged_blocks if how == "block" else merged_factors
    merged = {}
    for layer in {name: None for concept in concepts for name in concept.layers}:
        owners = [index for index, concept in enumerate(concepts) if layer in concept.layers]
        adapters = [concepts[index].layers[layer] for index in owners]
        names = [concepts[index].name for index in owners]
        _check_layer(layer, names, adapters)
        if how == "block":
            check_blocks(layer, names, adapters)
        merged[layer] = merge(adapters, [strengths[index] for index in owners])
    return merged


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
