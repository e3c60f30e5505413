"""A merged layer of a site as one of the whole layer that the site is part of, zero in all other rows."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..adapters.low_rank import LowRank
from .blocks import MergedBlocks
from .dense import MergedDense
from .methods import Merged
from .sums import MergedLayer, MergedSum


def lift(merged: Merged, start: int, out: int) -> Merged:
    """start: the site's first row; out: how many rows the layer has.  Nothing is copied but dense values."""
    if isinstance(merged, MergedDense):
        values = merged.values.new_zeros(out, *merged.values.shape[1:])
        values[start : start + len(merged.values)] = merged.values
        return MergedDense(values)
    if isinstance(merged, MergedBlocks):
        return MergedBlocks(tuple(_lift_factors(part, start, out) for part in merged.parts), out)
    return _lift_factors(merged, start, out)


def _lift_factors(merged: MergedLayer | MergedSum, start: int, out: int) -> MergedLayer | MergedSum:
    if isinstance(merged, MergedSum):
        return replace(merged, adapters=tuple(_lift_adapter(adapter, start, out) for adapter in merged.adapters))
    return MergedLayer(merged.up, merged.down, _rows(merged, start), out)


def _lift_adapter(adapter: LowRank, start: int, out: int) -> LowRank:
    return adapter.replace(rows=_rows(adapter, start), out_features=out)


def _rows(part: LowRank | MergedLayer, start: int) -> torch.Tensor:
    up = part.lora_up if isinstance(part, LowRank) else part.up
    rows = torch.arange(part.out_features, device=up.device) if part.rows is None else part.rows
    return rows + start
