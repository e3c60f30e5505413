"""Learned words in the host's CLIP: a trigger word in a prompt becomes its learned rows.

The host's text models take vectors where a token id stands, each with a prompt weight of its own; so nothing
is written into the vocabulary, and any node that encodes text with the returned CLIP knows the triggers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import comfy.sd
import comfy.sd1_clip
import torch
from torch import Tensor

from ...modular_concepts.concept import Concept
from ...modular_concepts.errors import AdapterError, listed
from ...modular_concepts.families import encoder_names, reader_names
from ...modular_concepts.merging.compatibility import learned_words, refuse_shared_triggers
from ...modular_concepts.models.cross_attention import first_positions
from ...modular_concepts.models.cross_attention import word_places as places_of_words
from ...modular_concepts.text.learned_word import LearnedWord, layers_of
from ...modular_concepts.text.triggers import TRIGGER, between, heard, replaced
from ...modular_concepts.text.words import caption_ids, learned_rows, token_ids
from ..layers import text_encoders_of
from .layerwise import LAYERS
from .word_places import marked, telling

WORDS = "modular_concepts_words"  # on a tokenizer: trigger word -> LearnedWord
MEAN = "mean"


def encode_prompt(clip: comfy.sd.CLIP, text: str, stack: Sequence[tuple[Concept, float]] = ()) -> list:
    """CONDITIONING of a prompt; the concepts' learned words stand for their rows, as loud as the stack has them.

    A concept that the CLIP knows already keeps the strength that it has there.

    With a layer-wise word in it, its tensor is made with the mean of the layers' rows, and `layerwise.LAYERS` holds a
    context for each layer, which the samplers of a MODEL with the concept listen to.
    """
    refuse_shared_triggers([concept for concept, _ in stack])
    clip = with_words(clip, learned_words(stack, lambda words: word_rows(clip, words)))
    layers = layers_in(clip, text)
    if not layers:
        return _encoded(clip, text)
    by_layer = [_encoded(at_layer(clip, layer), text) for layer in range(layers)]
    mean = _encoded(at_layer(clip, MEAN), text)
    return [
        [context, {**about, LAYERS: torch.stack([entries[number][0] for entries in by_layer], dim=1)}]
        for number, (context, about) in enumerate(mean)
    ]


def _encoded(clip: comfy.sd.CLIP, text: str) -> list:
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def warnings_of_words(clip: comfy.sd.CLIP, texts: Sequence[str], concepts: Sequence[Concept]) -> list[str]:
    """A sentence for trigger words in the texts that neither the CLIP nor a concept knows; none if there are none."""
    triggers = {
        *words_in(clip),
        *(word for concept in concepts for word in (*concept.tokens, *concept.recipe.triggers)),
    }
    unknown = [match[0] for text in texts for part in between(text, triggers) for match in TRIGGER.finditer(part)]
    if not unknown:
        return []
    words = listed(dict.fromkeys(unknown))
    return [
        f"no concept here has the trigger word {words}, which so changes nothing; connect its concept, or leave it out"
    ]


def with_tokens(
    clip: comfy.sd.CLIP, tokens: Mapping[str, Tensor], class_words: Mapping[str, str] | None = None
) -> comfy.sd.CLIP:
    """`with_words` of trigger words -> rows, as a training has them, and -> class words."""
    classes = class_words or {}
    return with_words(clip, [LearnedWord(word, rows, classes.get(word, "")) for word, rows in tokens.items()])


def with_words(clip: comfy.sd.CLIP, words: Sequence[LearnedWord]) -> comfy.sd.CLIP:
    """A clone of `clip` whose tokenizers know the words too; the weights are shared.

    Rows are as wide as all CLIP text models together, CLIP-L's columns first.  T5 reads class words instead.
    Words that the CLIP knows already stay as loud as they are there.
    Raises AdapterError for a width that is not the text models', and for a word that they know otherwise.
    """
    if not words:
        return clip
    stock = _stock(clip.tokenizer)
    if not stock:
        raise AdapterError(
            f"the CLIP is a {type(clip.tokenizer).__name__}, whose prompts cannot hold learned words; "
            "load the text encoder of the base that the concept was trained on"
        )
    widths = [part.embedding_size for part in stock.values()]
    every = _joined(words, words_in(clip))
    for word in every.values():
        if word.width != sum(widths):
            raise AdapterError(
                f"{word.trigger}: the learned tokens are {word.width} wide, the text model's {sum(widths)}; "
                "they were trained on another base"
            )
    clone = _with_tokenizer(clip)
    clone.cond_stage_model = telling(clip.cond_stage_model)
    setattr(clone.tokenizer, WORDS, every)
    split = {trigger: word.rows.split(widths, dim=-1) for trigger, word in every.items()}
    for number, (name, part) in enumerate(stock.items()):
        columns = {trigger: each[number] for trigger, each in split.items()}
        setattr(clone.tokenizer, name, LearnedWords(part, columns))
    classes = {trigger: word.class_word for trigger, word in every.items()}
    for name in reader_names():
        if (reader := getattr(clip.tokenizer, name, None)) is not None:
            setattr(clone.tokenizer, name, ClassWords(getattr(reader, "stock", reader), classes))
    return clone


def words_in(clip: comfy.sd.CLIP) -> dict[str, LearnedWord]:
    """Trigger word -> what a CLIP knows of it already."""
    return getattr(clip.tokenizer, WORDS, {})


def _joined(words: Sequence[LearnedWord], before: Mapping[str, LearnedWord]) -> dict[str, LearnedWord]:
    """Trigger word -> word, of new ones and those that were there before."""
    for word in words:
        there = before.get(word.trigger)
        if there is not None and not torch.equal(there.at_full_strength, word.at_full_strength):
            raise AdapterError(
                f"{word.trigger} means another concept in this CLIP already; train one under another name"
            )
    every = {word.trigger: word for word in words} | dict(before)
    spelled: dict[str, LearnedWord] = {}
    for word in [*before.values(), *words]:
        other = spelled.setdefault(word.trigger.lower(), word)
        if other.trigger != word.trigger and not torch.equal(other.at_full_strength, word.at_full_strength):
            raise AdapterError(
                f"{word.trigger} and {other.trigger} are one word for CLIP, which knows no capitals, and mean two "
                "concepts; use one of them, or train one under another name"
            )
    return every


def at_layer(clip: comfy.sd.CLIP, layer: int | str) -> comfy.sd.CLIP:
    """A clone for which layer-wise words are those of one cross-attention layer, or the mean of all (MEAN)."""
    clone = _with_tokenizer(clip)
    for name, part in _parts(clip.tokenizer).items():
        if isinstance(part, LearnedWords):
            setattr(clone.tokenizer, name, LearnedWords(part.stock, part.tokens, layer))
    return clone


def layers_in(clip: comfy.sd.CLIP, text: str) -> int:
    """For how many layers the learned words in a prompt were learned; 0 where there is no layer-wise word."""
    words = words_in(clip)
    layers = {place.word: words[place.word].layers for place in heard(text, words) if words[place.word].layers}
    if len(set(layers.values())) > 1:
        raise AdapterError(f"{' and '.join(layers)} were learned for different numbers of layers; use one at a time")
    return next(iter(layers.values()), 0)


def word_rows(clip: comfy.sd.CLIP, words: str) -> Tensor:
    """(k, width) rows of the token tables for some words, without start, end and padding; CLIP-L's columns first."""
    columns = []
    for name, encoder in text_encoders_of(clip).items():
        ids, bare = (
            [token for section in clip.tokenize(text)[key_of(name)] for token, *_ in section] for text in (words, "")
        )
        inner = [token for token in ids if isinstance(token, int) and token not in bare]
        table = encoder.transformer.get_input_embeddings()
        with torch.no_grad():
            columns.append(table(torch.tensor(inner, dtype=torch.long), out_dtype=torch.float32).float().cpu().clone())
    return torch.cat(columns, dim=1)


def key_of(name: str) -> str:
    """The host's tokenizers leave out what its encoders' names begin with."""
    return name.removeprefix("clip_")


def trigger_positions(clip: comfy.sd.CLIP, prompts: Sequence[str], tokens: Mapping[str, Tensor]) -> Tensor:
    """(B, all rows of tokens) int64: where each stands first in the context of each prompt, -1 for nowhere."""
    reader = next(iter(_parts(with_tokens(clip, tokens).tokenizer).values()))
    rows = [reader.ids_of(prompt) for prompt in prompts]
    wanted = [number for word in tokens for number in reader.ids[word.lower()]]
    longest = max(map(len, rows))
    return first_positions(torch.tensor([row + [-1] * (longest - len(row)) for row in rows]), wanted)


def word_places(clip: comfy.sd.CLIP, prompt: str, tokens: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Trigger word -> where its rows stand in the context of a prompt, for those of `tokens` that it says."""
    reader = next(iter(_parts(with_tokens(clip, tokens).tokenizer).values()))
    return places_of_words(reader.ids_of(prompt), {word: reader.ids[word.lower()] for word in tokens})


def word_positions(clip: comfy.sd.CLIP, prompt: str, word: str) -> list[int]:
    """Where a word's tokens stand in the context of a prompt, wherever it is said; learned words and others alike."""
    reader = next(iter(_parts(clip.tokenizer).values()))

    def ids(text: str) -> list[int]:
        if isinstance(reader, LearnedWords):
            return reader.ids_of(text)
        return [token for section in reader.tokenize_with_weights(text, disable_weights=True) for token, *_ in section]

    bare = set(ids(""))
    inner, every = [token for token in ids(word) if token not in bare], ids(prompt)
    starts = [place for place in range(len(every)) if inner and every[place : place + len(inner)] == inner]
    return [place + step for place in starts for step in range(len(inner))]


def _parts(tokenizer: Any) -> dict[str, Any]:
    """Attribute -> tokenizer of each text model that can learn words, in the order of the learned rows' columns."""
    names = (tokenizer.clip,) if hasattr(tokenizer, "clip") else encoder_names()
    return {name: getattr(tokenizer, name) for name in names if hasattr(tokenizer, name)}


def _stock(tokenizer: Any) -> dict[str, comfy.sd1_clip.SDTokenizer]:
    """`_parts` without words of ours."""
    return {name: part.stock if isinstance(part, LearnedWords) else part for name, part in _parts(tokenizer).items()}


def _with_tokenizer(clip: comfy.sd.CLIP) -> comfy.sd.CLIP:
    """A clone whose tokenizer may be changed."""
    clone = clip.clone()
    clone.tokenizer = copy.copy(clip.tokenizer)
    return clone


class LearnedWords:
    """An SDTokenizer of the host that reads trigger words as extra ids and hands on their rows instead.

    stock: the tokenizer without them; tokens: trigger word -> (vectors, width) or (layers, vectors, width);
    layer: which of the layers' rows, MEAN, or None where layer-wise words cannot be said.
    """

    def __init__(self, stock: comfy.sd1_clip.SDTokenizer, tokens: Mapping[str, Tensor], layer: int | str | None = None):
        self.stock, self.tokens = stock, dict(tokens)
        self._reader, self._words = copy.copy(stock), stock.tokenizer
        self._reader.tokenizer = self._ids
        # CLIP's vocabulary has no capitals, and neither have the words that people are told to type.
        self._spelled = {word.lower(): _of_layer(rows, layer) for word, rows in tokens.items()}
        self._rows = learned_rows(self._spelled)
        self._triggers = [word for word, rows in tokens.items() for _ in range(rows.shape[-2])]
        self._vocab_size = max(stock.inv_vocab) + 1
        self.ids = token_ids(self._spelled, self._vocab_size)
        self._unsaid = {
            self.ids[word.lower()][0]: word for word, rows in tokens.items() if layer is None and layers_of(rows)
        }

    def __getattr__(self, name: str):
        return getattr(self.__dict__["_reader"], name)

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **settings) -> list[list[tuple]]:
        sections = self._reader.tokenize_with_weights(text, return_word_ids, **settings)
        return [[(self._vector(token), *rest) for token, *rest in section] for section in sections]

    def ids_of(self, text: str) -> list[int]:
        """Token ids of a whole prompt, section behind section, `ids` where a trigger word stands."""
        sections = self._reader.tokenize_with_weights(text, disable_weights=True)
        return [int(token) if isinstance(token, int) else -1 for section in sections for token, *_ in section]

    def _ids(self, text: str) -> dict[str, list[int]]:
        first = self.stock.tokens_start
        bare = self._words("")["input_ids"]

        def inner(part: str) -> list[int]:
            ids = self._words(part)["input_ids"]
            return ids[first : len(ids) - (len(bare) - first)]

        ids = caption_ids(text.lower(), self._spelled, self._vocab_size, inner)
        return {"input_ids": [*bare[:first], *ids, *bare[first:]]}

    def _vector(self, token: int | Tensor) -> int | Tensor:
        learned = isinstance(token, int) and token >= self._vocab_size
        if learned and token in self._unsaid:
            raise AdapterError(
                f"{self._unsaid[token]} was learned for each layer apart, which this node cannot say; write the prompt "
                "in Concept Prompt, and sample with the MODEL from Merge Concepts"
            )
        place = token - self._vocab_size if learned else -1
        return marked(self._rows[place], self._triggers[place]) if learned else token


class ClassWords:
    """A tokenizer of a text model that learns nothing: it reads the class word where a trigger word stands."""

    def __init__(self, stock: Any, class_words: Mapping[str, str]):
        self.stock = stock
        self._words = {trigger.lower(): word for trigger, word in class_words.items() if word}

    def __getattr__(self, name: str):
        return getattr(self.__dict__["stock"], name)

    def tokenize_with_weights(self, text: str, *args, **settings) -> list[list[tuple]]:
        return self.stock.tokenize_with_weights(replaced(text, self._words), *args, **settings)


def _of_layer(rows: Tensor, layer: int | str | None) -> Tensor:
    if not layers_of(rows):
        return rows
    if isinstance(layer, int):
        return rows[layer]
    # So that equal rows come back to the bit.
    return rows[0] + (rows - rows[0]).mean(0)
