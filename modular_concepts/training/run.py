"""The state of one training: all that changes while it goes on, hence all that a checkpoint holds."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapters import LowRank
from ..bases import OrthogonalBasis
from ..errors import AdapterError
from ..seeds import seeded
from ..tokens import new_token
from .methods import new_adapters
from .problem import Problem
from .settings import TrainSettings


@dataclass(frozen=True, eq=False)
class TrainResult:
    """What was learned, detached.  losses: one per step.  finished is False after a cancel or divergence."""

    layers: dict[str, LowRank]
    tokens: dict[str, Tensor]
    losses: list[float]
    step: int
    finished: bool
    settings: TrainSettings


class Shuffle:
    """Endless sequence of 0..count - 1, shuffled for each epoch; `pending` is what is left of it."""

    def __init__(self, count: int, generator: torch.Generator):
        self.count, self.generator = count, generator
        self.pending = torch.empty(0, dtype=torch.int64)

    def take(self, batch: int) -> Tensor:
        while len(self.pending) < batch:
            self.pending = torch.cat([self.pending, torch.randperm(self.count, generator=self.generator)])
        taken, self.pending = self.pending[:batch], self.pending[batch:]
        return taken


class Run:
    """Adapters, tokens, optimizer, generators, data order, step and losses of one training."""

    def __init__(self, problem: Problem, settings: TrainSettings, basis: OrthogonalBasis | None = None):
        basis = OrthogonalBasis() if basis is None else basis
        self.settings = settings
        self.adapters = new_adapters(problem.layers, settings, basis)
        self.tokens = {
            trigger: nn.Parameter(
                new_token(
                    start,
                    max(settings.token_vectors, len(start)),
                    settings.token_noise if len(start) == 1 else 0.0,
                    seeded(settings.seed, "token", trigger),
                )
            )
            for trigger, start in problem.triggers.items()
        }
        self.optimizer = self._new_optimizer()
        self.generators = {name: seeded(settings.seed, name) for name in ("order", "noise", "erasure")}
        self.orders = {"examples": Shuffle(len(problem.examples), self.generators["order"])}
        if problem.prior is not None:
            self.orders["prior"] = Shuffle(len(problem.prior), self.generators["order"])
        self.step = 0
        self.losses: list[float] = []
        self.smoothed_loss = 0.0
        self.identity = {
            "settings": settings.decisive(),
            "dataset": problem.dataset_identity(),
            "base": problem.base_hash,
            "basis": basis.identity,
            "frozen": _digest(self.adapters),
        }

    def parameters(self) -> dict[str, Tensor]:
        """Name -> trained tensor, adapters first; the optimizer holds exactly these."""
        factors = {
            f"adapters.{name}.{part}": factor
            for name, adapter in self.adapters.items()
            for part, factor in adapter.trainable().items()
        }
        return factors | {f"tokens.{trigger}": rows for trigger, rows in self.tokens.items()}

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
        for name, generator in self.generators.items():
            generator.set_state(state[f"generators.{name}"])
        for name, order in self.orders.items():
            pending = state[f"orders.{name}"]
            order.pending = pending[pending < order.count]

    def result(self, finished: bool) -> TrainResult:
        layers = {
            name: adapter.replace(
                lora_up=adapter.lora_up.detach().clone(), lora_down=adapter.lora_down.detach().clone()
            )
            for name, adapter in self.adapters.items()
        }
        tokens = {trigger: rows.detach().clone() for trigger, rows in self.tokens.items()}
        return TrainResult(layers, tokens, list(self.losses), self.step, finished, self.settings)

    def _new_optimizer(self) -> torch.optim.Optimizer:
        """AdamW with a group for each learning rate; only adapters decay."""
        factors = [factor for adapter in self.adapters.values() for factor in adapter.trainable().values()]
        adapter_lr, token_lr = self.settings.adapter_lr, self.settings.token_lr
        groups = [
            {"params": factors, "full_lr": adapter_lr, "weight_decay": self.settings.weight_decay},
            {"params": list(self.tokens.values()), "full_lr": token_lr, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        if not groups:
            raise AdapterError("there is nothing to train: no layer is chosen and no trigger word is given")
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)


def _digest(adapters: Mapping[str, LowRank]) -> str:
    """Short sha256 of all frozen factors."""
    digest = hashlib.sha256()
    for name, adapter in adapters.items():
        for part in adapter.frozen:
            factor = getattr(adapter, part).detach().cpu().contiguous()
            digest.update(name.encode() + factor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
