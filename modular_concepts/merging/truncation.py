"""A merged layer cut to a lower rank, with what the cut costs.  Smaller files; orthogonal sums lose most by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from ..adapters.low_rank import narrowed
from ..settings.merging import RANK
from .method import LayerStack, Method
from .sums import MergedLayer, MergedSum, merged_factors

if TYPE_CHECKING:
    from .methods import Merged


@torch.no_grad()
def truncated(layer: MergedLayer, rank: int) -> tuple[MergedLayer, float]:
    """(the nearest delta of that rank, the share of |delta|^2 that it keeps, 0..1).

    Singular values from the factors alone: QR of both, SVD of the small product.  A rank that is not smaller keeps
    all.  Source: Eckart and Young 1936.
    """
    RANK.check(rank)
    left, small_left = torch.linalg.qr(layer.up.double())
    right, small_right = torch.linalg.qr(layer.down.flatten(1).double().mT)
    u, values, v = torch.linalg.svd(small_left @ small_right.mT)
    energy = values.square()
    share = float(energy[:rank].sum() / energy.sum()) if energy.sum() > 0 else 1.0
    root = values[:rank].sqrt()
    count = len(root)
    up = (left @ u[:, :count]) * root
    down = (right @ v.mT[:, :count] * root).mT.reshape(count, *layer.down.shape[1:])
    return MergedLayer(up.to(layer.up), down.to(layer.down), layer.rows, layer.out_features), share


def share_kept(cut: Mapping[str, Merged], whole: Mapping[str, Merged]) -> float:
    """The share of |delta|^2, over all layers, that a cut merge has of the whole one, 0..1."""
    total = sum(map(_measure_energy, whole.values()))
    # Rounding alone takes a cut that keeps everything above 1.
    return min(1.0, sum(map(_measure_energy, cut.values())) / total) if total else 1.0


def _measure_energy(layer: Merged) -> float:
    if not isinstance(layer, MergedLayer | MergedSum):
        return float(layer.delta().double().square().sum())
    up, down = narrowed(layer.up, layer.down)
    return float(((up.mT @ up) * (down @ down.mT)).sum())


def _merge_layer(stack: LayerStack) -> MergedLayer:
    return truncated(merged_factors(stack.adapters, stack.strengths), stack.options.rank)[0]


SVD = Method("svd", _merge_layer)
