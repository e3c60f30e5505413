"""Sums of low-rank residuals, exact: one pair of matrices per layer, no SVD.  Po et al. 2024, Eq. 1."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..adapters.low_rank import ConvGeometry, LowRank, at_least_float32, low_rank_product, scatter_rows
from ..errors import AdapterError
from .dense import MergedDense
from .method import LayerStack, Method

if TYPE_CHECKING:
    from jaxtyping import Float, Int64


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

    def delta(self) -> Float[Tensor, "out inp *kernel"]:
        """The weight-shaped sum, float32, or float64 if the factors are."""
        product = at_least_float32(self.up) @ at_least_float32(self.down).flatten(1)
        full = scatter_rows(product, self.rows, self.out_features, dim=0)
        return full.unflatten(1, self.down.shape[1:])

    def add_to(
        self, weight: Float[Tensor, "out inp *kernel"], strength: float = 1.0
    ) -> Float[Tensor, "out inp *kernel"]:
        """weight + strength delta, written into `weight` and nowhere else: one product, and of its own rows only.

        weight: weight-shaped, on any device; the one function here that changes what it is given.
        Only a weight in less than the factors' precision, or one that does not lie in order, costs a delta beside it;
        the sum is formed in the factors' precision and rounded once.
        """
        here = self.to(weight.device)
        if weight.dtype != here.up.dtype or here.down.dtype != here.up.dtype or not weight.is_contiguous():
            return weight.add_(here.delta().reshape(weight.shape), alpha=strength)
        flat, down = weight.flatten(1), here.down.flatten(1)
        run = None if self.rows is None else _run(self.rows)
        if here.rows is not None and run is None:
            flat.index_add_(0, here.rows, here.up @ down, alpha=strength)
        else:
            flat[slice(None) if run is None else run].addmm_(here.up, down, alpha=strength)
        return weight

    @property
    def is_zero(self) -> bool:
        """Whether the delta is exactly zero, so that no weight need be touched for it."""
        return not bool(self.up.any())

    def residual(self, x: Float[Tensor, "*_"], conv: ConvGeometry | None = None) -> Float[Tensor, "*_"]:
        """What the sum adds to the layer's output, in x.dtype; shapes as `LowRank.residual`."""
        return low_rank_product(x, self.up, self.down, conv, self.rows, self.out_features)

    def as_low_rank(self) -> LowRank:
        """The same as one adapter of rank R and scale 1, for export: stock loaders read it as they are."""
        up = scatter_rows(self.up, self.rows, self.out_features, dim=0)
        return LowRank(up, self.down, float(self.rank), "lora", None, self.out_features)


@dataclass(frozen=True, eq=False)
class MergedSum:
    """A `MergedLayer` that is joined when it is needed: summands of one layer and their strengths.

    Joining a hundred concepts' factors costs as much memory and time as copying the weights; adding them to one weight
    after another needs one layer's at a time, and a single summand needs none.
    """

    adapters: tuple[LowRank, ...]
    strengths: tuple[float, ...]

    @cached_property
    def joined(self) -> MergedLayer:
        return merged_factors(self.adapters, self.strengths)

    @cached_property
    def _diagonals(self) -> dict[tuple[torch.device, torch.dtype], Tensor]:
        return {}

    @cached_property
    def shared(self) -> SharedFactors:
        """Kept from the first use on: activations ask at every step."""
        return SharedFactors.of(self.adapters)

    @property
    def up(self) -> Float[Tensor, "height rank"]:
        return self.joined.up

    @property
    def down(self) -> Float[Tensor, "rank inp *kernel"]:
        return self.joined.down

    @property
    def is_zero(self) -> bool:
        """As `MergedLayer.is_zero`, by the strengths alone."""
        return not any(self.strengths)

    @property
    def rows(self) -> Int64[Tensor, " height"] | None:
        return self.adapters[0].rows if len(self.adapters) == 1 else self.joined.rows

    @property
    def out_features(self) -> int:
        return self.adapters[0].out_features

    @property
    def rank(self) -> int:
        return self.joined.rank

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MergedSum:
        return replace(self, adapters=tuple(adapter.to(device, dtype) for adapter in self.adapters))

    def delta(self) -> Float[Tensor, "out inp *kernel"]:
        return self.joined.delta()

    def add_to(
        self, weight: Float[Tensor, "out inp *kernel"], strength: float = 1.0
    ) -> Float[Tensor, "out inp *kernel"]:
        """As `MergedLayer.add_to`; what is joined for it is not kept."""
        only, *others = (adapter.to(weight.device) for adapter in self.adapters)
        if others or weight.dtype != only.lora_up.dtype or weight.dtype != only.lora_down.dtype:
            return merged_factors([only, *others], self.strengths).add_to(weight, strength)
        layer = MergedLayer(only.lora_up.detach(), only.lora_down.detach(), only.rows, only.out_features)
        return layer.add_to(weight, strength * self.strengths[0] * only.scale)

    def residual(self, x: Float[Tensor, "*_"], conv: ConvGeometry | None = None) -> Float[Tensor, "*_"]:
        return self.shared.residual(x, self._diagonal(x), conv)

    def _diagonal(self, x: Tensor) -> Tensor:
        """Strength and scale of each of the rows of `down`, where and as precise as x is."""
        if (x.device, x.dtype) not in self._diagonals:
            each = zip(self.adapters, self.strengths, strict=True)
            values = [strength * adapter.scale for adapter, strength in each for _ in range(adapter.rank)]
            self._diagonals[x.device, x.dtype] = torch.tensor(values, device=x.device, dtype=x.dtype)
        return self._diagonals[x.device, x.dtype]

    def as_low_rank(self) -> LowRank:
        return self.joined.as_low_rank()


class SharedFactors:
    """Adapters of one layer joined without their strengths: residual = up (diag(lambda) (down x)), one pair for all.

    Only the small diagonal knows strengths, so those who change them keep the factors, on their device too.
    """

    _known: weakref.WeakValueDictionary[tuple[int, ...], SharedFactors] = weakref.WeakValueDictionary()

    def __init__(self, adapters: Sequence[LowRank]):
        self.adapters = tuple(adapters)  # also so that no other adapter gets the number that they are known by
        plain = [adapter.replace(alpha=float(adapter.rank)) for adapter in adapters]
        self.joined = merged_factors(plain, [1.0] * len(plain))
        self._there = self.joined

    @classmethod
    def of(cls, adapters: Sequence[LowRank]) -> SharedFactors:
        """The same object for the same adapters, as long as anyone holds it."""
        key = tuple(id(adapter) for adapter in adapters)
        factors = cls._known.get(key)
        if factors is None:
            factors = cls._known[key] = cls(adapters)
        return factors

    def residual(self, x: Tensor, diagonal: Tensor, conv: ConvGeometry | None = None) -> Tensor:
        """What the sum adds to the layer's output, strengths in `diagonal` (rank,); as `MergedLayer.residual`."""
        if self._there.up.device != x.device or self._there.up.dtype != x.dtype:
            self._there = self.joined.to(x.device, x.dtype)
        there = self._there
        return low_rank_product(x, there.up, there.down, conv, there.rows, there.out_features, diagonal)


def merged_factors(adapters: Sequence[LowRank], strengths: Sequence[float]) -> MergedLayer:
    """Concatenate factors: up = [s1 U1 | s2 U2 | ...], down = [D1; D2; ...]; s = strength alpha / rank.

    adapters: of one layer; ranks may differ; float32 or more, on the first one's device; detached.
    Blocks join with zero rows around them, unless all write the same rows.
    Adapters of strength 0 take no part; if all are 0 the delta is exactly zero.
    """
    used = [pair for pair in zip(adapters, strengths, strict=True) if pair[1] != 0] or [(adapters[0], 0.0)]
    first, device = adapters[0], adapters[0].lora_up.device
    rows = first.rows if all(_same_rows(first, adapter) for adapter, _ in used) else None
    ups = [_plain(a.full_up() if rows is None else a.lora_up, device) for a, _ in used]
    downs = [_plain(adapter.lora_down, device) for adapter, _ in used]
    both = _common_dtype([*ups, *downs])
    ups, downs = both[: len(ups)], both[len(ups) :]
    scales = [strength * adapter.scale for adapter, strength in used for _ in range(adapter.rank)]
    up = torch.cat(ups, dim=1).mul_(ups[0].new_tensor(scales))
    return MergedLayer(up, torch.cat(downs), rows, first.out_features)


def merged_delta(adapters: Sequence[LowRank], strengths: Sequence[float]) -> Float[Tensor, "out inp *kernel"]:
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
    values = rows.tolist()
    step = values[1] - values[0] if len(values) > 1 else 1
    end = values[-1] + 1
    return slice(values[0], end, step) if step > 0 and values == list(range(values[0], end, step)) else None


def _same_rows(first: LowRank, second: LowRank) -> bool:
    if first.rows is None or second.rows is None:
        return first.rows is second.rows
    return torch.equal(first.rows.cpu(), second.rows.cpu())


def _plain(factor: Tensor, device: torch.device) -> Tensor:
    return at_least_float32(factor.detach().to(device))


def _common_dtype(factors: Sequence[Tensor]) -> list[Tensor]:
    dtype = torch.float64 if any(factor.dtype == torch.float64 for factor in factors) else torch.float32
    return [factor.to(dtype) for factor in factors]


def sum_layer(stack: LayerStack) -> MergedSum | MergedDense:
    """One layer's adapters side by side; whole weights, which have no narrow middle, are added up."""
    stack.check_room("sum")
    if any(adapter.kind == "full" for adapter in stack.adapters):
        return MergedDense(merged_delta(stack.adapters, stack.strengths))
    return MergedSum(tuple(stack.adapters), tuple(stack.strengths))


SUM = Method("sum", sum_layer)
MEAN = Method("mean", sum_layer, mean_strengths)
AVERAGE = Method("average", sum_layer, average_strengths)
