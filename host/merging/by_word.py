"""Concepts that act at their own words alone, while the host samples: beside the weights, which nobody changes.

Each prompt of a sampling says where its words stand (`text/word_places.py`), which rides beside its text to the network
like any conditioning.  For the length of each call of the network the layers that read the text have hooks
(`modular_concepts/adapters/own_words.py`); an exception or a cancel ends them like any return.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import comfy.model_patcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ...modular_concepts.adapters.own_words import Said, WordResidual, at_own_words
from ...modular_concepts.adapters.sites import Site
from ...modular_concepts.errors import AdapterError, listed
from ...modular_concepts.merging.own_words import spoken
from ...modular_concepts.text.learned_word import LearnedWord
from ..called import Called, uncompiled
from ..families.cross_attention import text_patches_in
from ..layers import HostLayer
from ..messages import show_text
from ..model import HostModel
from ..text.layerwise import LAYERS, PickLayer, with_layers
from ..text.word_places import NOTE, Wording, WordingCond, wording_of
from ..text.words import words_in

BY_WORD = "modular_concepts_by_word"  # attachment of a MODEL, wrappers, and in transformer_options the `Drawing`
WATCH = "modular_concepts_by_word_watch"  # attachment: `Called`
WORDING = "modular_concepts_wording"  # `Wording` in model_conds, or in a CONDITIONING that comes with one
NO_WORDS = Wording(1, 0, {})


@dataclass(frozen=True, eq=False)
class AtWords:
    """What one concept adds at its own words in a MODEL.

    places: canonical name -> where its layers are.  texts: numbers of the texts in which it acts, of a picture by
    region 0 for the global one and then the regions'; None for all.
    """

    residual: WordResidual
    places: Mapping[str, HostLayer]
    texts: frozenset[int] | None = None

    def acts_in(self, text: int) -> bool:
        return self.residual.strength != 0 and (self.texts is None or text in self.texts)


class Behind(NamedTuple):
    """A text behind the prompt's own in the context that layers read: how many tokens it has, and what it says."""

    length: int
    wording: Wording


class Lengthens(Protocol):
    """What a patch of the texts belongs to that puts others behind each prompt's own."""

    every_wording: Sequence[Wording]

    def wordings(self, options: Mapping) -> list[list[Behind]]:
        """For each prompt of a call's batch, the texts behind it."""
        ...


def words_of_residuals(
    host: HostModel, words: Sequence[LearnedWord], residuals: Sequence[WordResidual]
) -> list[LearnedWord]:
    """Learned words, and ordinary ones that call a residual, which the CLIP is to know as words too.

    Raises AdapterError for a trigger that the base does not know.
    """
    there = [*words, *words_in(host.clip).values()]
    rows = spoken(there, residuals, host.word_rows)
    learned = {word.trigger for word in there}
    return [*words, *(LearnedWord(trigger, each) for trigger, each in rows.items() if trigger not in learned)]


def let_act(model: comfy.model_patcher.ModelPatcher, acting: Sequence[AtWords]) -> None:
    """Let a clone's samplings have more concepts at their own words, beside those that it has."""
    if not acting:
        return
    model.set_attachments(BY_WORD, (*acting_in(model), *acting))
    model.set_attachments(WATCH, Called("concepts at their own words", "leave them out"))
    for kind, wrapper in ((WrappersMP.OUTER_SAMPLE, _outer_sample), (WrappersMP.APPLY_MODEL, _apply)):
        model.remove_wrappers_with_key(kind, BY_WORD)
        model.add_wrapper_with_key(kind, BY_WORD, wrapper)
    if model.get_wrappers(WrappersMP.OUTER_SAMPLE, LAYERS):
        with_layers(model)  # behind ours again, for it takes prompts apart


def acting_in(model: comfy.model_patcher.ModelPatcher) -> tuple[AtWords, ...]:
    """What acts at its own words in a MODEL."""
    return model.get_attachment(BY_WORD) or ()


class Drawing:
    """One sampling: what acts in it, and where each call of the network says it."""

    def __init__(self, acting: Sequence[AtWords], watch: Called):
        # With factors of this sampling alone, which leave the device with it.
        residuals = [one.residual for one in acting]
        self.residuals = [
            WordResidual(each.name, each.triggers, each.layers, each.strength, each.owner) for each in residuals
        ]
        self.acting, self.watch = acting, watch
        self.places = {name: place for one in acting for name, place in one.places.items()}
        self._found: dict[tuple, Said | None] = {}

    @contextmanager
    def attached(self, network: nn.Module, call: Call) -> Generator[None]:
        """A block in which a network, the model's own or a copy on another device, has the residuals that are said."""
        if call.key not in self._found:
            self._found[call.key] = self._find(call)
        where = self._found[call.key]
        if where is None:
            yield
            return
        self.watch.look_at(network, call.options)
        layers = {name: place.found_in(network) for name, place in self.places.items()}
        heard: set[str] = set()
        with ExitStack() as stack:
            for name, place in layers.items():
                module = place.module if isinstance(place, Site) else place
                stack.callback(module.register_forward_hook(lambda *_, name=name: heard.add(name)).remove)
            stack.enter_context(at_own_words(layers, self.residuals, lambda text: where(call.checked(text))))
            stack.enter_context(uncompiled())
            yield
        self.watch.count([name for name in layers if name not in heard], len(layers))

    def _find(self, call: Call) -> Said | None:
        """Where the rows of a call's batch say which residual's words; None where they say none."""
        prompts = call.prompts()
        places = {
            number: [
                sorted(place for part in parts if one.acts_in(part.text) for place in part.places(one.residual))
                for parts in (prompts[row % len(prompts)] for row in range(call.rows))
            ]
            for number, one in enumerate(self.acting)
        }
        return Said(places) if any(any(rows) for rows in places.values()) else None


class Part(NamedTuple):
    """A text in one row of what a layer reads: its number, where it starts, how many tokens it has there.

    row: which of the wording's texts it is.
    """

    text: int
    start: int
    tokens: int
    wording: Wording
    row: int

    def places(self, residual: WordResidual) -> list[int]:
        """Where a residual's words stand, in each repetition of the text."""
        words = {word: rows[self.row % self.wording.texts] for word, rows in self.wording.places.items()}
        turns = range(self.start, self.start + self.tokens, self.wording.length or self.tokens)
        return [turn + place for turn in turns for place in residual.places(words)]


class Call:
    """One call of the network: the prompts of its batch, and what its layers read.

    chunks: for each prompt what it says, and of how many rows it is.  rows: of the batch.  context: (B, T, D).
    """

    def __init__(self, chunks: Sequence[tuple[Wording, int]], rows: int, context: Tensor, options: Mapping):
        self.options, self.rows, self.chunks = options, rows, chunks
        patches = text_patches_in(options)
        layers = next((patch.layers for patch in patches if isinstance(patch, PickLayer)), 1)
        lengthening = _lengthening(patches)
        self.behind = lengthening[0].wordings(options) if lengthening else [[] for _ in chunks]
        self.tokens = context.shape[1] // layers
        everything = [*(wording for wording, _ in chunks), *(each for behind in self.behind for _, each in behind)]
        self.key = (rows, self.tokens, *(id(wording) for wording in everything), *(count for _, count in chunks))

    def checked(self, text: Tensor) -> Tensor:
        """A text (B, T, D) that a layer reads.  Raises AdapterError for one that is none of the call's own."""
        tokens = self.tokens + sum(length for length, _ in self.behind[0])
        whole = self.rows % sum(count for _, count in self.chunks) == 0
        whole = whole and not any(self.tokens % wording.length for wording, _ in self.chunks if wording.length)
        if text.shape[:2] != (self.rows, tokens) or not whole:
            raise AdapterError(
                "another node changes the texts that the model reads (attention couple or a prompt scheduler), where "
                "words then cannot be found; leave it out, or merge without concepts that act at their own words"
            )
        return text

    def prompts(self) -> list[list[Part]]:
        """For each row of the batch the texts that it reads."""
        return [
            self._parts(wording, behind, row)
            for (wording, count), behind in zip(self.chunks, self.behind, strict=True)
            for row in range(count)
        ]

    def _parts(self, wording: Wording, behind: Sequence[Behind], row: int) -> list[Part]:
        parts = [Part(0, 0, self.tokens, wording, row)]
        for number, (length, text) in enumerate(behind, start=1):
            parts.append(Part(number, parts[-1].start + parts[-1].tokens, length, text, row))
        return parts


def _lengthening(patches: Sequence) -> list[Lengthens]:
    """What some of the patches of the texts belong to."""
    return [one for patch in patches if hasattr(one := getattr(patch, "__self__", None), "every_wording")]


def _outer_sample(sample, *args, **kwargs):
    """The host's sampling of one picture, each of whose prompts says where its words are."""
    guider = sample.class_obj
    acting = acting_in(guider.model_patcher)
    wordings = []
    for entry in (entry for entries in guider.conds.values() for entry in entries):
        text = entry.get("cross_attn")
        ready = NO_WORDS if text is None else entry.get(WORDING)
        wordings.append(wording_of(text, entry.get(NOTE)) if ready is None else ready)
        entry["model_conds"] = {**entry.get("model_conds", {}), WORDING: WordingCond(wordings[-1])}
    options = guider.model_options.setdefault("transformer_options", {})
    options[BY_WORD] = Drawing(acting, guider.model_patcher.get_attachment(WATCH))
    if sentences := _warnings(acting, [*wordings, *_behind(options)]):
        show_text("\n".join(sentences))
    return sample(*args, **kwargs)


def _behind(options: Mapping) -> list[Wording]:
    """What texts say that patches put behind those of the prompts."""
    return [each for one in _lengthening(text_patches_in(options)) for each in one.every_wording]


def _warnings(acting: Sequence[AtWords], wordings: Sequence[Wording]) -> list[str]:
    """A sentence for concepts that no prompt calls, and for prompts that may say more than is known."""
    heard = {word.lower() for wording in wordings for word in wording.words}
    words: dict[str, list[str]] = {}
    for one in acting:
        if one.residual.strength != 0:
            words.setdefault(one.residual.name, []).extend(one.residual.triggers)
    sentences = [
        f"no prompt says {listed(dict.fromkeys(triggers))}, so {name} acts nowhere; say it, in a text that the CLIP of "
        "Merge Concepts encodes"
        for name, triggers in words.items()
        if not heard & {trigger.lower() for trigger in triggers}
    ]
    if any(wording.mixed for wording in wordings):
        sentences.append(
            "a prompt was mixed with another after it was encoded, as Conditioning (Average) does: concepts act where "
            "the first of the two says their words, and of the second nothing is known"
        )
    return sentences


def _apply(apply_model, x, sigma, concat=None, context: Any = None, control=None, options: Any = None, **more):
    """Around each call of the network: the layers have what acts at the words of its prompts."""
    options = {} if options is None else options
    drawing, chunks = options.get(BY_WORD), more.pop(WORDING, None)
    if drawing is None or chunks is None or context is None:
        return apply_model(x, sigma, concat, context, control, options, **more)
    with drawing.attached(apply_model.class_obj.diffusion_model, Call(chunks, len(x), context, options)):
        return apply_model(x, sigma, concat, context, control, options, **more)
