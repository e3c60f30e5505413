"""All that a person can choose about a training, with the learning-rate schedule that follows from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from ..choices import LAYOUTS
from ..errors import AdapterError

METHODS = ("lora", "orthogonal", "block", "block_orthogonal", "custom_diffusion", "words")
SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = ("fp32", "bf16", "fp16")
OPTIMIZERS = ("adamw", "adamw8bit")
TOKEN_STARTS = ("words", "random + class")
WITHOUT_EFFECT_ON_RESULT = ("checkpoint_every", "keep_checkpoints", "gradient_checkpointing")


@dataclass(frozen=True)
class TrainSettings:
    """Settings of one concept's training; JSON-able.  Raises AdapterError for values that cannot work.

    method: lora, orthogonal, block, block_orthogonal (adapters/low_rank.py); custom_diffusion trains the layers' whole
    weights, words only the learned word.  alpha None means alpha = rank.
    slot: the concept's own basis columns and rows; without one, orthogonal columns follow from `name`.
    adapter_lr, text_encoder_lr: step size of the layers; the text encoder's own, None is the same for all.
    blocks, layout: row blocks of the block methods.  erasure: BlockLoRA's probability to erase an output row.
    token_norm: learned rows longer than this are scaled back to it (ED-LoRA stops at 0.55); None is no bound.
    token_vectors: at least so many vectors for a new token; one that starts from more words has one for each.
    token_noise: noise on a new token that starts from a single row, so that its vectors differ; relative to its size.
    token_start: "random + class" (ED-LoRA) starts the first vector from N(0, 0.013^2), the others from the class word.
    layerwise: the learned word has rows of its own for each cross-attention layer (P+).
    warmup: steps in which the learning rates rise linearly; `schedule` then takes them to 0, or keeps them.
    min_snr: gamma of the min-SNR weight, None weighs all timesteps alike.  clip_norm 0 is no clipping.
    attention_regularisation: weight of Mix-of-Show's term that keeps the word's attention inside the masks.
    caption_dropout: probability that a caption is empty for a step.  shuffle_tags: parts of a caption between commas
    change places, but for the first.  flip: half of the pictures are mirrored.
    optimizer: adamw, or adamw8bit of bitsandbytes.  precision: what the base computes in; fp16 scales the loss.
    gradient_checkpointing: blocks of the base are computed again in backward instead of kept; the same gradients.
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
    text_encoder_lr: float | None = None
    token_lr: float = 1e-3
    token_vectors: int = 2
    token_noise: float = 0.1
    token_norm: float | None = None
    token_start: str = "words"  # noqa: S105
    layerwise: bool = False
    warmup: int = 0
    schedule: str = "constant"
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    noise_offset: float = 0.0
    min_snr: float | None = None
    attention_regularisation: float = 0.0
    prior_weight: float = 1.0
    caption_dropout: float = 0.0
    shuffle_tags: bool = False
    flip: bool = False
    optimizer: str = "adamw"
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    checkpoint_every: int = 0
    keep_checkpoints: int = 2

    def __post_init__(self):
        for name, choices in (
            ("method", METHODS),
            ("layout", LAYOUTS),
            ("schedule", SCHEDULES),
            ("precision", PRECISIONS),
            ("optimizer", OPTIMIZERS),
            ("token_start", TOKEN_STARTS),
        ):
            if getattr(self, name) not in choices:
                raise AdapterError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")
        for name in ("rank", "blocks", "steps", "batch", "token_vectors", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise AdapterError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name, most in AT_MOST.items():
            if getattr(self, name) > most:
                raise AdapterError(f"{name} is {getattr(self, name)}; it can be at most {most}")
        for name in NOT_NEGATIVE:
            if not 0 <= getattr(self, name) < math.inf:
                raise AdapterError(f"{name} is {getattr(self, name)}; it must be 0 or a positive number")
        for name in ("text_encoder_lr", "min_snr", "token_norm"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise AdapterError(f"{name} is {getattr(self, name)}; it must be positive, or left out")
        if self.alpha is not None and not 0 < abs(self.alpha) <= MOST_ALPHA:
            raise AdapterError(
                f"alpha is {self.alpha:g}; with 0 nothing is learned, so give another number, at most {MOST_ALPHA:g}"
            )
        for name, left in (("erasure", "nothing is left to train"), ("caption_dropout", "the word is never learned")):
            if not getattr(self, name) < 1:
                raise AdapterError(f"{name} is {getattr(self, name)}; it must be below 1, or {left}")
        for name in SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise AdapterError(f"{name} is {getattr(self, name)!r}; it must be true or false")
        if self.method == "words" and self.erasure:
            raise AdapterError(f"erasure is {self.erasure}, but method words trains no layer; leave it at 0")

    def decisive(self) -> dict:
        """The settings that decide the result; a resumed training must find them unchanged."""
        return {key: value for key, value in asdict(self).items() if key not in WITHOUT_EFFECT_ON_RESULT}


# What no training gets by, in time, memory or the numbers that seed a generator.
AT_MOST = {
    "rank": 65_536,
    "blocks": 65_536,
    "steps": 10_000_000,
    "batch": 65_536,
    "seed": 2**63 - 1,
    "token_vectors": 64,  # as many as a concept file can hold, and nearly all that a text model reads
    "warmup": 10_000_000,
    "checkpoint_every": 10_000_000,
    "keep_checkpoints": 1_000_000,
    "noise_offset": 10.0,  # the noise itself is 1
    "token_noise": 100.0,
    "weight_decay": 100.0,
    "prior_weight": 1e6,
}
MOST_ALPHA = 1e6
SWITCHES = ("layerwise", "shuffle_tags", "flip", "gradient_checkpointing")
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
    "attention_regularisation",
    "caption_dropout",
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
