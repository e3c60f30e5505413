"""Merges that drop or outvote single weights: magnitude, DARE, TIES.  All work on whole deltas.

Doing this to lora_up and lora_down apart, as some tools do, leaves products of one concept's up with another's
down.  None of them keeps orthogonality: a delta with holes reads other directions than the delta did.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..seeds import seeded
from ..settings.merging import DENSITY
from .dense import MergedDense
from .method import LayerStack, Method

if TYPE_CHECKING:
    from jaxtyping import Float


def magnitude_merge(
    deltas: Sequence[Float[Tensor, "out inp *kernel"]], strengths: Sequence[float], density: float
) -> MergedDense:
    """sum_i strength_i trimmed(delta_i), where only the largest `density` share of each delta's weights stays."""
    parts = (s * trimmed(delta, density) for delta, s in zip(deltas, strengths, strict=True))
    return MergedDense(sum(parts, torch.zeros(())))


def dare_merge(
    deltas: Sequence[Float[Tensor, "out inp *kernel"]],
    strengths: Sequence[float],
    density: float,
    generators: Sequence[torch.Generator],
) -> MergedDense:
    """sum_i strength_i (mask_i * delta_i) / density, mask_i Bernoulli(density), one generator for each delta.

    Source: Yu et al. 2024 (DARE, with task arithmetic).
    """
    DENSITY.check(density)
    total = torch.zeros_like(deltas[0])
    for delta, strength, generator in zip(deltas, strengths, generators, strict=True):
        stays = torch.rand(delta.shape, generator=generator) < density
        total += strength * delta * stays.to(delta) / density
    return MergedDense(total)


def ties_merge(
    deltas: Sequence[Float[Tensor, "out inp *kernel"]], strengths: Sequence[float], density: float
) -> MergedDense:
    """Trim, elect a sign for each weight, average what agrees with it.

    sign = sign(sum_i strength_i trimmed_i); delta = sum of the strength_i trimmed_i of that sign / how many there are.
    Source: Yadav et al. 2023 (TIES), with each summand times its strength.
    """
    parts = torch.stack([s * trimmed(delta, density) for delta, s in zip(deltas, strengths, strict=True)])
    elected = parts.sum(0).sign()
    agreeing = (parts.sign() == elected) & (parts != 0)
    return MergedDense((parts * agreeing).sum(0) / agreeing.sum(0).clamp(min=1))


def trimmed(delta: Float[Tensor, "*shape"], density: float) -> Float[Tensor, "*shape"]:
    """The delta with all but its largest weights (by magnitude) at 0; density 1 keeps all.

    At least one weight stays; of weights that are equally large, all stay.
    """
    DENSITY.check(density)
    count = max(1, round(density * delta.numel()))
    threshold = delta.abs().flatten().kthvalue(delta.numel() - count + 1).values
    return torch.where(delta.abs() >= threshold, delta, torch.zeros_like(delta))


def _compute_deltas(stack: LayerStack, how: str) -> list[Tensor]:
    stack.check_room(how, whole=True)
    return [adapter.delta().detach() for adapter in stack.adapters]


def _merge_by_magnitude(stack: LayerStack) -> MergedDense:
    return magnitude_merge(_compute_deltas(stack, "magnitude"), stack.strengths, stack.options.density)


def _merge_by_dare(stack: LayerStack) -> MergedDense:
    generators = [seeded(stack.options.seed, "dare", name, stack.layer) for name in stack.names]
    return dare_merge(_compute_deltas(stack, "dare"), stack.strengths, stack.options.density, generators)


def _merge_by_ties(stack: LayerStack) -> MergedDense:
    return ties_merge(_compute_deltas(stack, "ties"), stack.strengths, stack.options.density)


MAGNITUDE = Method("magnitude", _merge_by_magnitude)
DARE = Method("dare", _merge_by_dare)
TIES = Method("ties", _merge_by_ties)
