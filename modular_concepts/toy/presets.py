"""The methods' presets at the rates of the toy base, which learns in fewer and larger steps than Stable Diffusion."""

from __future__ import annotations

from dataclasses import replace

from ..training.presets import Preset
from .demo import SETTINGS, UNDESCRIBED

ADAPTER_RATE, TOKEN_RATE = 2.0, 10.0
LARGEST_TOKEN_RATE = UNDESCRIBED.token_lr
RANK, BLOCKS, PRIOR = SETTINGS.rank, 8, 48


def on_toy_base(preset: Preset) -> Preset:
    """The same method at the demo's steps, batch and schedule.

    Rates keep their proportions: the demo's are twice and ten times the usual 1e-4 and 1e-3.  CLIP's bound on a
    word's length says nothing here.
    """
    own = preset.settings
    settings = replace(
        own,
        rank=min(own.rank, RANK),
        blocks=BLOCKS,
        steps=UNDESCRIBED.steps,
        batch=UNDESCRIBED.batch,
        adapter_lr=own.adapter_lr * ADAPTER_RATE,
        text_encoder_lr=None if own.text_encoder_lr is None else own.text_encoder_lr * ADAPTER_RATE,
        token_lr=min(own.token_lr * TOKEN_RATE, LARGEST_TOKEN_RATE),
        token_norm=None,
        warmup=UNDESCRIBED.warmup,
        schedule=UNDESCRIBED.schedule,
        weight_decay=UNDESCRIBED.weight_decay,
    )
    return replace(preset, settings=settings, prior=min(preset.prior, PRIOR))
