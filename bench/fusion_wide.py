"""How near fusion is to the least-squares optimum on wide layers, by spectrum, damping and directions kept.

    python -m bench.fusion_wide

Three random LoRAs on 768 inputs with half of their energy in common.  "above": the objective sum |(W - W_i) X_i|^2
above its minimum, as a share of it.  "alone": what one concept fused alone keeps of its |delta|.  Both for damping
towards the base's weight and towards each concept's own.  "cut": how far the weights move from those of whole moments
when 128 directions are kept, and when as many as `moments.ENERGY` asks.  Prints a table and one line of JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from modular_concepts.adapters.low_rank import LowRank, new_lora
from modular_concepts.merging.fusion import EXACT, fused_factors
from modular_concepts.merging.moments import Moment
from modular_concepts.seeds import seeded

WIDTH, OUT, RANK = 768, 64, 4
SPECTRA = {"flat": (0.0, 3000), "falling": (2.0, 3000), "steep": (5.0, 3000), "few rows": (0.0, 400)}
RIDGES = (0.3, 0.1, 0.01)


def inputs(slope: float, rows: int, seed: int) -> Tensor:
    """Second moments (n, n) whose eigenvalues fall over `slope` powers of ten."""
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=seeded(seed, "turn"), dtype=torch.float64))[0]
    size = torch.logspace(0, -slope / 2, WIDTH, dtype=torch.float64)
    x = torch.randn(rows, WIDTH, generator=seeded(seed, "rows"), dtype=torch.float64) * size @ turn
    return x.mT @ x / rows


def concept(slot: int) -> LowRank:
    adapter = new_lora(OUT, WIDTH, RANK, None, seeded(slot, "down"))
    return adapter.replace(lora_up=torch.randn(OUT, RANK, generator=seeded(slot, "up")))


def towards_base(deltas: Sequence[Tensor], moments: Sequence[Tensor], ridge: float) -> Tensor:
    total = sum(moments)
    damped = total + ridge * total.diagonal().mean() * torch.eye(WIDTH, dtype=torch.float64)
    return torch.linalg.solve(damped, sum(d @ c for d, c in zip(deltas, moments, strict=True)).mT).mT


def missed(delta: Tensor, deltas: Sequence[Tensor], moments: Sequence[Tensor]) -> float:
    off = [delta.double() - own for own in deltas]
    return float(sum(((wrong @ c) * wrong).sum() for wrong, c in zip(off, moments, strict=True)))


def main() -> int:
    adapters, ones, table = [concept(slot) for slot in range(3)], [1.0] * 3, {}
    deltas = [adapter.delta().double() for adapter in adapters]
    for kind, (slope, rows) in SPECTRA.items():
        common = inputs(slope, rows, 9)
        moments = [0.5 * (common + inputs(slope, rows, seed)) for seed in range(3)]
        best = missed(fused_factors(adapters, ones, moments, EXACT).delta(), deltas, moments)
        for ridge in RIDGES:
            whole = fused_factors(adapters, ones, moments, ridge).delta()
            base = towards_base(deltas, moments, ridge)
            few, many = (
                fused_factors(adapters, ones, [Moment.of(m, count) for m in moments], ridge).delta()
                for count in (128, None)
            )
            row = {
                "above, base": missed(base, deltas, moments) / best - 1,
                "above, own": missed(whole, deltas, moments) / best - 1,
                "alone, base": float(towards_base(deltas[:1], moments[:1], ridge).norm() / deltas[0].norm()),
                "alone, own": float(
                    fused_factors(adapters[:1], ones[:1], moments[:1], ridge).delta().norm() / deltas[0].norm()
                ),
                "cut, 128": float((few - whole).norm() / whole.norm()),
                "cut, energy": float((many - whole).norm() / whole.norm()),
            }
            table[f"{kind}, {ridge:g}"] = row
            cells = "  ".join(f"{k} {v:.4f}" for k, v in row.items())
            print(f"{kind}, {ridge:g}".ljust(16), cells, file=sys.stderr, flush=True)
    print(json.dumps(table))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
