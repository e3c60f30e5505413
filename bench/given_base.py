"""A base to train on whose parts are given one by one, for networks that no loader knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from modular_concepts.models.cross_attention import CrossAttention
from modular_concepts.models.schedules import Schedule
from modular_concepts.training.problem import Problem


@dataclass(frozen=True, eq=False)
class GivenBase:
    """What a training asks of a `Base` (`modular_concepts/models/base.py`).

    denoiser: the network that `predict` runs, for gradient checkpointing; None: all of `modules`.
    attentions: what `cross_attentions` gives.
    """

    predict: Callable[[Tensor, Tensor, Any], Tensor]
    context: Callable[[Sequence[str], Mapping[str, Tensor]], Any]
    schedule: Schedule
    modules: Sequence[nn.Module] = ()
    hash: str = ""
    cross_attention_layers: int = 0
    denoiser: nn.Module | None = None
    lean: bool = False
    attentions: Sequence[CrossAttention] = ()
    trigger_positions: Callable[[Sequence[str], Mapping[str, Tensor]], Tensor] | None = None
    word_places: Callable[[str, Mapping[str, Tensor]], dict[str, list[int]]] | None = None

    def cross_attentions(self) -> list[CrossAttention]:
        return list(self.attentions)


def with_base(problem: Problem, **changes: object) -> Problem:
    """The problem on a base with other parts; further fields of the problem itself go by their own names."""
    parts = {name: changes.pop(name) for name in list(changes) if name in GivenBase.__dataclass_fields__}
    return replace(problem, base=replace(problem.base, **parts), **changes)
