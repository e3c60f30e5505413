"""Fusion by damped least squares: a weight that answers each concept's own inputs nearly as that concept alone would.

Mix-of-Show's gradient fusion (Gu et al. 2023, section 3.2) minimises sum_i |W X_i - W_i X_i|^2, W_i = W0 + s_i delta_i,
from W0 by L-BFGS over recorded inputs, and stops early.  The targets are linear, so the minimum has a closed form, of
which only the second moments C_i = X_i X_i^T are needed, and which damping keeps from fitting what was hardly recorded:

    W = argmin_W  sum_i |(W - W_i) X_i|^2 + mu_i |W - W_i|^2
      = W0 + (sum_i s_i delta_i (C_i + mu_i I)) (sum_i C_i + mu_i I)^-1.

This is RegMean's form (Jin et al. 2023) with its shrinking of C_i towards the mean of its spectrum, mu_i = ridge tr C_i
/ n.  Each concept is damped towards its own weight and not towards W0: one alone stays itself to rounding, whatever the
ridge, and directions that nobody read get the mean of all.  The excess over the optimum is at most about ridge / 4 of
what the concepts answer by themselves, less where spectra are flat; with `EXACT` it is the optimum.

Moments in few directions, C_i = F_i^T F_i + r_i I, are never written out: with all F_i stacked and t = sum r_i + mu_i,
(F^T F + t I)^-1 = (I - F^T (t I + F F^T)^-1 F) / t.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..adapters.low_rank import LowRank
from ..settings import merging as declared
from .method import MOMENTS, LayerStack, Method
from .moments import Moment
from .sums import MergedLayer, merged_factors

if TYPE_CHECKING:
    from jaxtyping import Float

EXACT = 1e-6
RIDGE: float = declared.RIDGE.default


@torch.no_grad()
def fused_factors(
    adapters: Sequence[LowRank],
    strengths: Sequence[float],
    moments: Sequence[Float[Tensor, "width width"] | Moment],
    ridge: float = RIDGE,
) -> MergedLayer:
    """up = [s1 U1 | s2 U2 | ...], down = [D1 (C1 + mu1 I); D2 (C2 + mu2 I); ...] (sum C + mu I)^-1.

    moments: (n, n) each, n = in * kh * kw, symmetric, positive; of any common scale; or as `Moment`; on any device.
    Solved in float64; returned in float32, or float64 if the factors are.
    """
    if len(adapters) == 1:
        return merged_factors(adapters, strengths)
    first = adapters[0]
    damped = [_damp(moment.to(first.lora_up.device), ridge) for moment in moments]
    ups = [adapter.full_up().double() * (s * adapter.scale) for adapter, s in zip(adapters, strengths, strict=True)]
    read = torch.cat([_read(a.lora_down.flatten(1).double(), c) for a, c in zip(adapters, damped, strict=True)])
    few = [moment for moment in damped if isinstance(moment, Moment)]
    if len(few) == len(damped) and sum(len(moment.factor) for moment in few) < read.shape[1]:
        down = _solve_by_directions(read, few)
    else:
        total = sum((m.matrix() if isinstance(m, Moment) else m for m in damped), torch.zeros(()))
        down = torch.linalg.solve(total, read.mT).mT
    dtype = torch.promote_types(first.lora_up.dtype, torch.float32)
    down = down.reshape(-1, *first.lora_down.shape[1:])
    return MergedLayer(torch.cat(ups, dim=1).to(dtype), down.to(dtype), None, first.out_features)


def _damp(moment: Tensor | Moment, ridge: float) -> Tensor | Moment:
    """C + mu I, mu relative to the mean of C's eigenvalues.  Inputs that never varied leave the identity."""
    if isinstance(moment, Moment):
        size = float(moment.factor.double().square().sum()) / moment.factor.shape[1] + moment.rest
        return Moment(moment.factor, moment.rest + (ridge * size if size > 0 else 1.0))
    moment = moment.double()
    size = float(moment.diagonal().mean())
    return moment + (ridge * size if size > 0 else 1.0) * torch.eye(len(moment)).to(moment)


def _read(down: Tensor, moment: Tensor | Moment) -> Tensor:
    """down C, float64."""
    if not isinstance(moment, Moment):
        return down @ moment
    factor = moment.factor.double()
    return (down @ factor.mT) @ factor + moment.rest * down


def _solve_by_directions(read: Tensor, moments: Sequence[Moment]) -> Tensor:
    """read (F^T F + t I)^-1, F all directions and t all rests."""
    stacked, rest = torch.cat([moment.factor.double() for moment in moments]), sum(moment.rest for moment in moments)
    inner = stacked @ stacked.mT + rest * torch.eye(len(stacked)).to(stacked)
    return (read - torch.linalg.solve(inner, stacked @ read.mT).mT @ stacked) / rest


def _merge_layer(stack: LayerStack) -> MergedLayer:
    return fused_factors(stack.adapters, stack.strengths, stack.moments, stack.options.ridge)


FUSION = Method("fusion", _merge_layer, needs=MOMENTS)
