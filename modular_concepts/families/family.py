"""What a model family is: one record of everything in which it differs from the others, and nothing else.

A `Network` is how the modules of a denoiser or text encoder are called and what each layer of it sees; several families
may share one.  A `Family` is what concept files call it, what people and other programs call it, and its networks.
Nothing here imports torch, so that a command's help can name the families.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ..text.company import subjects_beside

# What the tokens are that a layer is asked about: positions of the picture, words of the text, both in one row, or
# nothing of either (timestep and modulation), where no place and no word can have a part of its own.
POSITIONS, TEXTS, JOINT, NEITHER = "positions", "texts", "joint", "neither"
Rows = Callable[[int], Mapping[str, tuple[int, int]]]


def _as_they_are(path: str) -> str | None:
    return path


def equal_parts(*names: str) -> Rows:
    """Rows of projections that are each as high as the layer is wide, one behind the other."""
    return lambda inp: {name: (number * inp, inp) for number, name in enumerate(names)}


@dataclass(frozen=True)
class Fused:
    """A Linear that computes several projections at once.

    layers: which ones, by path.  rows(in): projection -> (first output row, how many), of a layer with so many inputs;
    together they are all its rows.
    """

    layers: re.Pattern
    rows: Rows


@dataclass(frozen=True, eq=False)
class Network:
    """A denoiser's or text encoder's layers, by the paths that canonical names have behind `unet.` and the like.

    layers: matches the path of every layer that there is, from its start; what it does not match is unknown.
    targets: what a training may choose (`choices.TARGETS`) -> its layers; what is absent is refused by `refusal`.
    blocks: path -> the block in a person's words, the first that matches; {} is the number.
    tokens: path -> what the layer's tokens are, the first that matches.
    words: parts of paths that hold an underscore, which kohya's keys do not tell from a dot.
    respelled(stem): another program's kohya stem as ours.  original(path): the original layout's path as ours.
    checkpointed: classes of blocks that are computed again in backward, as libraries and hosts call them.
    joint: whether text and picture are read in one attention; else by cross-attention.
    in_diffusers: whether diffusers has the layers under the same paths.
    fused: layers that are several projections, each a site of its own (`adapters/sites.py`).
    apart: whether a training gives each of those an adapter of its own, rather than one to the whole layer.
    text_first: where text and picture are read in one row, whether the text comes first.
    """

    layers: re.Pattern
    targets: Mapping[str, re.Pattern]
    blocks: Sequence[tuple[re.Pattern, str]]
    tokens: Sequence[tuple[re.Pattern, str]]
    words: Sequence[str] = ()
    refusal: str = ""
    respelled: Callable[[str], str | None] = _as_they_are
    original: Callable[[str], str | None] = _as_they_are
    checkpointed: Sequence[str] = ()
    joint: bool = False
    in_diffusers: bool = True
    fused: Sequence[Fused] = ()
    apart: bool = False
    text_first: bool = True

    @cached_property
    def _word(self) -> re.Pattern:
        alternatives = [*sorted(self.words, key=len, reverse=True), "[A-Za-z0-9]+"]
        return re.compile(rf"({'|'.join(alternatives)})(?:_|$)")

    def has(self, path: str) -> bool:
        """Whether this is the path of a layer that the network can have."""
        return self.layers.match(path) is not None

    def fused_at(self, path: str) -> Fused | None:
        """How the layer at a path is fused, or None for one projection."""
        return next((fused for fused in self.fused if fused.layers.fullmatch(path)), None)

    def path_of(self, stem: str) -> str | None:
        """The path of a kohya stem without its prefix, or None where it is none of this network's."""
        respelled = self.respelled(stem)
        if respelled is None:
            return None
        words = self._word.findall(respelled)
        path = ".".join(words)
        return path if words and respelled == "_".join(words) and self.has(path) else None

    def block_of(self, path: str) -> str | None:
        """The block that a path lies in, in a person's words, or None for what lies in none."""
        for pattern, words in self.blocks:
            if match := pattern.match(path):
                return words.format(*match.groups())
        return None

    def tokens_of(self, path: str) -> str:
        """POSITIONS, TEXTS, JOINT or NEITHER."""
        return next(tokens for pattern, tokens in self.tokens if pattern.search(path))


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """A text encoder that takes adapters and learns words.

    part: before the dot of its layers' canonical names.  name: in embedding files, and in keys of the original layout.
    width: of a row of its token table.  projected: whether the projection of its summary is one of its weights.
    """

    part: str
    name: str
    width: int
    network: Network
    projected: bool = False

    @property
    def title(self) -> str:
        """As people write it: CLIP-L for clip_l."""
        return self.name.upper().replace("_", "-")


def _photos(class_word: str, count: int) -> list[str]:
    return [f"a photo of a {class_word}"] * count


def _none_unknown(_prompt: str, _triggers: Sequence[str]) -> list[str]:
    return []


def _people_write() -> Sequence[str]:
    from ..text.ordinary import CAPTIONS

    return CAPTIONS


@dataclass(frozen=True, eq=False)
class Family:
    """One model family.

    name: what concept files say.  title: what people read.
    modelspec: its name in Stability's model specification; implementation: what that asks its LoRAs to say.
    kohya_versions: how `ss_base_model_version` of its LoRAs begins.
    side: pixels of the picture that it draws best.
    text_encoders: those that learn words, in the order of a learned row's columns.
    readers: text encoders that learn none, and read the class word instead.
    token_norm: whether the length of CLIP-L's rows, which a training may hold words to, holds here.
    token_noise: how far from its class word a learned word starts, in standard deviations of the token table.
    lean: whether training runs the network's layers in less time and memory, rounded otherwise in the last digit.
    widths: input widths of the layers that adapters go to, the narrowest first, for people who choose a rank.
    prior_prompts(class word, count): what the base is asked for by itself to keep its prior.
    unknown_words(prompt, triggers): words that its text encoder cannot read.
    company(class word, count): phrases of who may stand beside a concept, whom the base draws well.
    ordinary(): captions as people write them, without any concept.
    """

    name: str
    title: str
    modelspec: str
    side: int
    denoiser: Network
    text_encoders: Sequence[TextEncoder]
    kohya_versions: Sequence[str] = ()
    implementation: str = "diffusers"
    readers: Sequence[str] = ()
    token_norm: bool = False
    token_noise: float = 0.1
    lean: bool = True
    widths: Sequence[int] = ()
    prior_prompts: Callable[[str, int], list[str]] = _photos
    unknown_words: Callable[[str, Sequence[str]], list[str]] = _none_unknown
    ordinary: Callable[[], Sequence[str]] = _people_write
    company: Callable[[str, int], list[str]] = subjects_beside

    @property
    def word_width(self) -> int:
        """Columns of a learned row: those of all text encoders side by side."""
        return sum(encoder.width for encoder in self.text_encoders)

    def network(self, part: str) -> Network | None:
        """The network whose layers' names begin with `part`, or None."""
        if part == "unet":
            return self.denoiser
        return next((encoder.network for encoder in self.text_encoders if encoder.part == part), None)
