"""All that a person can choose about a training, with the learning-rate schedule that follows from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from ..errors import AdapterError
from ..settings import training as declared
from ..settings.training import TRAINING

METHODS = declared.METHOD.choices
WITHOUT_EFFECT_ON_RESULT = ("checkpoint_every", "keep_checkpoints", "gradient_checkpointing")


@dataclass(frozen=True)
class TrainSettings:
    """Settings of one concept's training; JSON-able.  Raises AdapterError for values that cannot work.

    Each is declared in `settings/training.py`, with what it is, what it may be and how shell and nodes call it;
    docs/settings.md lists them.  name: the concept's; without a slot, orthogonal columns follow from it.
    """

    method: str = declared.METHOD.default
    rank: int = declared.RANK.default
    alpha: float | None = declared.ALPHA.default
    slot: int | None = declared.SLOT.default
    name: str = ""
    blocks: int = declared.BLOCKS.default
    layout: str = declared.LAYOUT.default
    erasure: float = declared.ERASURE.default
    steps: int = declared.STEPS.default
    batch: int = declared.BATCH.default
    seed: int = declared.SEED.default
    adapter_lr: float = declared.ADAPTER_LR.default
    text_encoder_lr: float | None = declared.TEXT_ENCODER_LR.default
    token_lr: float = declared.TOKEN_LR.default
    token_vectors: int = declared.TOKEN_VECTORS.default
    token_noise: float = declared.TOKEN_NOISE.default
    token_norm: float | None = declared.TOKEN_NORM.default
    token_start: str = declared.TOKEN_START.default
    layerwise: bool = declared.LAYERWISE.default
    warmup: int = declared.WARMUP.default
    schedule: str = declared.SCHEDULE.default
    weight_decay: float = declared.WEIGHT_DECAY.default
    clip_norm: float = declared.CLIP_NORM.default
    noise_offset: float = declared.NOISE_OFFSET.default
    min_snr: float | None = declared.MIN_SNR.default
    attention_regularisation: float = declared.ATTENTION_REGULARISATION.default
    prior_weight: float = declared.PRIOR_WEIGHT.default
    caption_dropout: float = declared.CAPTION_DROPOUT.default
    shuffle_tags: bool = declared.SHUFFLE_TAGS.default
    flip: bool = declared.FLIP.default
    optimizer: str = declared.OPTIMIZER.default
    precision: str = declared.PRECISION.default
    gradient_checkpointing: bool = declared.GRADIENT_CHECKPOINTING.default
    checkpoint_every: int = declared.CHECKPOINT_EVERY.default
    keep_checkpoints: int = declared.KEEP_CHECKPOINTS.default
    company: float = declared.COMPANY.default

    def __post_init__(self):
        for name, setting in TRAINING.items():
            setting.check(getattr(self, name))
        if self.method == "words" and self.erasure:
            raise AdapterError(f"erasure is {self.erasure}, but method words trains no layer; leave it at 0")
        if self.method == "own_words" and self.erasure:
            raise AdapterError(
                f"erasure is {self.erasure}, but at their own words concepts need no rows of their own; leave it at 0"
            )

    def decisive(self) -> dict:
        """The settings that decide the result; a resumed training must find them unchanged."""
        return {key: value for key, value in asdict(self).items() if key not in WITHOUT_EFFECT_ON_RESULT}


def learning_rate_factor(step: int, settings: TrainSettings) -> float:
    """What both learning rates are multiplied by at `step` (counted from 0): warm-up, then the schedule."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    passed = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    if settings.schedule == "linear":
        return 1 - passed
    if settings.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * passed))
    return 1.0


def changes(before: Mapping, now: Mapping) -> list[str]:
    """Plain words for each setting that differs: 'rank was 4, is now 8'.

    A setting that is not in one of them is from a version that did not have it: it counts as its default.
    """
    defaults = {field.name: field.default for field in fields(TrainSettings)}
    before, now = defaults | dict(before), defaults | dict(now)
    return [
        f"{key} was {before.get(key)}, is now {now.get(key)}"
        for key in sorted(before | now)
        if before.get(key) != now.get(key)
    ]
