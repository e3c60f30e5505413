"""What the tests of laws share: one relative error, a tolerance per dtype, a filled adapter of each kind."""

import os

import torch
from torch import Tensor

from modular_concepts.adapters.basis import OrthogonalBasis, slot_indices
from modular_concepts.adapters.low_rank import (
    LowRank,
    block_rows,
    new_block,
    new_block_orthogonal,
    new_full,
    new_lora,
    new_orthogonal,
)

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
EFFECT = 1e-2
BLOCKS = 4
# Added to every seed of these tests, so that the same laws can be tried on other numbers: see bench/torture.
SHIFT = 7919 * int(os.environ.get("MODULAR_CONCEPTS_SEED", "0"))


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| in float64."""
    got, want = got.detach().double(), want.detach().double()
    return ((got - want).norm() / want.norm()).item()


def relative_size(a: LowRank, b: LowRank, x: Tensor) -> float:
    """|delta_b x| / |delta_a x|: how loudly b answers what is meant for a."""
    return (b.residual(x).double().norm() / a.residual(x).double().norm()).item()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed + SHIFT)


def filled_adapter(kind: str, out: int, inp: int, rank: int, slot: int = 0, kernel=None) -> LowRank:
    """An adapter as training would leave it: lora_up ~ N(0, 1), alpha twice the rank, which `full` has of its own."""
    generator, basis = seeded(100 + slot), OrthogonalBasis(seed=5)
    width = inp * (kernel[0] * kernel[1] if kernel else 1)
    rows, alpha = block_rows(out, BLOCKS, slot), 2.0 * rank
    if kind == "full":
        adapter = new_full(out, inp, kernel).replace(alpha=2.0 * width)
    elif kind == "lora":
        adapter = new_lora(out, inp, rank, alpha, generator, kernel)
    elif kind == "block":
        adapter = new_block(out, inp, rank, alpha, rows, generator, kernel)
    elif kind == "orthogonal":
        adapter = new_orthogonal(out, inp, rank, alpha, basis, slot_indices(width, rank, slot), kernel)
    else:
        columns = slot_indices(width, rank, slot)
        adapter = new_block_orthogonal(out, inp, alpha, rows, basis, columns, kernel)
    return adapter.replace(lora_up=torch.randn(adapter.lora_up.shape, generator=generator))
