"""Whether concepts fit a base and each other, and what they then are for it: merged layers and learned words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from .adapters import check_adapter
from .concept import Concept
from .errors import AdapterError
from .merge import DEFAULTS, NOTHING, Evidence, Merged, MergeOptions, merge_concepts


def fitted(
    architecture: str,
    shapes: Mapping[str, Sequence[int]],
    concepts: Sequence[Concept],
    strengths: Sequence[float],
    how: str = "sum",
    literal: bool = False,
    options: MergeOptions = DEFAULTS,
    evidence: Evidence = NOTHING,
) -> tuple[dict[str, Merged], dict[str, Tensor]]:
    """(canonical layer name -> merged layer, trigger word -> rows) of concepts on a base.

    architecture, shapes (canonical name -> weight's shape): the base's.  how and all after it: as `merge_concepts`.
    Raises AdapterError for a concept of another base, for two that share a trigger word, and for concepts on
    different orthogonal bases.
    """
    for concept in concepts:
        check_architecture(concept, architecture)
    refuse_shared_triggers(concepts)
    _refuse_other_basis(concepts)
    for concept in concepts:
        for layer, adapter in concept.layers.items():
            if layer not in shapes:
                raise AdapterError(
                    f"{concept.name}, {layer}: the base has no layer of this name; "
                    "the concept was trained on another architecture"
                )
            check_adapter(f"{concept.name}, {layer}", adapter, shapes[layer])
    merged = merge_concepts(concepts, strengths, how, literal, options, evidence) if concepts else {}
    return merged, {word: rows for concept in concepts for word, rows in concept.tokens.items()}


def check_architecture(concept: Concept, architecture: str) -> None:
    """Raise AdapterError for a concept that was trained on another family of models."""
    if concept.recipe.architecture not in ("", architecture):
        raise AdapterError(
            f"{concept.name} was trained on {concept.recipe.architecture!r}, "
            f"this base is {architecture!r}; train it on this base or load the base it belongs to"
        )


def refuse_shared_triggers(concepts: Sequence[Concept]) -> None:
    """Raise AdapterError when two concepts answer to one word."""
    owners: dict[str, str] = {}
    for concept in concepts:
        for word in concept.tokens:
            if word in owners:
                raise AdapterError(
                    f"{owners[word]} and {concept.name} both answer to {word}; train one of them under another name"
                )
            owners[word] = concept.name


def _refuse_other_basis(concepts: Sequence[Concept]) -> None:
    """Slots keep concepts apart only within one shared basis."""
    seen: dict[str, str] = {}
    for concept in concepts:
        if concept.recipe.basis is not None:
            seen.setdefault(concept.recipe.basis, concept.name)
    if len(seen) > 1:
        (first, one), (second, other), *_ = seen.items()
        raise AdapterError(
            f"{one} was trained on shared basis {first}, {other} on {second}, so they would disturb each other; "
            "train them on one basis, or save one as a plain LoRA to merge it all the same"
        )
