"""The state of one training: all that changes while it goes on, hence all that a checkpoint holds."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..adapters.basis import OrthogonalBasis
from ..adapters.low_rank import LowRank
from ..adapters.own_words import METHOD as OWN_WORDS
from ..adapters.own_words import WordResidual
from ..seeds import seeded
from ..storage.safetensors import tensor_bytes
from .methods import new_adapters, new_words
from .optimizers import new_optimizer
from .precision import LossScale
from .problem import Problem
from .settings import TrainSettings
from .shuffle import Shuffle

PURPOSES = ("order", "noise", "erasure", "flip", "captions", "company")  # what a run may have a generator for


@dataclass(frozen=True, eq=False)
class TrainResult:
    """What was learned, detached.  losses: one per step.  finished is False after a cancel or divergence."""

    layers: dict[str, LowRank]
    tokens: dict[str, Tensor]
    losses: list[float]
    step: int
    finished: bool
    settings: TrainSettings


class Run:
    """Adapters, tokens, optimizer, generators, data order, step and losses of one training."""

    def __init__(self, problem: Problem, settings: TrainSettings, basis: OrthogonalBasis | None = None):
        basis = OrthogonalBasis() if basis is None else basis
        problem.check(settings)
        self.id = secrets.token_hex(16)
        self.settings = settings
        self.adapters = new_adapters(problem.layers, settings, basis)
        self.tokens = new_words(problem.triggers, settings, problem.base.cross_attention_layers)
        self.optimizer = new_optimizer(settings, self.adapters, self.tokens)
        self.generators = {name: seeded(settings.seed, name) for name in _purposes(settings)}
        parts = {"examples": problem.examples} | ({} if problem.prior is None else {"prior": problem.prior})
        self.orders = {
            name: Shuffle(part.entries(), self.generators["order"], part.groups(), settings.batch)
            for name, part in parts.items()
        }
        self.loss_scale = LossScale() if settings.precision == "fp16" else None
        self.step = 0
        self.losses: list[float] = []
        self.smoothed_loss = 0.0
        self.identity = {
            "settings": settings.decisive(),
            "dataset": problem.dataset_identity(),
            "base": problem.base.hash,
            "basis": basis.identity,
            "frozen": _digest(self.adapters),
            "words": _digest_of_words(problem.triggers),
        }
        if problem.company is not None and settings.company:
            self.identity["company"] = problem.company.fingerprint

    def parameters(self) -> dict[str, Tensor]:
        """Name -> trained tensor, adapters first; the optimizer holds exactly these."""
        factors = {
            f"adapters.{name}.{part}": factor
            for name, adapter in self.adapters.items()
            for part, factor in adapter.trainable().items()
        }
        return factors | {f"tokens.{trigger}": rows for trigger, rows in self.tokens.items()}

    @cached_property
    def by_word(self) -> tuple[WordResidual, ...]:
        """The adapters as what acts at the concept's own words alone; empty where they act everywhere."""
        if self.settings.method != OWN_WORDS or not self.adapters:
            return ()
        return (WordResidual(self.settings.name, tuple(self.tokens), self.adapters),)

    def record(self, loss: float) -> None:
        """One step is done; its loss joins the list and the smoothed loss (exponential, 20 steps)."""
        self.smoothed_loss = loss if not self.losses else 0.95 * self.smoothed_loss + 0.05 * loss
        self.losses.append(loss)
        self.step += 1

    def random_state(self) -> dict[str, Tensor]:
        """Generators (uint8) and data order (int64)."""
        states = {f"generators.{name}": generator.get_state() for name, generator in self.generators.items()}
        return states | {f"orders.{name}": order.pending for name, order in self.orders.items()}

    def set_random_state(self, state: Mapping[str, Tensor]) -> None:
        """What the state does not know, of an option that was off, stays as it is."""
        for name, generator in self.generators.items():
            if f"generators.{name}" in state:
                generator.set_state(state[f"generators.{name}"])
        for name, order in self.orders.items():
            if f"orders.{name}" in state:
                order.set_pending(state[f"orders.{name}"])

    def result(self, finished: bool) -> TrainResult:
        layers = {
            name: adapter.replace(
                lora_up=adapter.lora_up.detach().clone(), lora_down=adapter.lora_down.detach().clone()
            )
            for name, adapter in self.adapters.items()
        }
        tokens = {trigger: rows.detach().clone() for trigger, rows in self.tokens.items()}
        return TrainResult(layers, tokens, list(self.losses), self.step, finished, self.settings)


def _purposes(settings: TrainSettings) -> list[str]:
    """What there is a generator for; an option that is off draws nothing."""
    captions = settings.caption_dropout or settings.shuffle_tags
    options = {"flip": settings.flip, "captions": captions, "company": settings.company}
    return ["order", "noise", "erasure", *(name for name, on in options.items() if on)]


def _digest_of_words(triggers: Mapping[str, Tensor]) -> str:
    """Short sha256 of what each trigger word starts from."""
    digest = hashlib.sha256()
    for word, rows in triggers.items():
        digest.update(f"{word} {tuple(rows.shape)}".encode() + tensor_bytes(rows.float()))
    return digest.hexdigest()[:16]


def _digest(adapters: Mapping[str, LowRank]) -> str:
    """Short sha256 of all frozen factors."""
    digest = hashlib.sha256()
    for name, adapter in adapters.items():
        for part in adapter.frozen:
            factor = getattr(adapter, part).detach().cpu().contiguous()
            digest.update(name.encode() + factor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
