"""Second moments of what a concept's layers read while it is drawn or trained: all that fusion needs of them.

No picture can be had back from them, and they are recorded once: beside the concept file, or when asked for.
A file keeps each layer's largest directions and the mean of the rest: C = F^T F + rest I.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .seeds import seeded

DIRECTIONS = 128
EXACT = 1024  # widths up to which all directions are computed


@dataclass(frozen=True, eq=False)
class Moment:
    """One layer's C = X^T X / rows of its inputs: factor^T factor + rest I.

    factor: (k, n) float32, the largest directions; rest: mean of the variance that they leave, per direction.
    """

    factor: Tensor
    rest: float

    def matrix(self) -> Tensor:
        """(n, n), float64."""
        factor = self.factor.double()
        return factor.mT @ factor + self.rest * torch.eye(factor.shape[1]).to(factor)

    def to(self, device: torch.device | str) -> Moment:
        return Moment(self.factor.to(device), self.rest)

    @classmethod
    def of(cls, matrix: Tensor, directions: int = DIRECTIONS) -> Moment:
        """The nearest of its kind to a symmetric positive (n, n); for wide ones nearly so."""
        matrix = matrix.double()
        width, count = len(matrix), min(directions, len(matrix))
        values, vectors = torch.linalg.eigh(matrix) if width <= EXACT else _largest(matrix, count)
        values, vectors = values.clamp(min=0).flip(0)[:count], vectors.flip(1)[:, :count]
        rest = max(0.0, (matrix.trace() - values.sum()).item() / (width - count)) if count < width else 0.0
        factor = (vectors * (values - rest).clamp(min=0).sqrt()).mT
        return cls(factor.float().contiguous(), rest)


def _largest(matrix: Tensor, count: int, rounds: int = 6) -> tuple[Tensor, Tensor]:
    """(values, vectors) of the largest directions, ascending as eigh gives them, by subspace iteration from a seed.

    Source: Halko, Martinsson and Tropp 2011, section 4.5; all of a width of 5120 would take minutes.
    """
    start = torch.randn(len(matrix), count + 32, generator=seeded(0, "directions"), dtype=torch.float64)
    basis = torch.linalg.qr(matrix @ start.to(matrix))[0]
    for _ in range(rounds):
        basis = torch.linalg.qr(matrix @ basis)[0]
    values, inner = torch.linalg.eigh(basis.mT @ matrix @ basis)
    return values[-count:], (basis @ inner)[:, -count:]


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

    def moments(self, directions: int = DIRECTIONS) -> dict[str, Moment]:
        return {name: Moment.of(total.cpu() / self.rows[name], directions) for name, total in self.sums.items()}


@contextmanager
def recording(layers: Mapping[str, nn.Module]) -> Iterator[Recorder]:
    """Within the block every forward pass of these Linear and Conv2d layers is recorded; hooks go on leaving."""
    recorder, handles = Recorder(), []
    try:
        for name, module in layers.items():

            def watch(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                recorder.add(name, inputs_of(module, args[0]))

            handles.append(module.register_forward_pre_hook(watch))
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def inputs_of(module: nn.Module, x: Tensor) -> Tensor:
    """(rows, n) of what the weight is multiplied with: n = in, or in * kh * kw for a convolution's patches."""
    if not isinstance(module, nn.Conv2d):
        return x.flatten(0, -2)
    patches = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
    return patches.mT.flatten(0, 1)
