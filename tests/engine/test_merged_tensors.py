"""Whoever keeps a merged layer can move its tensors without knowing what it is."""

from __future__ import annotations

import pytest
import torch
from laws import relative_error

from modular_concepts.adapters.low_rank import LowRank
from modular_concepts.merging import Merged, MergedDense, MergedLayer, MergedSum, merged_blocks
from modular_concepts.merging.tensors import tensors_of, with_tensors


def adapter(seed: int, rows: torch.Tensor | None = None) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    height = 6 if rows is None else len(rows)
    up, down = torch.randn(height, 2, generator=generator), torch.randn(2, 5, generator=generator)
    return LowRank(up, down, 3.0, "lora" if rows is None else "block", rows, 6)


MERGED = {
    "layer": MergedLayer(torch.randn(6, 2), torch.randn(2, 5), None, 6),
    "sum": MergedSum((adapter(1), adapter(2, torch.tensor([1, 4]))), (0.7, -0.2)),
    "blocks": merged_blocks([adapter(3, torch.tensor([0, 1])), adapter(4, torch.tensor([2, 5]))], [0.5, 1.0]),
    "dense": MergedDense(torch.randn(6, 5)),
}


@pytest.mark.parametrize("kind", MERGED)
def test_moved_tensors_are_the_same_layer(kind):
    merged: Merged = MERGED[kind]
    copies = [tensor.clone() for tensor in tensors_of(merged)]
    moved = with_tensors(merged, copies)
    assert type(moved) is type(merged) and torch.equal(moved.delta(), merged.delta())
    assert [one.data_ptr() for one in tensors_of(moved)] == [one.data_ptr() for one in copies]


@pytest.mark.parametrize("kind", MERGED)
def test_every_factor_is_among_them(kind):
    merged = MERGED[kind]
    louder = [tensor * 2 if tensor.is_floating_point() else tensor for tensor in tensors_of(merged)]
    factor = 2 if kind == "dense" else 4
    assert relative_error(with_tensors(merged, louder).delta(), factor * merged.delta()) < 1e-6
