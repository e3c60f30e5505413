"""Several concepts as one: the exact merge as a concept of its own, for files and for any program that reads LoRAs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .. import __version__
from ..adapters.low_rank import LowRank
from ..concept import Concept, Recipe
from ..errors import AdapterError, listed
from ..stack import Stack
from ..storage.strict_json import is_deep
from .compatibility import refuse_other_basis, refuse_shared_triggers, voice_of
from .methods import DEFAULTS, SUMMED, Merge, MergeOptions, merge_layers
from .own_words import EVERYWHERE, Split, in_one_file, split

SAMPLE = "base_sample"
MOST_DEPTH = 60  # of a part's origin, to which each merge adds three


def merged_concept(
    name: str, concepts: Sequence[Concept], strengths: Sequence[float], merge: Merge = SUMMED
) -> Concept:
    """One concept that holds the exact merge of several: ranks add up, strengths are inside, trigger words are kept.

    Methods that drop single weights leave a layer no low rank, and its adapter is then as wide as the layer is.
    Concepts that act at their own words alone do so still.
    Raises AdapterError for concepts of two architectures, of two orthogonal bases, with one trigger word, or of which
    some act everywhere and some at their own words.
    """
    check_together(concepts)
    stack = Stack(zip(concepts, strengths, strict=True))
    divided = split(stack, merge.act_on, merge.how)
    if divided.by_word:
        _refuse_both(divided)
        return in_one_file(as_concept(name, concepts, strengths, merge.how, {}), divided.by_word)
    layers = {layer: merged.as_low_rank() for layer, merged in merge_layers(stack, merge)}
    return as_concept(name, concepts, strengths, merge.how, layers)


def merged_stack(
    name: str, stack: Stack, how: str = "sum", options: MergeOptions = DEFAULTS, act_on: str = EVERYWHERE
) -> Concept:
    """One concept that holds the exact merge of a stack, strengths inside; see `merged_concept`.

    how: a method that needs nothing beside the concepts (all but fusion and custom_diffusion).  act_on: as
    `own_words.split`.
    """
    stack = Stack.of(stack)
    return merged_concept(name, stack.concepts, stack.strengths, Merge(how, options=options, act_on=act_on))


def _refuse_both(divided: Split) -> None:
    everywhere = [concept.name for concept in divided.everywhere.concepts if concept.layers]
    if everywhere:
        raise AdapterError(
            f"{listed(everywhere)} would act everywhere and {divided.by_word[0].name} at its own words alone, which "
            "one file cannot hold; draw with both files together"
        )


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
