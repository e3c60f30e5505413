"""Second moments of what a concept's layers read while it is drawn or trained: all that fusion needs of them.

No picture can be had back from them, and they are recorded once: beside the concept file, or when asked for.
A file keeps each layer's largest directions, as many as hold nearly all energy, and the mean of the rest:
C = F^T F + rest I.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.sites import Site
from ..seeds import seeded

if TYPE_CHECKING:
    from jaxtyping import Float

ENERGY = 0.999  # share of the inputs' energy tr C that the kept directions hold
FEWEST, MOST = 128, 1024  # directions of one layer, whatever the energy asks
EXACT = 1024  # widths up to which all directions are computed


@dataclass(frozen=True, eq=False)
class Moment:
    """One layer's C = X^T X / rows of its inputs: factor^T factor + rest I.

    factor: (k, n) float32, the largest directions; rest: mean of the variance that they leave, per direction.
    """

    factor: Tensor
    rest: float

    def matrix(self) -> Float[Tensor, "width width"]:
        """(n, n), float64."""
        factor = self.factor.double()
        return factor.mT @ factor + self.rest * torch.eye(factor.shape[1]).to(factor)

    def to(self, device: torch.device | str) -> Moment:
        return Moment(self.factor.to(device), self.rest)

    @classmethod
    def of(cls, matrix: Float[Tensor, "width width"], directions: int | None = None) -> Moment:
        """The nearest of its kind to a symmetric positive (n, n); for wide ones nearly so.

        directions: how many; None: as many as hold `ENERGY` of the trace, from 128 to 1024.  Where a spectrum is flat,
        few directions and the mean of the rest would be another matrix, and half of a fused weight another with it.
        """
        matrix = matrix.double()
        width, count = len(matrix), min(directions or MOST, len(matrix))
        if width <= EXACT:
            values, vectors = torch.linalg.eigh(matrix)
            values, vectors = values.clamp(min=0).flip(0)[:count], vectors.flip(1)[:, :count]
        else:
            values, vectors = _largest(matrix, count) if directions else _enough(matrix, count)
        if directions is None:
            count = _asked(values, matrix.trace())
            values, vectors = values[:count], vectors[:, :count]
        rest = max(0.0, (matrix.trace() - values.sum()).item() / (width - count)) if count < width else 0.0
        factor = (vectors * (values - rest).clamp(min=0).sqrt()).mT
        return cls(factor.float().contiguous(), rest)


def _asked(values: Tensor, trace: Tensor) -> int:
    """How many of falling eigenvalues hold `ENERGY` of the trace; at least `FEWEST`, and all where they do not."""
    short = int((values.cumsum(0) < ENERGY * trace).sum())
    return min(len(values), max(FEWEST, short + 1))


def _enough(matrix: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Twice as many directions until they hold the energy that is asked, or are the most."""
    count = FEWEST
    while True:
        values, vectors = _largest(matrix, count)
        if count >= most or _asked(values, matrix.trace()) < count:
            return values, vectors
        count = min(most, 2 * count)


def _largest(matrix: Tensor, count: int, rounds: int = 6) -> tuple[Tensor, Tensor]:
    """(values, vectors) of the largest directions, falling, by subspace iteration from a seed.

    Source: Halko, Martinsson and Tropp 2011, section 4.5; all of a width of 5120 would take minutes.
    """
    start = torch.randn(len(matrix), count + 32, generator=seeded(0, "directions"), dtype=torch.float64)
    basis = torch.linalg.qr(matrix @ start.to(matrix))[0]
    for _ in range(rounds):
        basis = torch.linalg.qr(matrix @ basis)[0]
    values, inner = torch.linalg.eigh(basis.mT @ matrix @ basis)
    return values[-count:].clamp(min=0).flip(0), (basis @ inner)[:, -count:].flip(1)


class Recorder:
    """Sums x x^T over everything that each layer reads, in float32 on the layer's device."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}

    def add(self, name: str, x: Tensor) -> None:
        """x: (rows, n)."""
        x = x.detach().float()
        if name not in self.sums:
            self.sums[name] = x.new_zeros(x.shape[1], x.shape[1])
            self.rows[name] = 0
        self.sums[name].addmm_(x.mT, x)
        self.rows[name] += len(x)

    def matrices(self) -> dict[str, Tensor]:
        """Layer -> (n, n) float64 on the CPU: the mean over rows, so that concepts weigh alike."""
        return {name: total.double().cpu() / self.rows[name] for name, total in self.sums.items()}

    def moments(self, directions: int | None = None) -> dict[str, Moment]:
        """Layer -> moment; directions: see `Moment.of`."""
        return {name: Moment.of(total.cpu() / self.rows[name], directions) for name, total in self.sums.items()}


@contextmanager
def recording(layers: Mapping[str, nn.Module | Site]) -> Generator[Recorder]:
    """Within the block every forward pass of these Linear and Conv2d layers is recorded; hooks go on leaving."""
    recorder, handles = Recorder(), []
    try:
        for name, place in layers.items():
            module = place.module if isinstance(place, Site) else place

            def watch(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                recorder.add(name, inputs_of(module, args[0]))

            handles.append(module.register_forward_pre_hook(watch))
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def inputs_of(module: nn.Module, x: Float[Tensor, "*_"]) -> Float[Tensor, "rows width"]:
    """(rows, n) of what the weight is multiplied with: n = in, or in * kh * kw for a convolution's patches."""
    if not isinstance(module, nn.Conv2d):
        return x.flatten(0, -2)
    padding = cast(tuple[int, ...], module.padding)  # in words only in models that nobody has adapted
    patches = F.unfold(x, module.kernel_size, module.dilation, padding, module.stride)
    return patches.mT.flatten(0, 1)
