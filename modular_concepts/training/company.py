"""Company: wide canvases with the concept in one half, and in the other somebody else, whom the base itself drew.

A word that was only ever learned from pictures of its subject alone takes every place of a picture that it is asked to
share. Here its caption names two ("a <tom> and a dog on the beach", in the order of their places), the loss covers both
halves, and half of the time they change sides; so that the word learns where it ends, and the rest stays the base's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import AdapterError
from ..models.base import Base
from ..settings.training import COMPANY_PICTURES
from ..text.company import Phrased, phrased
from ..text.triggers import replaced
from .drawn import Prior, drawn_latents, drawn_pictures, fingerprint_of, how_drawn


@dataclass(frozen=True)
class Mate:
    """Who is in a picture of the company ("a dog"), and in which surroundings: what captions have before and after."""

    phrase: str
    before: str
    after: str


@dataclass(frozen=True, eq=False)
class Company:
    """Pictures of others, for the other half of wide canvases.

    latents: height of a latent -> (N, C, ..., height, width); mates: who is in each of the N.
    captions: each caption of the concept, with the place of its phrase.
    fingerprint: of how they were drawn.
    """

    latents: Mapping[int, Tensor]
    mates: Sequence[Mate]
    captions: Mapping[str, Phrased]
    fingerprint: str

    def check(self, latents: Tensor | Sequence[Tensor], captions: Sequence[str]) -> None:
        """Raise AdapterError unless there is company for each of a concept's pictures."""
        like = next(iter(self.latents.values()))[0]
        if any(math.prod(latent.shape[1:-2]) > 1 for latent in (*latents, like)):
            raise AdapterError("company stands beside pictures, and these are several frames each; set company to 0")
        if any(latent.shape[:-2] != like.shape[:-2] for latent in latents):
            raise AdapterError(
                f"company has latents of {like.shape[0]} channels, the concept's pictures {latents[0].shape[0]}; "
                "draw it with the base that is trained"
            )
        heights = {latent.shape[-2] for latent in latents}
        if not heights <= set(self.latents) or not set(captions) <= set(self.captions):
            raise AdapterError("company was drawn for other pictures or captions than these; draw it anew")

    def invited(self, caption: str) -> list[int]:
        """Numbers of those drawn in a caption's own surroundings, or of all where there is none."""
        parts = self.captions[caption]
        place = parts.before, parts.after
        alike = [number for number, mate in enumerate(self.mates) if (mate.before, mate.after) == place]
        return alike or list(range(len(self.mates)))

    def caption(self, caption: str, number: int, left: bool) -> str:
        """What is said of a canvas; left: whether the concept has the left half."""
        return self.captions[caption].beside(self.mates[number].phrase, left)


def joined(concept: Tensor, other: Tensor, left: Tensor) -> Tensor:
    """Wide canvases: (B, C, ..., H, W) and (B, C, ..., H, V) -> (B, C, ..., H, W + V).

    left: (B,) bool, whether the concept has the left half.
    Exact where a latent is pixels, as the toy base's.  A VAE's cell sees a little of its neighbours, which at the seam
    are others than in a picture that is encoded whole; near enough, for the seam is one cell wide.
    """
    sides = zip(concept, other, left.tolist(), strict=True)
    return torch.stack([torch.cat((one, two) if first else (two, one), dim=-1) for one, two, first in sides])


def canvases_of(batch: int) -> int:
    """How many canvases take the place of a batch of pictures: half as many, for they are twice as wide."""
    return max(1, batch // 2)


def check_reach(base: Base, captions: Sequence[str], class_word: str, tokens: Mapping[str, Tensor]) -> None:
    """Raise AdapterError for a caption that is so long that its word would be cut off with somebody before it."""
    (trigger,) = tokens
    longest = max(base.company(class_word, COMPANY_PICTURES.default), key=len)
    texts = list(dict.fromkeys(captions))
    beside = [phrased(text, trigger, class_word).beside(longest, left=False) for text in texts]
    alone, both = (base.trigger_positions(each, tokens).ge(0).all(dim=1).tolist() for each in (texts, beside))
    for text, fits, fits_beside in zip(texts, alone, both, strict=True):
        if fits and not fits_beside:
            raise AdapterError(
                f"caption {text!r} is too long for company: with {longest} before it, {trigger} stands beyond what the "
                "text model reads; shorten it, or set company to 0"
            )


def company_for(
    base: Base,
    captions: Sequence[str],
    trigger: str,
    drawing: Prior,
    heights: Collection[int],
    callback: Callable[[int, int], None] | None = None,
    cache: Path | None = None,
) -> Company:
    """Draw company for a concept's captions, in the surroundings that they name.

    heights: of the concept's pictures, in pixels; the drawn ones are scaled to each that there is.
    cache: a folder to keep them in, as latents; the next training draws none.
    """
    parts = {caption: phrased(caption, trigger, drawing.class_word) for caption in captions}
    mates = _invite(list(parts.values()), base.company(drawing.class_word, drawing.count))
    prompts = [replaced(Phrased(mate.before, "", mate.after).of(mate.phrase), {trigger: mate.phrase}) for mate in mates]
    sizes = [_scaled(drawing.size(base), height, base.multiple) for height in sorted(set(heights))]

    def draw_anew() -> list[Tensor]:
        pictures = drawn_pictures(base, drawing, prompts, callback)
        return [latent for size in sizes for latent in base.encode(_resized(pictures, size))]

    made = f"company {how_drawn(base, drawing, prompts)} {sizes}"
    latents = drawn_latents(base, made, [size for size in sizes for _ in mates], draw_anew, cache)
    groups = [torch.stack(latents[first : first + len(mates)]) for first in range(0, len(latents), len(mates))]
    return Company({group.shape[-2]: group for group in groups}, mates, parts, fingerprint_of(made))


def _invite(captions: Sequence[Phrased], phrases: Sequence[str]) -> list[Mate]:
    """The same number of them in all surroundings that the captions name."""
    surroundings = list(dict.fromkeys((caption.before, caption.after) for caption in captions))
    places = [surroundings[number * len(surroundings) // len(phrases)] for number in range(len(phrases))]
    return [Mate(phrase, *place) for phrase, place in zip(phrases, places, strict=True)]


def _scaled(size: tuple[int, int], height: int, multiple: int) -> tuple[int, int]:
    """(height, width) of about the same aspect."""
    return height, max(1, round(size[1] * height / size[0] / multiple)) * multiple


def _resized(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(pictures.shape[-2:]) == size:
        return pictures
    return F.interpolate(pictures, size=size, mode="bicubic", antialias=True).clamp(0, 1)
