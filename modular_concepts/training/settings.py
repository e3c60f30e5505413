"""All that a person can choose about a training, with the learning-rate schedule that follows from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from ..adapters import KINDS, LAYOUTS
from ..errors import AdapterError

SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = ("fp32", "bf16")
WITHOUT_EFFECT_ON_RESULT = ("checkpoint_every", "keep_checkpoints")


@dataclass(frozen=True)
class TrainSettings:
    """Settings of one concept's training; JSON-able.  Raises AdapterError for values that cannot work.

    method: lora, orthogonal, block, block_orthogonal (adapters.py).  alpha None means alpha = rank.
    slot: the concept's own basis columns and rows; without one, orthogonal columns follow from `name`.
    blocks, layout: row blocks of the block methods.  erasure: BlockLoRA's probability to erase an output row.
    token_norm: learned rows longer than this are scaled back to it (ED-LoRA stops at 0.55); None is no bound.
    token_vectors: at least so many vectors for a new token; one that starts from more words has one for each.
    token_noise: noise on a new token that starts from a single row, so that its vectors differ; relative to its size.
    warmup: steps in which the learning rates rise linearly; `schedule` then takes them to 0, or keeps them.
    min_snr: gamma of the min-SNR weight, None weighs all timesteps alike.  clip_norm 0 is no clipping.
    """

    method: str = "orthogonal"
    rank: int = 20
    alpha: float | None = None
    slot: int | None = None
    name: str = ""
    blocks: int = 15
    layout: str = "contiguous"
    erasure: float = 0.0
    steps: int = 500
    batch: int = 4
    seed: int = 0
    adapter_lr: float = 1e-4
    token_lr: float = 1e-3
    token_vectors: int = 2
    token_noise: float = 0.1
    token_norm: float | None = None
    warmup: int = 0
    schedule: str = "constant"
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    noise_offset: float = 0.0
    min_snr: float | None = None
    prior_weight: float = 1.0
    precision: str = "fp32"
    checkpoint_every: int = 0
    keep_checkpoints: int = 2

    def __post_init__(self):
        for name, choices in (
            ("method", KINDS),
            ("layout", LAYOUTS),
            ("schedule", SCHEDULES),
            ("precision", PRECISIONS),
        ):
            if getattr(self, name) not in choices:
                raise AdapterError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")
        for name in ("rank", "blocks", "steps", "batch", "token_vectors", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise AdapterError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in NOT_NEGATIVE:
            if not 0 <= getattr(self, name) < math.inf:
                raise AdapterError(f"{name} is {getattr(self, name)}; it must be 0 or a positive number")
        for name in ("min_snr", "token_norm"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise AdapterError(f"{name} is {getattr(self, name)}; it must be positive, or left out")
        if not self.erasure < 1:
            raise AdapterError(f"erasure is {self.erasure}; it must be below 1, or nothing is left to train")

    def decisive(self) -> dict:
        """The settings that decide the result; a resumed training must find them unchanged."""
        return {key: value for key, value in asdict(self).items() if key not in WITHOUT_EFFECT_ON_RESULT}


NOT_NEGATIVE = (
    "erasure",
    "seed",
    "adapter_lr",
    "token_lr",
    "token_noise",
    "warmup",
    "weight_decay",
    "clip_norm",
    "noise_offset",
    "prior_weight",
    "checkpoint_every",
)


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
    """Plain words for each setting that differs: 'rank was 4, is now 8'."""
    return [
        f"{key} was {before.get(key)}, is now {now.get(key)}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
