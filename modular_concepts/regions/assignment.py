"""Which concepts act where: those that a region names, or whose trigger word stands in its prompt."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..concept import Concept
from ..crosstalk.measures import distinct_names
from ..errors import AdapterError, listed
from ..stack import Stack
from ..text.triggers import heard
from .geometry import Region


def acting(stack: Stack, prompt: str, regions: Sequence[Region]) -> list[tuple[int, ...]]:
    """For each text, the global prompt first and then the regions', the numbers of the stack's concepts that act there.

    A concept that any region has is in its regions alone, whatever the global prompt says; others act outside of all
    regions if the global prompt calls them.
    Raises AdapterError for a concept that a region names and the stack lacks.
    """
    check_names(regions, [concept.name for concept, _ in stack])
    refuse_ambiguous(regions, Stack.of(stack).concepts)
    regional = [_named(stack, region) for region in regions]
    taken = {number for numbers in regional for number in numbers}
    return [tuple(number for number in called(stack, prompt) if number not in taken), *regional]


def called(stack: Stack, prompt: str) -> tuple[int, ...]:
    """Numbers of the concepts whose trigger word stands in a prompt."""
    words = [{*concept.tokens, *concept.recipe.triggers} for concept, _ in stack]
    spoken = {place.word.lower() for place in heard(prompt, set().union(*words))}
    return tuple(number for number, mine in enumerate(words) if any(word.lower() in spoken for word in mine))


def unheard(
    stack: Stack,
    prompt: str,
    regions: Sequence[Region],
    gated: bool,
    way_out: str,
    by_word: Collection[int] = (),
    negative: str = "",
) -> list[str]:
    """A sentence for each concept of a stack that no prompt calls and no region names, and for names without effect.

    gated: whether concepts act where they are called alone; otherwise they are in the weights, and act everywhere.
    way_out: how a concept without a trigger word is made to act, in gated mode.
    by_word: numbers of concepts that act at their own words alone, in either mode, and in the negative prompt too.
    """
    sentences = []
    everywhere = {number for text in (prompt, *(region.prompt for region in regions)) for number in called(stack, text)}
    acts = {number for numbers in acting(stack, prompt, regions) for number in numbers} if gated else set()
    acts |= {number for number in called(stack, negative) if number in by_word}
    for number, (concept, strength) in enumerate(stack):
        words = listed(dict.fromkeys([*concept.tokens, *concept.recipe.triggers]))
        if strength == 0 or number in acts or (not gated and (number in everywhere or not words)):
            continue
        if not gated and number not in by_word:
            sentences.append(
                f"no prompt says {words}: {concept.name} changes the whole picture, but is not asked for in it"
            )
        elif words:
            sentences.append(f"no prompt says {words}, so {concept.name} acts nowhere; say it where {concept.name} is")
        else:
            sentences.append(f"{concept.name} has no trigger word that could call it, so it acts nowhere; {way_out}")
    named = dict.fromkeys(name for region in regions for name in region.concepts or ())
    if named and not gated:
        sentences.append(
            f"regions name the concepts {listed(named)}, which holds concepts apart in gated mode alone; in merged "
            "mode they act everywhere"
        )
    return sentences


def refuse_ambiguous(regions: Sequence[Region], concepts: Sequence[Concept]) -> None:
    """Raise AdapterError for a name of two concepts that a region names, which could not be told apart by it."""
    names, distinct = [concept.name for concept in concepts], distinct_names(concepts)
    for name in dict.fromkeys(name for region in regions for name in region.concepts or ()):
        if names.count(name) > 1:
            numbered = " or ".join(each for each, plain in zip(distinct, names, strict=True) if plain == name)
            raise AdapterError(
                f"{names.count(name)} concepts are called {name!r}; let the region name {numbered}, in the "
                "stack's order"
            )


def check_names(regions: Sequence[Region], known: Sequence[str]) -> None:
    """Raise AdapterError for a concept that a region names and that is not known.

    Names that come twice in `known` may be numbered, as `crosstalk.measures.distinct_names` numbers them.
    """
    numbered = {f"{name} ({number + 1})" for name in known for number in range(known.count(name))}
    for region in regions:
        for name in region.concepts or ():
            if name not in known and name not in numbered:
                raise AdapterError(
                    f"region {region.prompt!r} asks for the concept {name!r}, and there is none of that name; "
                    f"there {'is ' + listed(known, 10) if known else 'are no concepts'}"
                )


def _named(stack: Stack, region: Region) -> tuple[int, ...]:
    if region.concepts is None:
        return called(stack, region.prompt)
    names = distinct_names(Stack.of(stack).concepts)
    return tuple(number for number, name in enumerate(names) if name in region.concepts)
