"""Concepts that were trained without a shared basis, made orthogonal after the fact, and what that costs each.

Po et al. 2024 call it impossible to do this without loss.  It is: what a delta reads outside its new directions is
gone.  The loss is measured here (`shares`), layer by layer; whether the identity survives is for pictures to say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..adapters.low_rank import LowRank, measure_energy, together
from ..concept import Concept
from ..errors import AdapterError
from ..settings.merging import WAY
from .compatibility import refuse_own_words


@dataclass(frozen=True, eq=False)
class Orthogonalised:
    """layers: one mapping for each concept, as they came.  shares: of each one's |delta|^2 that is left, 0..1."""

    layers: list[dict[str, LowRank]]
    shares: list[float]


@torch.no_grad()
def orthogonalised(concepts: Sequence[Mapping[str, LowRank]], way: str = "symmetric") -> Orthogonalised:
    """Mutually orthogonal row spaces for all concepts, layer by layer: delta_i becomes delta_i P_i, P_i P_j = 0.

    symmetric: the orthonormal rows nearest to all concepts' own (Loewdin 1950, (Q Q^T)^-1/2 Q); treats all alike.
    sequential: each concept is cleared of the directions of those before it; the first keeps all.
    Raises AdapterError for a layer whose ranks add up to more than its width.
    """
    WAY.check(way)
    results: list[dict[str, LowRank]] = [dict(layers) for layers in concepts]
    before, after = [0.0] * len(concepts), [0.0] * len(concepts)
    for layer in {name: None for layers in concepts for name in layers}:
        owners = [index for index, layers in enumerate(concepts) if layer in layers]
        adapters = together([concepts[index][layer] for index in owners])
        spaces = [_find_row_space(adapter) for adapter in adapters]
        width, needed = spaces[0].shape[1], sum(len(space) for space in spaces)
        if needed > width:
            raise AdapterError(
                f"{layer}: {len(owners)} concepts read {needed} directions of a layer that has {width}; make fewer "
                "concepts orthogonal at once, or cut their ranks first"
            )
        new = _orthogonalize_alike(spaces) if way == "symmetric" else _orthogonalize_in_turn(spaces)
        for index, adapter, space in zip(owners, adapters, new, strict=True):
            changed = _project(adapter, space)
            before[index] += measure_energy(adapter)
            after[index] += measure_energy(changed)
            results[index][layer] = changed
    shares = [share / whole if whole else 1.0 for share, whole in zip(after, before, strict=True)]
    return Orthogonalised(results, shares)


def orthogonal_concepts(concepts: Sequence[Concept], way: str = "symmetric") -> tuple[list[Concept], list[float]]:
    """`orthogonalised` for whole concepts: (concepts that share no direction, what each keeps).

    Their recipes no longer name a basis, for the new rows are columns of none.
    Raises AdapterError for a concept that acts at its own words alone.
    """
    refuse_own_words(concepts, "orthogonal directions are for what acts")
    changed = orthogonalised([concept.layers for concept in concepts], way)
    new = []
    for concept, layers in zip(concepts, changed.layers, strict=True):
        former, rank = concept.recipe, max((adapter.rank for adapter in layers.values()), default=concept.recipe.rank)
        recipe = replace(
            former,
            method="lora" if former.blocks is None else "block",
            rank=rank,
            alpha=float(rank),
            basis=None,
            basis_kind=None,
            basis_seed=None,
            slot=None if former.blocks is None else former.slot,
            slot_policy=None,
        )
        new.append(replace(concept, layers=layers, recipe=recipe))
    return new, changed.shares


def _find_row_space(adapter: LowRank) -> Tensor:
    """(k, n) orthonormal rows that span what the delta reads, k <= rank; float64."""
    down = adapter.lora_down.detach().flatten(1).double()
    _, weight = torch.linalg.qr(adapter.lora_up.detach().double())
    _, values, rows = torch.linalg.svd(weight @ down, full_matrices=False)
    return rows[values > values.max().clamp(min=1e-300) * 1e-6]


def _orthogonalize_alike(spaces: Sequence[Tensor]) -> list[Tensor]:
    stacked = torch.cat(list(spaces))
    # The polar factor: the nearest matrix with orthonormal rows, also where directions are shared.
    left, _, right = torch.linalg.svd(stacked, full_matrices=False)
    return list((left @ right).split([len(space) for space in spaces]))


def _orthogonalize_in_turn(spaces: Sequence[Tensor]) -> list[Tensor]:
    taken, new = spaces[0][:0], []
    for space in spaces:
        rest = space - (space @ taken.mT) @ taken
        _, values, rows = torch.linalg.svd(rest, full_matrices=False)
        rows = rows[values > 1e-6]
        new.append(rows)
        taken = torch.cat([taken, rows])
    return new


def _project(adapter: LowRank, rows: Tensor) -> LowRank:
    """delta P with P = rows^T rows, as an adapter of rank len(rows) with those rows as its lora_down."""
    rows = rows if len(rows) else rows.new_zeros(1, adapter.lora_down[0].numel())
    down = adapter.lora_down.detach().flatten(1).double()
    up = adapter.lora_up.detach().double() @ (down @ rows.mT) * adapter.scale
    kind = "lora" if adapter.rows is None else "block"
    return adapter.replace(
        lora_up=up.to(adapter.lora_up),
        lora_down=rows.reshape(-1, *adapter.lora_down.shape[1:]).to(adapter.lora_down),
        alpha=float(len(rows)),
        kind=kind,
    )
