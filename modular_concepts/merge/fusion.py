"""Gradient fusion in closed form: the weight that answers each concept's own inputs as that concept alone would.

Mix-of-Show (Gu et al. 2023, section 3.2) minimises sum_i |W X_i - (W0 + strength_i delta_i) X_i|^2 from W0 by
L-BFGS over recorded inputs.  The targets are exact, so the minimum is known:

    W = W0 + (sum_i strength_i delta_i C_i) (sum_i C_i + mu I)^-1,    C_i = X_i X_i^T.

Only second moments of the inputs are needed, no inputs; the answer has the rank of the sum; mu takes the place
of stopping early.  Moments in few directions, C_i = F_i^T F_i + r_i I, are never written out: with all F_i stacked
and t = mu + sum r_i, (F^T F + t I)^-1 = (I - F^T (t I + F F^T)^-1 F) / t.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..adapters import LowRank
from ..moments import Moment
from .sums import MergedLayer

# mu relative to the mean variance of an input.  Directions in which the recorded inputs hardly vary are answered at
# any price if it is small, and prompts that were not recorded vary there.  Five toy LoRAs, energy of their own answers
# that is missed on recorded inputs and on new prompts, and how far pictures by new prompts move from each one alone
# (of 255): 0.11, 1.38, 11 with 1e-6; 0.11, 0.90, 8.7 with 1e-3; 0.19, 0.26, 6.8 with 0.1; 0.23, 0.27, 7.1 with 0.3;
# the plain sum 3.9, 3.9, 18.  Pictures without a concept move less the larger mu is, so 0.3 (`python -m bench.fusion`).
RIDGE = 0.3


@torch.no_grad()
def fused_factors(
    adapters: Sequence[LowRank], strengths: Sequence[float], moments: Sequence[Tensor | Moment], ridge: float = RIDGE
) -> MergedLayer:
    """up = [s1 U1 | s2 U2 | ...], down = [D1 C1; D2 C2; ...] (sum C + mu I)^-1.

    moments: (n, n) each, n = in * kh * kw, symmetric, positive; of any common scale; or as `Moment`; on any device.
    Solved in float64; returned in float32, or float64 if the factors are.
    """
    first = adapters[0]
    moments = [moment.to(first.lora_up.device) for moment in moments]
    ups = [adapter.full_up().double() * (s * adapter.scale) for adapter, s in zip(adapters, strengths, strict=True)]
    read = torch.cat([_read(a.lora_down.flatten(1).double(), c) for a, c in zip(adapters, moments, strict=True)])
    if all(isinstance(moment, Moment) for moment in moments) and sum(len(m.factor) for m in moments) < read.shape[1]:
        down = _solved_by_directions(read, moments, ridge)
    else:
        down = _solved(read, sum(m.matrix() if isinstance(m, Moment) else m.double() for m in moments), ridge)
    dtype = torch.promote_types(first.lora_up.dtype, torch.float32)
    down = down.reshape(-1, *first.lora_down.shape[1:])
    return MergedLayer(torch.cat(ups, dim=1).to(dtype), down.to(dtype), None, first.out_features)


def _read(down: Tensor, moment: Tensor | Moment) -> Tensor:
    """down C, float64."""
    if not isinstance(moment, Moment):
        return down @ moment.double()
    factor = moment.factor.double()
    return (down @ factor.mT) @ factor + moment.rest * down


def _solved(read: Tensor, total: Tensor, ridge: float) -> Tensor:
    """read (total + mu I)^-1."""
    damped = total + _mu(total.diagonal().mean(), ridge) * torch.eye(len(total)).to(total)
    return torch.linalg.solve(damped, read.mT).mT


def _solved_by_directions(read: Tensor, moments: Sequence[Moment], ridge: float) -> Tensor:
    stacked, rest = torch.cat([moment.factor.double() for moment in moments]), sum(moment.rest for moment in moments)
    damping = rest + _mu(stacked.square().sum() / stacked.shape[1] + rest, ridge)
    inner = stacked @ stacked.mT + damping * torch.eye(len(stacked)).to(stacked)
    return (read - torch.linalg.solve(inner, stacked @ read.mT).mT @ stacked) / damping


def _mu(size: Tensor, ridge: float) -> Tensor | float:
    """The damping for inputs of this mean variance.  Inputs that never varied leave the identity."""
    return ridge * size if size > 0 else 1.0


def fused_by_descent(deltas: Sequence[Tensor], inputs: Sequence[Tensor], iterations: int = 500) -> Tensor:
    """The same by the papers' procedure, as a reference: L-BFGS on mean |D X - delta_i X_i|^2 from D = 0.

    deltas: (out, n), strengths inside; inputs: (rows, n) each.  Returns the fused delta (out, n), float32.
    Source: Mix-of-Show's code (lr 1, history 25, strong Wolfe line search, tolerance 1e-16); it descends on W = W0 + D.
    """
    x = torch.cat(list(inputs)).float()
    wanted = torch.cat([i.float() @ d.float().mT for i, d in zip(inputs, deltas, strict=True)])
    with torch.inference_mode(False), torch.enable_grad():
        x, wanted = x.clone(), wanted.clone()
        found = torch.zeros_like(deltas[0], dtype=torch.float32).requires_grad_()
        optimizer = torch.optim.LBFGS(
            [found],
            lr=1,
            max_iter=iterations,
            history_size=25,
            line_search_fn="strong_wolfe",
            tolerance_grad=1e-16,
            tolerance_change=1e-16,
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = (x @ found.mT - wanted).square().mean()
            value.backward()
            return value

        optimizer.step(loss)
    return found.detach()
