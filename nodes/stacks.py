"""A concept stack: concepts in order, a strength with each.  The strength enters the merge once, from here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from ..modular_concepts.concept import Concept
from ..modular_concepts.errors import AdapterError
from ..modular_concepts.merging import BlockStrengths
from ..modular_concepts.regions.assignment import called
from ..modular_concepts.stack import Stack


def as_stack(value: Concept | Stack | None) -> Stack:
    """A CONCEPT (strength 1), a CONCEPT_STACK or nothing, as a stack."""
    return Stack.of(value)


def joined(values: Mapping[str, Concept | Stack] | Iterable[Concept | Stack]) -> Stack:
    """The stacks of several sockets as one, in the sockets' order."""
    return Stack(
        pair for value in (values.values() if isinstance(values, Mapping) else values) for pair in Stack.of(value)
    )


def scaled(value: Concept | Stack, strength: float, blocks: str = "") -> Stack:
    """Every strength of a stack times `strength`, and parts of each concept times what `blocks` says of them.

    Raises AdapterError for what is no finite number, and for a text that `BlockStrengths` cannot read.
    """
    stack, chosen = as_stack(value), BlockStrengths.parse(blocks)
    if not math.isfinite(strength):
        names = ", ".join(concept.name for concept, _ in stack)
        raise AdapterError(f"{names}: strength is {strength}; it must be a finite number, 1 for as trained")
    return Stack(
        (replace(concept, layers=chosen.on(concept.layers)) if chosen.entries else concept, before * strength)
        for concept, before in stack
    )


def unmet_blocks(value: Concept | Stack, blocks: str) -> list[str]:
    """A sentence for the parts that `blocks` names and that no concept of the stack changes."""
    layers = [layer for concept, _ in as_stack(value) for layer in concept.layers]
    unmet = BlockStrengths.parse(blocks).unmet(layers)
    return (
        [f"no layer that is changed here lies in {', '.join(unmet)}, so that strength changes nothing"] if unmet else []
    )


def parts(stack: Stack) -> tuple[list[Concept], list[float]]:
    """(concepts, strengths), as the engine takes them."""
    return Stack.of(stack).concepts, Stack.of(stack).strengths


def unsaid(stack: Stack, text: str) -> list[str]:
    """A sentence for concepts that are connected to a prompt which says the word of none of them."""
    if not stack or called(stack, text):
        return []
    names = ", ".join(concept.name for concept, _ in stack)
    return [f"the prompt says no trigger word of {names}, so connecting it here changes nothing"]


def triggers(stack: Stack) -> str:
    """The words that call the concepts, for a prompt, with a space between."""
    return " ".join(word for concept, _ in stack for word in (concept.recipe.triggers or concept.tokens))
