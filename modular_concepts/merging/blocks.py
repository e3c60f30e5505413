"""Block merge: concepts that own disjoint output rows stand side by side.  Zhu et al. 2025, Eq. 4."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..adapters.low_rank import ConvGeometry, LowRank, low_rank_product, scatter_rows
from ..errors import AdapterError
from .method import LayerStack, Mergeable, Method
from .sums import MergedLayer, MergedSum, merged_factors

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True, eq=False)
class MergedBlocks:
    """Disjoint blocks of one layer: delta has each part's rows and zeros elsewhere.

    parts: one per block, each with its own rows, strength inside.  With k blocks that cover the layer the
    products cost 1/k of a sum's.
    """

    parts: tuple[MergedLayer | MergedSum, ...]
    out_features: int

    @property
    def rank(self) -> int:
        return sum(part.rank for part in self.parts)

    @property
    def is_zero(self) -> bool:
        """As `MergedLayer.is_zero`."""
        return all(part.is_zero for part in self.parts)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MergedBlocks:
        return MergedBlocks(tuple(part.to(device, dtype) for part in self.parts), self.out_features)

    def delta(self) -> Float[Tensor, "out inp *kernel"]:
        """The weight-shaped sum, float32, or float64 if the factors are."""
        products = torch.cat([_packed(part).delta() for part in self.parts])
        return scatter_rows(products, self._rows(), self.out_features, dim=0)

    def add_to(
        self, weight: Float[Tensor, "out inp *kernel"], strength: float = 1.0
    ) -> Float[Tensor, "out inp *kernel"]:
        """weight + strength delta, written into `weight`, each block into its own rows; as `MergedLayer.add_to`."""
        for part in self.parts:
            part.add_to(weight, strength)
        return weight

    def residual(self, x: Float[Tensor, "*_"], conv: ConvGeometry | None = None) -> Float[Tensor, "*_"]:
        """What the blocks add to the layer's output, in x.dtype; shapes as `LowRank.residual`."""
        if conv is not None:
            return self._as_sum().residual(x, conv)
        outs = [low_rank_product(x, part.up, part.down) for part in self.parts]
        return scatter_rows(torch.cat(outs, dim=-1), self._rows(), self.out_features, dim=-1)

    def as_low_rank(self) -> LowRank:
        """The same as one adapter over all rows, for export."""
        return self._as_sum().as_low_rank()

    def _rows(self) -> Tensor:
        return torch.cat([rows for part in self.parts if (rows := part.rows) is not None])

    def _as_sum(self) -> MergedLayer:
        full = [part.as_low_rank() for part in self.parts]
        return merged_factors(full, [1.0] * len(full))


def merged_blocks(adapters: Sequence[LowRank], strengths: Sequence[float]) -> MergedBlocks:
    """Put blocks with disjoint rows side by side, each times its strength; see `check_blocks`."""
    parts = [MergedSum((a,), (s,)) for a, s in zip(adapters, strengths, strict=True) if s != 0]
    return MergedBlocks(tuple(parts or [MergedSum((adapters[0],), (0.0,))]), adapters[0].out_features)


def check_blocks(layer: str, names: Sequence[str], adapters: Sequence[LowRank]) -> None:
    """Raises AdapterError when an adapter of this layer is no block, or two blocks share a row."""
    for name, adapter in zip(names, adapters, strict=True):
        if adapter.rows is None:
            raise AdapterError(
                f"{name} is not a block adapter but {adapter.kind}; a block merge takes only concepts that were "
                f"trained in blocks, merge this one by sum (seen in {layer})"
            )
    rows = [adapter.rows for adapter in adapters if adapter.rows is not None]
    every = torch.cat(rows)
    if len(every.unique()) == len(every):
        return
    owned = [(name, set(each.tolist())) for name, each in zip(names, rows, strict=True)]
    for (first, mine), (second, theirs) in itertools.combinations(owned, 2):
        if mine == theirs:
            raise AdapterError(
                f"{first} and {second} were trained in the same block slot; train one of them again in a free slot, or "
                f"merge by sum (seen in {layer})"
            )
        if mine & theirs:
            raise AdapterError(
                f"{first} and {second} both write {len(mine & theirs)} output rows; they were "
                f"trained with different numbers or layouts of blocks, merge them by sum (seen in {layer})"
            )


def _packed(part: MergedLayer | MergedSum) -> MergedLayer:
    """The part's own rows as a whole layer."""
    return MergedLayer(part.up, part.down, None, part.up.shape[0])


def _merge_layer(stack: LayerStack) -> MergedBlocks:
    check_blocks(stack.layer, stack.names, stack.adapters)
    return merged_blocks(stack.adapters, stack.strengths)


def _check_partitions(concepts: Sequence[Mergeable]) -> None:
    """Recipes, where there are any, must agree on how the rows were cut."""
    cut = {}
    for concept in concepts:
        recipe = getattr(concept, "recipe", None)
        if recipe is not None and recipe.blocks is not None:
            cut.setdefault((recipe.blocks, recipe.layout or "contiguous"), concept.name)
    if len(cut) > 1:
        cuts = " but ".join(f"{name} was trained with {n} {layout} blocks" for (n, layout), name in cut.items())
        raise AdapterError(f"{cuts}; a block merge needs the same number and layout for all, or use sum")


BLOCK = Method("block", _merge_layer, check=_check_partitions)
