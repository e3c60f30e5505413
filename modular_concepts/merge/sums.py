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

    def add_to(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """weight + strength delta, written into `weight` and nowhere else: one product, and of its own rows only.

        weight: weight-shaped, on the factors' device; the one function here that changes what it is given.
        Only a weight in less than the factors' precision, or one that does not lie in order, costs a delta beside it.
        """
        if weight.dtype != self.up.dtype or self.down.dtype != self.up.dtype or not weight.is_contiguous():
            return weight.add_(self.delta().reshape(weight.shape).to(weight.dtype), alpha=strength)
        flat, down = weight.flatten(1), self.down.flatten(1)
        run = slice(None) if self.rows is None else _run(self.rows)
        if run is None:
            flat.index_add_(0, self.rows, self.up @ down, alpha=strength)
        else:
            flat[run].addmm_(self.up, down, alpha=strength)
        return weight

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
    ups = _common_dtype([_plain(a.full_up() if rows is None else a.lora_up, device) for a, _ in used])
    downs = _common_dtype([_plain(adapter.lora_down, device) for adapter, _ in used])
    up = ups[0].new_empty(len(ups[0]), sum(part.shape[1] for part in ups))
    own = up.split([part.shape[1] for part in ups], dim=1)
    # Scaled on the way to its place: the factors of many concepts are as large as the weights.
    for place, part, (adapter, strength) in zip(own, ups, used, strict=True):
        torch.mul(part, strength * adapter.scale, out=place)
    return MergedLayer(up, torch.cat(downs) if len(downs) > 1 else downs[0], rows, first.out_features)


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


def _run(rows: Tensor) -> slice | None:
    """The rows as a slice, if they rise evenly, as both layouts of blocks do; else None."""
    first, step = int(rows[0]), int(rows[1] - rows[0]) if len(rows) > 1 else 1
    if step < 1 or not torch.equal(rows, torch.arange(first, first + step * len(rows), step, device=rows.device)):
        return None
    return slice(first, first + step * (len(rows) - 1) + 1, step)


def _same_rows(first: LowRank, second: LowRank) -> bool:
    if first.rows is None or second.rows is None:
        return first.rows is second.rows
    return torch.equal(first.rows.cpu(), second.rows.cpu())


def _plain(factor: Tensor, device: torch.device) -> Tensor:
    return at_least_float32(factor.detach().to(device))


def _common_dtype(factors: Sequence[Tensor]) -> list[Tensor]:
    dtype = torch.float64 if any(factor.dtype == torch.float64 for factor in factors) else torch.float32
    return [factor.to(dtype) for factor in factors]
