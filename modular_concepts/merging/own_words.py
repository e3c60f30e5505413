"""Which concepts of a stack act at their own words alone, with what, and several of them as one file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..adapters.low_rank import LowRank, measure_energy
from ..adapters.own_words import METHOD, Spoken, WordResidual, reads_text
from ..concept import Concept
from ..errors import AdapterError
from ..settings.merging import ACT_ON
from ..stack import Stack
from ..text.learned_word import LearnedWord
from .compatibility import WordRows, trained_for_words

EVERYWHERE, OWN_WORDS = ACT_ON.choices
PARTS = "own_words"  # in the origin of several concepts in one file: [[triggers, rank], ...]
SUM = "sum"
MOST_WORDS = 200  # of one file; each is looked for in every prompt
ENCODER, READERS = "the text encoder", "layers that read the picture or in the text encoder"
ENCODER_LAYERS = "text_encoder"  # how their names begin


@dataclass(frozen=True, eq=False)
class Split:
    """A stack as it acts.  everywhere: in weights or beside them.  by_word: at its own words.  notes: sentences."""

    everywhere: Stack
    by_word: tuple[WordResidual, ...]
    notes: tuple[str, ...] = ()


def split(stack: Stack, act_on: str = EVERYWHERE, how: str = SUM) -> Split:
    """Concepts that were trained for their own words act there; with OWN_WORDS all others that have a trigger too.

    Of those others the layers that read anything but text are left out, which a note tells with their share of the
    energy.  Raises AdapterError for a concept of which nothing would be left, and for a merge by another method.
    """
    ACT_ON.check(act_on)
    everywhere, by_word, notes = [], [], []
    for number, (concept, strength) in enumerate(Stack.of(stack)):
        if not acts_by_word(concept, act_on):
            everywhere.append((concept, strength))
            if act_on == OWN_WORDS and not words_of(concept):
                notes.append(f"{concept.name} has no trigger word, so it acts everywhere")
            continue
        if how != SUM:
            raise AdapterError(
                f"{concept.name} acts at its own words alone, where nothing is merged; {how} is for concepts that act "
                "everywhere, so choose the sum"
            )
        by_word += residuals_of(concept, strength, number)
        notes += _note_left_out(concept, READERS, lambda name: not reads_text(name))
    return Split(Stack(everywhere), tuple(by_word), tuple(notes))


def split_gated(stack: Stack, act_on: str = EVERYWHERE) -> list[WordResidual]:
    """What concepts that act by region do at their own words, in the layers that read text; others act by place."""
    return [
        residual
        for number, (concept, strength) in enumerate(stack)
        if acts_by_word(concept, act_on)
        for residual in residuals_of(concept, strength, number)
    ]


def notes_on_gated(stack: Stack, act_on: str = EVERYWHERE) -> list[str]:
    """A sentence for each concept whose text encoder's layers are left out, for they change all words of a text."""
    sentences = []
    for concept, _ in stack:
        if acts_by_word(concept, act_on):
            sentences += _note_left_out(concept, ENCODER, lambda name: name.startswith(ENCODER_LAYERS))
    return sentences


def as_acting(concept: Concept, act_on: str = EVERYWHERE) -> Concept:
    """The concept with what of it acts: at its own words alone where that is chosen, else as it is."""
    if trained_for_words(concept) or not acts_by_word(concept, act_on):
        return concept
    layers = {name: adapter for name, adapter in concept.layers.items() if reads_text(name)}
    return replace(concept, layers=layers, recipe=replace(concept.recipe, method=METHOD))


def acts_by_word(concept: Concept, act_on: str = EVERYWHERE) -> bool:
    """Whether a concept acts at its own words alone: as it was trained, or since that was chosen and it has some."""
    return trained_for_words(concept) or (act_on == OWN_WORDS and bool(concept.layers and words_of(concept)))


def words_of(concept: Concept) -> tuple[str, ...]:
    """The words that call a concept, each in one spelling: the learned one's, where it is learned."""
    there = {word.lower() for word in concept.tokens}
    words = list(concept.tokens)
    for word in concept.recipe.triggers:
        if word.lower() not in there:
            there.add(word.lower())
            words.append(word)
    return tuple(words)


def residuals_of(concept: Concept, strength: float, owner: int = 0) -> list[WordResidual]:
    """What a concept adds at its own words; of several in one file, each at its own.

    Raises AdapterError for a concept without a word or without a layer that reads text alone, and for a file whose
    parts do not make up its layers.
    """
    words, layers = words_of(concept), {name: each for name, each in concept.layers.items() if reads_text(name)}
    if not words:
        raise AdapterError(f"{concept.name} acts at its own words alone and has none; train it anew")
    if len(words) > MOST_WORDS:
        raise AdapterError(
            f"{concept.name} has {len(words)} trigger words; at own words a concept has at most {MOST_WORDS}"
        )
    if not layers:
        raise AdapterError(
            f"{concept.name} changes no layer that reads the text alone (keys and values of cross-attention), so it "
            "cannot act at its own words; let it act everywhere"
        )
    parts = parts_in(concept)
    if not parts:
        return [WordResidual(concept.name, words, layers, strength, owner)]
    residuals, first = [], 0
    for triggers, rank in parts:
        columns = {name: _columns(adapter, first, rank) for name, adapter in layers.items()}
        residuals.append(WordResidual(concept.name, triggers, columns, strength, owner))
        first += rank
    return residuals


def parts_in(concept: Concept) -> list[tuple[tuple[str, ...], int]]:
    """(triggers, how many columns between the factors) of each concept in a file of several; empty for one.

    Raises AdapterError for what is no such list, or does not make up the layers: a file says it, and nobody vouches.
    """
    noted = concept.recipe.origin.get(PARTS) if concept.recipe.method == METHOD else None
    if noted is None:
        return []
    parts, words = [], set(words_of(concept))
    for entry in noted if isinstance(noted, list) else [None]:
        triggers, rank = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        if not isinstance(triggers, list) or not triggers or not _all_in(triggers, words):
            raise AdapterError(f"{concept.name}: which words its parts have cannot be read; the file is damaged")
        if type(rank) is not int or rank < 1:
            raise AdapterError(f"{concept.name}: the rank of its part {triggers[0]} is damaged")
        parts.append((tuple(triggers), rank))
    total = sum(rank for _, rank in parts)
    for name, adapter in concept.layers.items():
        if adapter.rank != total:
            raise AdapterError(
                f"{concept.name}, {name}: its parts have {total} columns and the layer {adapter.rank}; the file is "
                "damaged"
            )
    return parts


def _all_in(triggers: Sequence[object], words: Collection[str]) -> bool:
    return all(isinstance(trigger, str) and trigger in words for trigger in triggers)


def check_own_words(concept: Concept) -> None:
    """Raise AdapterError for a concept of this method that could not act as it says; of others nothing is asked."""
    if concept.recipe.method != METHOD:
        return
    for name in concept.layers:
        if not reads_text(name):
            raise AdapterError(
                f"{concept.name}, {name}: a concept for its own words has adapters on layers that read the text alone, "
                "and this is none; the file is damaged"
            )
    if concept.layers:
        residuals_of(concept, 1.0)


def spoken(words: Collection[LearnedWord], by_word: Sequence[WordResidual], word_rows: WordRows) -> Spoken:
    """What a base reads prompts with: learned words, and ordinary ones that call a residual, as what they are.

    So a trigger's places are known whether it was learned or not.  word_rows(text): the base's rows of some words.
    Raises AdapterError for a trigger that the base does not know.
    """
    rows: dict[str, Tensor] = {word.trigger: word.rows for word in words}
    for residual in by_word:
        for trigger in residual.triggers:
            if trigger in rows:
                continue
            ordinary = word_rows(trigger)
            if not len(ordinary):
                raise AdapterError(
                    f"{residual.name}: the base does not know its trigger word {trigger}, so it can act nowhere"
                )
            rows[trigger] = ordinary
    return Spoken(rows, by_word)


def _join(residuals: Sequence[WordResidual]) -> tuple[dict[str, LowRank], list[list]]:
    """(layers, what `parts_in` reads) of several residuals side by side, strengths inside."""
    ranks = [max(adapter.rank for adapter in residual.layers.values()) for residual in residuals]
    layers = {}
    for name in {name: None for residual in residuals for name in residual.layers}:
        like = next(residual.layers[name] for residual in residuals if name in residual.layers)
        pairs = [_padded(each, name, like, rank) for each, rank in zip(residuals, ranks, strict=True)]
        up, down = torch.cat([up for up, _ in pairs], dim=1), torch.cat([down for _, down in pairs])
        layers[name] = LowRank(up, down, float(len(down)), "lora", None, like.out_features)
    return layers, [[list(each.triggers), rank] for each, rank in zip(residuals, ranks, strict=True)]


def in_one_file(concept: Concept, residuals: Sequence[WordResidual]) -> Concept:
    """A merge's concept with the layers of residuals, each for its own words still."""
    layers, parts = _join(residuals)
    rank = sum(rank for _, rank in parts)
    recipe = replace(
        concept.recipe, method=METHOD, rank=rank, alpha=float(rank), origin={**concept.recipe.origin, PARTS: parts}
    )
    return replace(concept, layers=layers, recipe=recipe)


def _note_left_out(concept: Concept, where: str, is_left_out: Callable[[str], bool]) -> list[str]:
    energies = {name: measure_energy(adapter) for name, adapter in concept.layers.items()}
    rest = sum(energy for name, energy in energies.items() if is_left_out(name))
    share = rest / (sum(energies.values()) or 1.0)
    if not rest:
        return []
    return [f"{concept.name}: {share:.0%} of its energy is in {where}, which no word can hold, and is left out"]


def _columns(adapter: LowRank, first: int, count: int) -> LowRank:
    """Some columns between an adapter's factors, as loud as they are in it."""
    chosen = slice(first, first + count)
    return adapter.replace(
        lora_up=adapter.lora_up[:, chosen],
        lora_down=adapter.lora_down[chosen],
        alpha=adapter.scale * count,
        kind="lora" if adapter.kind == "full" else adapter.kind,  # some columns of an identity are none
    )


def _padded(residual: WordResidual, name: str, like: LowRank, rank: int) -> tuple[Tensor, Tensor]:
    """(up, down) of one residual on a layer, strength and scale in `up`, with zeros up to its rank."""
    adapter = residual.layers.get(name)
    up = torch.zeros(like.out_features, rank)
    down = torch.zeros(rank, *like.lora_down.shape[1:])
    if adapter is not None:
        up[:, : adapter.rank] = residual.strength * adapter.scale * adapter.full_up().detach().float().cpu()
        down[: adapter.rank] = adapter.lora_down.detach().float().cpu()
    return up, down
