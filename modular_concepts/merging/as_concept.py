"""Several concepts as one: the exact merge as a concept of its own, for files and for any program that reads LoRAs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .. import __version__
from ..adapters.low_rank import LowRank
from ..concept import Concept, Recipe
from ..errors import AdapterError
from ..stack import Stack
from ..storage.strict_json import is_deep
from . import DEFAULTS, NOTHING, Evidence, MergeOptions, merge_concepts
from .compatibility import refuse_other_basis, refuse_shared_triggers, voice_of

SAMPLE = "base_sample"
MOST_DEPTH = 60  # of a part's origin, to which each merge adds three


def merged_concept(
    name: str,
    concepts: Sequence[Concept],
    strengths: Sequence[float],
    how: str = "sum",
    literal: bool = False,
    options: MergeOptions = DEFAULTS,
    evidence: Evidence = NOTHING,
) -> Concept:
    """One concept that holds the exact merge of several: ranks add up, strengths are inside, trigger words are kept.

    how and all after it: as `merge_concepts`.  Methods that drop single weights leave a layer no low rank, and its
    adapter is then as wide as the layer is.
    Raises AdapterError for concepts of two architectures, of two orthogonal bases, or with one trigger word.
    """
    check_together(concepts)
    merged = merge_concepts(concepts, strengths, how, literal, options, evidence)
    return as_concept(name, concepts, strengths, how, {layer: one.as_low_rank() for layer, one in merged.items()})


def merged_stack(name: str, stack: Stack, how: str = "sum", options: MergeOptions = DEFAULTS) -> Concept:
    """One concept that holds the exact merge of a stack, strengths inside; see `merged_concept`.

    how: a method that needs nothing beside the concepts (all but fusion and custom_diffusion).
    """
    stack = Stack.of(stack)
    return merged_concept(name, stack.concepts, stack.strengths, how, options=options)


def check_together(concepts: Sequence[Concept]) -> None:
    """Raise AdapterError for concepts that no merge can hold, whatever the model."""
    architectures = {concept.recipe.architecture: concept.name for concept in concepts if concept.recipe.architecture}
    if len(architectures) > 1:
        (first, one), (second, other), *_ = architectures.items()
        raise AdapterError(
            f"{one} was trained on {first!r} and {other} on {second!r}: they were trained on different architectures; "
            "merge concepts of one"
        )
    refuse_shared_triggers(concepts)
    refuse_other_basis(concepts)


def as_concept(
    name: str, concepts: Sequence[Concept], strengths: Sequence[float], how: str, layers: Mapping[str, LowRank]
) -> Concept:
    """The concept of a merge whose layers are there already: words, triggers and where it comes from are its parts'."""
    rank = max((adapter.rank for adapter in layers.values()), default=1)
    parts = list(zip(concepts, strengths, strict=True))
    sample = _agree_on(concept.recipe.origin.get(SAMPLE) for concept in concepts)
    recipe = Recipe(
        method="lora",
        rank=rank,
        alpha=float(rank),
        base_hash=_agree_on(concept.recipe.base_hash for concept in concepts),
        architecture=_agree_on(concept.recipe.architecture for concept in concepts),
        triggers=tuple(
            dict.fromkeys(word for concept in concepts for word in concept.recipe.triggers or tuple(concept.tokens))
        ),
        origin={
            "program": f"modular-concepts {__version__}",
            SAMPLE: sample,
            "merge": how,
            "words": {
                word: {"class_word": class_word, "strength": share * min(1.0, max(0.0, strength))}
                for concept, strength in parts
                for word in concept.tokens
                for class_word, share in (voice_of(concept, word),)
            },
            "parts": [
                {"name": concept.name, "strength": strength, "origin": _describe_origin(concept, sample)}
                for concept, strength in parts
            ],
        },
    )
    return Concept(name, layers, {word: rows for concept in concepts for word, rows in concept.tokens.items()}, recipe)


def _describe_origin(concept: Concept, sample: str) -> dict[str, object]:
    """A part's origin, without the sample of the base that the whole says already.

    Of merges of merges of merges the innermost parts are left out, or no reader would go so deep.
    """
    left_out = {SAMPLE} if concept.recipe.origin.get(SAMPLE) == sample else set()
    if is_deep(concept.recipe.origin, MOST_DEPTH):
        left_out.add("parts")
    return {key: value for key, value in concept.recipe.origin.items() if key not in left_out}


def _agree_on(values) -> str:
    """What all that say something say, or ""."""
    different = {value for value in values if isinstance(value, str) and value}
    return different.pop() if len(different) == 1 else ""
