"""New adapters for each method, every layer from its own generator."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from ..adapters import LowRank, block_rows, new_block, new_block_orthogonal, new_lora, new_orthogonal
from ..bases import OrthogonalBasis, hashed_indices, slot_indices
from ..errors import AdapterError
from ..seeds import seeded
from .settings import TrainSettings


def new_adapters(
    layers: Mapping[str, nn.Module], settings: TrainSettings, basis: OrthogonalBasis | None = None
) -> dict[str, LowRank]:
    """One fresh adapter per layer by `settings.method`, its trainable factors as parameters.

    The random part of a layer depends on (seed, layer name) alone, whatever other layers there are.
    On the layer's device, float32, or float64 for a float64 layer.  basis None is the default basis.
    Raises AdapterError for a rank, slot or number of blocks that a layer cannot hold.
    """
    by_name = settings.method == "orthogonal" and settings.name
    if settings.method != "lora" and settings.slot is None and not by_name:
        raise AdapterError(
            f"method {settings.method} needs a slot of the concept's own"
            + (", or a name to derive one from" if settings.method == "orthogonal" else "")
        )
    basis = OrthogonalBasis() if basis is None else basis
    largest = {name: _largest_rank(module, settings) for name, module in layers.items()}
    for name, rank in largest.items():
        if settings.rank > rank:
            raise AdapterError(
                f"{name}: rank {settings.rank} is larger than this layer allows ({rank}); "
                f"the largest rank that fits all chosen layers is {min(largest.values())}"
            )
    return {name: _trainable(_new_adapter(name, module, settings, basis), module) for name, module in layers.items()}


def _new_adapter(name: str, module: nn.Module, settings: TrainSettings, basis: OrthogonalBasis) -> LowRank:
    out, inp, kernel = _geometry(module)
    width, rank, alpha = inp * math.prod(kernel or (1,)), settings.rank, settings.alpha
    generator = seeded(settings.seed, "adapter", name)
    if settings.method == "lora":
        return new_lora(out, inp, rank, alpha, generator, kernel)
    if settings.method == "block":
        return new_block(out, inp, rank, alpha, _rows(out, settings), generator, kernel)
    if settings.slot is not None:
        indices = slot_indices(width, rank, settings.slot)
    else:
        indices = hashed_indices(width, rank, settings.name, name)
    if settings.method == "orthogonal":
        return new_orthogonal(out, inp, rank, alpha, basis, indices, kernel)
    return new_block_orthogonal(out, inp, rank, alpha, _rows(out, settings), basis, indices, kernel)


def _rows(out: int, settings: TrainSettings) -> torch.Tensor:
    return block_rows(out, settings.blocks, settings.slot, settings.layout)


def _geometry(module: nn.Module) -> tuple[int, int, tuple[int, ...] | None]:
    """(out, inputs of one group, kernel or None) of a Linear or Conv2d."""
    out, inp, *kernel = module.weight.shape
    return out, inp, tuple(kernel) or None


def _largest_rank(module: nn.Module, settings: TrainSettings) -> int:
    out, inp, kernel = _geometry(module)
    rows = out if settings.method in ("lora", "orthogonal") else len(_rows(out, settings))
    return min(rows, inp * math.prod(kernel or (1,)))


def _trainable(adapter: LowRank, module: nn.Module) -> LowRank:
    dtype = torch.promote_types(module.weight.dtype, torch.float32)
    moved = adapter.to(module.weight.device, dtype)
    return moved.replace(**{name: nn.Parameter(factor) for name, factor in moved.trainable().items()})
