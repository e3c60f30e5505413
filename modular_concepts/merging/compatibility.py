"""Whether concepts fit a base and each other, and what they then are for it: merged layers and learned words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from ..adapters.low_rank import check_adapter, shaped_for
from ..adapters.own_words import METHOD
from ..concept import Concept
from ..errors import AdapterError
from ..stack import Stack
from ..text.learned_word import LearnedWord
from .methods import SUMMED, Merge, Merged, merge_layers

WordRows = Callable[[str], Tensor]


def fit(
    architecture: str,
    shapes: Mapping[str, Sequence[int]],
    stack: Iterable[tuple[Concept, float]],
    merge: Merge = SUMMED,
    word_rows: WordRows | None = None,
) -> tuple[dict[str, Merged], list[LearnedWord]]:
    """(canonical name of a layer or site -> what is merged there, learned words) of concepts on a base.

    architecture, shapes (canonical name -> weight's shape): the base's.
    word_rows: the base's, and learned words follow their concepts' strengths (`learned_words`); None: as learned.
    Raises AdapterError for a concept of another base, for two that share a trigger word, for concepts on different
    orthogonal bases, and for one that acts at its own words alone (`own_words.split` takes those out).
    """
    pairs = list(stack)
    refuse_own_words([concept for concept, _ in pairs], "what is merged acts")
    concepts = fitting_concepts(architecture, shapes, [concept for concept, _ in pairs])
    refuse_other_basis(concepts)
    fitting = Stack((concept, strength) for concept, (_, strength) in zip(concepts, pairs, strict=True))
    merged = dict(merge_layers(fitting, merge)) if fitting else {}
    return merged, learned_words(fitting, word_rows)


def fitting_concepts(
    architecture: str, shapes: Mapping[str, Sequence[int]], concepts: Sequence[Concept]
) -> list[Concept]:
    """Concepts with adapters in the shapes of a base's weights, each by itself.

    Raises AdapterError for a concept of another base, and for two that share a trigger word.
    """
    for concept in concepts:
        check_architecture(concept, architecture)
    refuse_shared_triggers(concepts)
    return [_on_base(concept, shapes) for concept in concepts]


def _on_base(concept: Concept, shapes: Mapping[str, Sequence[int]]) -> Concept:
    """The concept with adapters in the shapes of the base's weights.  Raises AdapterError where one does not fit."""
    layers = {}
    for layer, adapter in concept.layers.items():
        if layer not in shapes:
            raise AdapterError(
                f"{concept.name}, {layer}: the base has no layer of this name; "
                "the concept was trained on another architecture"
            )
        layers[layer] = shaped_for(adapter, shapes[layer])
        check_adapter(f"{concept.name}, {layer}", layers[layer], shapes[layer])
    changed = any(layers[layer] is not adapter for layer, adapter in concept.layers.items())
    return replace(concept, layers=layers) if changed else concept


def faded_words(
    concepts: Sequence[Concept], strengths: Sequence[float], word_rows: WordRows | None
) -> dict[str, Tensor]:
    """Trigger word -> rows of `learned_words`."""
    words = learned_words(zip(concepts, strengths, strict=True), word_rows)
    return {word.trigger: word.rows for word in words}


def learned_words(stack: Iterable[tuple[Concept, float]], word_rows: WordRows | None) -> list[LearnedWord]:
    """The concepts' words, with rows between the class word's (strength 0) and as learned (1 and above).

    A concept's word says as much of it as its layers do, so a strength that left the word alone would leave the
    concept in the picture.  Without a class word that the base knows, or without word_rows, words stay as learned.
    word_rows(text): (k, width) rows of the base's token table.
    """
    words = []
    for concept, strength in stack:
        for trigger, rows in concept.tokens.items():
            class_word, loudness = voice_of(concept, trigger)
            share = loudness * min(1.0, max(0.0, strength))
            class_rows = word_rows(class_word) if word_rows and share < 1 else rows[:0]
            words.append(LearnedWord(trigger, rows, class_word).faded(share, class_rows))
    return words


def voice_of(concept: Concept, word: str) -> tuple[str, float]:
    """(the class word that a trigger goes back to, how much of it is said at strength 1).

    A saved merge notes both for each of its words (`merge.as_concept.merged_concept`), for its parts had strengths.
    """
    noted = concept.recipe.origin.get("words")
    entry = noted.get(word) if isinstance(noted, Mapping) else None
    if isinstance(entry, Mapping):
        class_word, share = entry.get("class_word"), entry.get("strength")
        if isinstance(class_word, str) and isinstance(share, int | float) and 0 <= share <= 1:
            return class_word, float(share)
    return concept.recipe.class_word, 1.0


def check_architecture(concept: Concept, architecture: str) -> None:
    """Raise AdapterError for a concept that was trained on another family of models."""
    if concept.recipe.architecture not in ("", architecture):
        raise AdapterError(
            f"{concept.name} was trained on {concept.recipe.architecture!r}, "
            f"this base is {architecture!r}; train it on this base or load the base it belongs to"
        )


def refuse_shared_triggers(concepts: Sequence[Concept]) -> None:
    """Raise AdapterError when two concepts answer to one word."""
    owners: dict[str, Concept] = {}
    for concept in concepts:
        for word, rows in concept.tokens.items():
            if word in owners:
                raise AdapterError(_find_shared(word, owners[word], concept, rows.equal(owners[word].tokens[word])))
            owners[word] = concept


def _find_shared(word: str, one: Concept, other: Concept, same: bool) -> str:
    if one.name != other.name:
        return f"{one.name} and {other.name} both answer to {word}; use one of them, or train one under another name"
    if same:
        return f"{one.name} is there twice, and both answer to {word}; leave one away and set the strength of the other"
    return f"two concepts called {one.name} both answer to {word}; use one of them, or train one under another name"


def trained_for_words(concept: Concept) -> bool:
    """Whether a concept's layers were trained to act at its own words alone."""
    return bool(concept.layers) and concept.recipe.method == METHOD


def refuse_own_words(concepts: Sequence[Concept], what: str) -> None:
    """Raise AdapterError for a concept that acts at its own words alone, where everything acts everywhere."""
    for concept in concepts:
        if trained_for_words(concept):
            raise AdapterError(
                f"{concept.name} was trained for its own words alone, and {what} everywhere; draw with it by Merge "
                "Concepts, or by sample in the shell"
            )


def refuse_other_basis(concepts: Sequence[Concept]) -> None:
    """Raise AdapterError for two shared bases: slots keep concepts apart only within one."""
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
