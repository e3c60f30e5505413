"""Sums of low-rank residuals, exact: one pair of matrices per layer, no SVD.  Po et al. 2024, Eq. 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..adapters import ConvGeometry, LowRank, at_least_float32, low_rank_product, scatter_rows
from ..errors import AdapterError


@dataclass(frozen=True, eq=False)
class MergedLayer:
    """delta = up down: several adapters as one.  Strength and scale are inside `up`, and nowhere else.

    up: (out, R) or (len(rows), R); down: (R, in) or (R, in / groups, kh, kw); R is the sum of the ranks.
    """

    up: Tensor
    down: Tensor
    rows: Tensor | None
    out_features: int

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MergedLayer:
        rows = None if self.rows is None else self.rows.to(device=device)
        up, down = (factor.to(device=device, dtype=dtype) for factor in (self.up, self.down))
        return replace(self, up=up, down=down, rows=rows)

    def delta(self) -> Tensor:
        """The weight-shaped sum, float32, or float64 if the factors are."""
        product = at_least_float32(self.up) @ at_least_float32(self.down).flatten(1)
        full = scatter_rows(product, self.rows, self.out_features, dim=0)
        return full.unflatten(1, self.down.shape[1:])

    def residual(self, x: Tensor, conv: ConvGeometry | None = None) -> Tensor:
        """What the sum adds to the layer's output, in x.dtype; shapes as `LowRank.residual`."""
        return low_rank_product(x, self.up, self.down, conv, self.rows, self.out_features)

    def as_low_rank(self) -> LowRank:
        """The same as one adapter of rank R and scale 1, for export: stock loaders read it as they are."""
        up = scatter_rows(self.up, self.rows, self.out_features, dim=0)
        return LowRank(up, self.down, float(self.rank), "lora", None, self.out_features)


def merged_factors(adapters: Sequence[LowRank], strengths: Sequence[float]) -> MergedLayer:
    """Concatenate factors: up = [s1 U1 | s2 U2 | ...], down = [D1; D2; ...]; s = strength alpha / rank.

    adapters: of one layer; ranks may differ; float32 or more, on the first one's device; detached.
    Blocks join with zero rows around them, unless all write the same rows.
    Adapters of strength 0 take no part; if all are 0 the delta is exactly zero.
    """
    used = [pair for pair in zip(adapters, strengths, strict=True) if pair[1] != 0] or [(adapters[0], 0.0)]
    first, device = adapters[0], adapters[0].lora_up.device
    rows = first.rows if all(_same_rows(first, adapter) for adapter, _ in used) else None
    ups = [(a.full_up() if rows is None else a.lora_up) for a, _ in used]
    ups = [_plain(up, device) * (s * a.scale) for up, (a, s) in zip(ups, used, strict=True)]
    downs = [_plain(adapter.lora_down, device) for adapter, _ in used]
    up, down = _common_dtype(ups), _common_dtype(downs)
    return MergedLayer(torch.cat(up, dim=1), torch.cat(down), rows, first.out_features)


def merged_delta(adapters: Sequence[LowRank], strengths: Sequence[float]) -> Tensor:
    """Sum low-rank residuals in one product: delta = [s1 U1 | s2 U2 | ...] [D1; D2; ...].

    Returns the weight-shaped delta in float32 (or float64).  Exact: no SVD, ranks may differ.
    Source: Po et al. 2024, Eq. 1 (strengths are the paper's lambda).
    """
    return merged_factors(adapters, strengths).delta()


def mean_strengths(strengths: Sequence[float]) -> list[float]:
    """FedAvg: strength_i / N over all N concepts, those of strength 0 included."""
    return [strength / len(strengths) for strength in strengths]


def average_strengths(strengths: Sequence[float]) -> list[float]:
    """Mix-of-Show's weighted average: strength_i / sum; all zero stays zero.  AdapterError for a sum <= 0."""
    total = sum(strengths)
    if not any(strengths):
        return list(strengths)
    if total <= 0:
        raise AdapterError(f"the strengths add up to {total:g}; to scale them to 1 the sum must be above 0")
    return [strength / total for strength in strengths]


def _same_rows(first: LowRank, second: LowRank) -> bool:
    if first.rows is None or second.rows is None:
        return first.rows is second.rows
    return torch.equal(first.rows.cpu(), second.rows.cpu())


def _plain(factor: Tensor, device: torch.device) -> Tensor:
    return at_least_float32(factor.detach().to(device))


def _common_dtype(factors: Sequence[Tensor]) -> list[Tensor]:
    dtype = torch.float64 if any(factor.dtype == torch.float64 for factor in factors) else torch.float32
    return [factor.to(dtype) for factor in factors]
