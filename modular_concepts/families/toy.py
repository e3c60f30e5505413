"""The toy base: SD 1.x's U-Net, narrow, with a vocabulary of its own."""

from __future__ import annotations

from collections.abc import Sequence

from .clip_text import CLIP_TEXT
from .family import Family, TextEncoder
from .unet import UNET


def _prior_prompts(class_word: str, count: int) -> list[str]:
    from ..toy.captions import prior_prompts

    return prior_prompts(class_word, count)


def _company(class_word: str, count: int) -> list[str]:
    from ..toy.captions import company

    return company(class_word, count)


def _unknown_words(prompt: str, triggers: Sequence[str]) -> list[str]:
    from ..toy.captions import unknown_words

    return unknown_words(prompt, triggers)


def _ordinary() -> Sequence[str]:
    from ..toy.captions import ordinary_captions

    return ordinary_captions()


TOY = Family(
    name="toy",
    title="the toy base",
    modelspec="modular-concepts-toy",
    side=32,
    denoiser=UNET,
    text_encoders=(TextEncoder("text_encoder", "clip_l", 64, CLIP_TEXT),),
    token_noise=1.0,  # its words lie close together; a new one needs a place of its own
    lean=False,  # its published figures keep plain autograd's rounding
    widths=(64, 128, 256, 512),
    prior_prompts=_prior_prompts,
    unknown_words=_unknown_words,
    ordinary=_ordinary,
    company=_company,
)
