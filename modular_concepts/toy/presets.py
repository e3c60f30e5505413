"""The methods' presets at the rates of the toy base, which learns in fewer and larger steps than Stable Diffusion."""

from __future__ import annotations

from dataclasses import replace

from ..training.presets import Preset
from ..training.settings import TrainSettings

SETTINGS = TrainSettings(
    rank=8,
    steps=300,
    batch=6,
    adapter_lr=2e-4,
    token_lr=1e-2,
    token_vectors=4,
    token_noise=1.0,
    warmup=20,
    schedule="cosine",
    weight_decay=0.0,
)
# For a concept that starts from its class word alone, with nothing said of what it looks like.
UNDESCRIBED = replace(SETTINGS, steps=400, token_lr=3e-2, token_vectors=8)
USUAL_ADAPTER_LR, USUAL_TOKEN_LR = 1e-4, 1e-3
BLOCKS, PRIOR = 8, 48
ALONE = 10


def on_toy_base(preset: Preset, described: bool = False) -> Preset:
    """The same method with the demo's steps, batch, schedule and size of a word.

    Rates keep their proportions: what is 1e-4 and 1e-3 on Stable Diffusion is the demo's rate here, which the word's
    does not pass.  A word that does not learn leaves the whole identity to the layers, which then learn ten times as
    fast: at the usual rate nothing of it is learned here.  CLIP's bound on a word's length says nothing here.
    described: whether the word starts from a description; it then needs fewer and smaller steps.
    """
    usual, demo = preset.settings, SETTINGS if described else UNDESCRIBED
    faster = demo.adapter_lr / USUAL_ADAPTER_LR * (1 if usual.token_lr else ALONE)
    settings = replace(
        usual,
        rank=min(usual.rank, demo.rank),
        blocks=BLOCKS,
        steps=demo.steps,
        batch=demo.batch,
        adapter_lr=usual.adapter_lr * faster,
        text_encoder_lr=None if usual.text_encoder_lr is None else usual.text_encoder_lr * faster,
        token_lr=min(1.0, usual.token_lr / USUAL_TOKEN_LR) * demo.token_lr,
        token_vectors=demo.token_vectors,
        token_noise=demo.token_noise,
        token_norm=None,
        warmup=demo.warmup,
        schedule=demo.schedule,
        weight_decay=demo.weight_decay,
    )
    return replace(preset, settings=settings, prior=min(preset.prior, PRIOR))
