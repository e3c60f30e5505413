"""Learned words that come in a LoRA's own file: `bundle_emb.WORD.PART`, as A1111's bundles and OneTrainer write them.

Pivotal tuning trains a word and a LoRA together, and without the word such a LoRA does little.  PART is A1111's
`string_to_param.*` or `emb_params`, one tensor of rows, or one tensor for each of a family's text encoders, called as
the encoder is.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapters.low_rank import MAX_SIZE, LowRank
from ..concept import Concept, check_text, clip
from ..errors import AdapterError
from ..families import encoder_names, families, find_family, network_of, reader_names
from ..families.family import TextEncoder
from ..models.layers import is_target
from ..text.triggers import heard

MOST_ROWS = 75  # as many tokens as a text encoder hears at once
_ONE = ("string_to_param", "emb_params")
_UNSAYABLE = {
    "/": "a slash, which would be a folder in the names of files",
    "\\": "a backslash, which would be a folder in the names of files",
    "(": "a bracket, which prompts take for a weight",
    ")": "a bracket, which prompts take for a weight",
}


class Part(NamedTuple):
    """Some rows of a bundled word: of which word, in whose layout, and whether they are for an encoder's output."""

    word: str
    name: str
    output: bool


class Bundled(NamedTuple):
    """rows: word -> (vectors, width) float32.  keys: those that they are of.

    sentences: what is left out and why, or is taken for what; explained: the keys that they are about.
    """

    rows: dict[str, Tensor]
    keys: set[str]
    sentences: list[str]
    explained: set[str]


def part_of(key: str) -> Part | None:
    """What a key of a bundle holds; None for any other key."""
    match = _key_pattern().fullmatch(key)
    return match and Part(match[1], match[3] or match[2], bool(match[4]))


def is_needed(key: str) -> bool:
    """Whether this key's rows can be a word of ours."""
    part = part_of(key)
    return part is not None and part.name in (*_ONE, *encoder_names()) and not part.output


def bundled_words(tensors: Mapping[str, Tensor], architecture: str, width: int | None, model: bool) -> Bundled:
    """The learned words among a LoRA's tensors; one that cannot be a word of ours is left out, and said why.

    architecture: the family that the file names, or "".  width: of the texts that its layers read, or None where none
    of them reads a text; model: whether that is a model's at hand, which knows better than the file.
    """
    words: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    bundled = Bundled({}, set(), [], set())
    for key in sorted(tensors):
        part = part_of(key)
        if part is None:
            continue
        if is_needed(key):
            words[part.word][part.name].append(key)
        else:
            bundled.sentences.append(
                f"{_rows_for(part)} of the learned word {_name(part.word)} have no place in a concept"
            )
            bundled.explained.add(key)
    family = find_family(architecture)
    expected = width if model else None if family is None else family.word_width
    for word, parts in words.items():
        keys = {key for of_part in parts.values() for key in of_part}
        try:
            _check_word(word, bundled.rows)
            rows = _rows({name: (of_part, tensors[of_part[0]]) for name, of_part in parts.items()}, expected, width)
            _check_numbers(rows)
        except AdapterError as error:
            bundled.sentences.append(f"the learned word {_name(word)} is left out: {error}")
            bundled.explained.update(keys)
            continue
        bundled.rows[word] = rows.float().contiguous()
        bundled.keys.update(keys)
        if set(parts) < {encoder.name for encoder in _most_encoders()}:
            bundled.sentences.append(
                f"the learned word {_name(word)} has rows for {min(parts)} alone, so for one text encoder"
            )
    return bundled


def text_width(layers: Mapping[str, tuple[int, ...]]) -> int | None:
    """How wide the texts are that cross-attentions of these layers read (name -> weight's shape), if that is one."""
    joint = next((network for name in layers if (network := network_of(name)) is not None and network.joint), None)
    if joint is not None:
        return next(family.word_width for family in families() if family.denoiser is joint)
    widths = {shape[1] for name, shape in layers.items() if is_target(name, "cross_attention_kv")}
    return widths.pop() if len(widths) == 1 else None


def shapes_of(adapters: Mapping[str, LowRank]) -> dict[str, tuple[int, ...]]:
    """Layer -> (out, in) of the weight that each adapter is for."""
    return {name: (adapter.out_features, adapter.lora_down[0].numel()) for name, adapter in adapters.items()}


def with_words(concept: Concept, rows: Mapping[str, Tensor]) -> Concept:
    """The concept with learned words beside its layers: among its triggers, and going back to plain text at strength 0.

    Other programs know no class word, so what the base makes of the same letters stands for it.
    """
    if not rows:
        return concept
    triggers = list(concept.recipe.triggers)
    triggers += [word for word in rows if not any(heard(trigger, [word]) for trigger in triggers)]
    recipe = replace(concept.recipe, triggers=tuple(triggers))
    return _back_to_text(replace(concept, tokens={**concept.tokens, **rows}, recipe=recipe), 1.0)


def with_plain_words(concept: Concept) -> Concept:
    """The same concept, whose learned words are read as plain text at any strength."""
    return _back_to_text(concept, 0.0)


def _back_to_text(concept: Concept, strength: float) -> Concept:
    """Noted as a saved merge notes it of its words: `merge.compatibility.voice_of`."""
    words = {word: {"class_word": word, "strength": strength} for word in concept.tokens}
    return replace(concept, recipe=replace(concept.recipe, origin={**concept.recipe.origin, "words": words}))


def _check_word(word: str, others: Mapping[str, Tensor]) -> None:
    """Raise AdapterError for a word that no prompt could say, or that another word of the file is."""
    if not word or any(letter.isspace() for letter in word):
        raise AdapterError("a trigger is one word without spaces")
    for sign, why in _UNSAYABLE.items():
        if sign in word:
            raise AdapterError(f"it has {why}")
    if twin := next((other for other in others if other.lower() == word.lower()), None):
        raise AdapterError(f"upper and lower case are the same in prompts, and {_name(twin)} is there too")
    check_text("a trigger", word)


def _rows(parts: Mapping[str, tuple[list[str], Tensor]], expected: int | None, width: int | None) -> Tensor:
    """One word's rows as the text encoders have them side by side, of any dtype.  Raises AdapterError."""
    names = set(parts)
    if len(names & set(_ONE)) + bool(names - set(_ONE)) > 1 or any(len(keys) > 1 for keys, _ in parts.values()):
        raise AdapterError(
            f"it is there twice, as {' and '.join(sorted(k for keys, _ in parts.values() for k in keys))}"
        )
    tensors = {name: _of_rows(name, tensor) for name, (_, tensor) in parts.items()}
    wanted = expected or width
    if names <= set(_ONE):
        (rows,) = tensors.values()
    else:
        encoders = _encoders_of(names, wanted)
        if len({len(tensors[encoder.name]) for encoder in encoders}) > 1:
            first, *others = ((encoder.name, len(tensors[encoder.name])) for encoder in encoders)
            counts = [f"{first[0]} has {first[1]} rows", *(f"{name} {count}" for name, count in others)]
            raise AdapterError(f"{' and '.join(counts)}, which are not those of one word")
        rows = torch.cat([tensors[encoder.name].float() for encoder in encoders], dim=1)
        whole = sum(encoder.width for encoder in encoders)
        wanted = expected or (whole if len(encoders) > 1 else width or whole)
    if wanted and rows.shape[1] != wanted:
        raise AdapterError(f"its rows are {rows.shape[1]} wide, and the texts that the LoRA's model reads {wanted}")
    return rows


def _encoders_of(names: Collection[str], wanted: int | None) -> Sequence[TextEncoder]:
    """The text encoders that these are all of, in some family.  Raises AdapterError where they are those of none.

    wanted: how wide texts of the model are together.  A part of another family's encoders has to be as wide.
    """
    most = _most_encoders()
    for family in families():
        encoders = family.text_encoders
        whole = {encoder.name for encoder in encoders} == set(names)
        if whole and (family.word_width == wanted or not set(names) < {encoder.name for encoder in most}):
            return encoders
    missing = {encoder.name for encoder in most} - set(names) or set(names) - {encoder.name for encoder in most}
    why = "missing" if missing - set(names) else "of another model"
    raise AdapterError(f"it has rows for {' and '.join(sorted(names))}, and {min(missing)} is {why}")


def _most_encoders() -> Sequence[TextEncoder]:
    return max((family.text_encoders for family in families()), key=len)


def _key_pattern() -> re.Pattern:
    parts = (*encoder_names(), *reader_names(), "t5", "t5_xxl")
    return re.compile(
        rf"bundle_emb\.(.*)\.((string_to_param)\.[^.]+?|emb_params|{'|'.join(map(re.escape, parts))})(_out)?", re.DOTALL
    )


def _of_rows(name: str, tensor: Tensor) -> Tensor:
    tensor = tensor[None] if tensor.dim() == 1 else tensor
    if tensor.numel() == 0 or tensor.dim() != 2 or tensor.is_complex():
        raise AdapterError(f"its {name} is empty, or no rows of numbers: shape {tuple(tensor.shape)}")
    if len(tensor) > MOST_ROWS:
        raise AdapterError(f"it has {len(tensor)} rows, and a text encoder hears {MOST_ROWS} at once")
    return tensor


def _check_numbers(rows: Tensor) -> None:
    largest = rows.float().abs().max().item()
    if not largest <= MAX_SIZE:
        raise AdapterError(f"its numbers reach {largest:.1e}, so the training diverged or the file is damaged")


def _rows_for(part: Part) -> str:
    where = "the one text encoder" if part.name in _ONE else part.name
    return f"rows for {where}'s output" if part.output else f"rows for {where}"


def _name(word: str) -> str:
    return word if word.isprintable() and 0 < len(word) <= 60 and not any(map(str.isspace, word)) else clip(word)
