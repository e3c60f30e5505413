"""A merged layer without small factors: what is left when single weights are dropped or averaged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..adapters.low_rank import ConvGeometry, LowRank, full_product

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True, eq=False)
class MergedDense:
    """values: the delta itself, weight-shaped, float32 or float64; strengths are inside."""

    values: Tensor

    @property
    def out_features(self) -> int:
        return self.values.shape[0]

    @property
    def rank(self) -> int:
        return min(len(self.values), self.values[0].numel())

    @property
    def is_zero(self) -> bool:
        """As `MergedLayer.is_zero`."""
        return not bool(self.values.any())

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MergedDense:
        return MergedDense(self.values.to(device=device, dtype=dtype))

    def delta(self) -> Float[Tensor, "out inp *kernel"]:
        return self.values

    def add_to(
        self, weight: Float[Tensor, "out inp *kernel"], strength: float = 1.0
    ) -> Float[Tensor, "out inp *kernel"]:
        """weight + strength delta, written into `weight`; as `MergedLayer.add_to`."""
        return weight.add_(self.values.to(weight.device).reshape(weight.shape), alpha=strength)

    def residual(self, x: Float[Tensor, "*_"], conv: ConvGeometry | None = None) -> Float[Tensor, "*_"]:
        """What the delta adds to the layer's output, in x.dtype; shapes as `LowRank.residual`."""
        return full_product(x, self.values, conv)

    def as_low_rank(self) -> LowRank:
        """The same as one adapter, for export: one factor is the identity, so its rank is the layer's smaller side."""
        flat = self.values.flatten(1)
        out, inp = flat.shape
        if out <= inp:
            up, down = torch.eye(out, dtype=flat.dtype), flat
        else:
            up, down = flat, torch.eye(inp, dtype=flat.dtype)
        down = down.reshape(-1, *self.values.shape[1:])
        return LowRank(up.to(flat), down.to(flat), float(self.rank), "lora", None, out)
