"""Gradient fusion by the papers' own procedure, which the closed form is measured against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def fused_by_descent(deltas: Sequence[Tensor], inputs: Sequence[Tensor], iterations: int = 500) -> Tensor:
    """L-BFGS on mean |D X - delta_i X_i|^2 from D = 0.

    deltas: (out, n), strengths inside; inputs: (rows, n) each.  Returns the fused delta (out, n), float32.
    Source: Mix-of-Show's code (lr 1, history 25, strong Wolfe line search, tolerance 1e-16); it descends on W = W0 + D.
    """
    x = torch.cat(list(inputs)).float()
    wanted = torch.cat([i.float() @ d.float().mT for i, d in zip(inputs, deltas, strict=True)])
    with torch.inference_mode(False), torch.enable_grad():
        x, wanted = x.clone(), wanted.clone()
        fused = torch.zeros_like(deltas[0], dtype=torch.float32).requires_grad_()
        optimizer = torch.optim.LBFGS(
            [fused],
            lr=1,
            max_iter=iterations,
            history_size=25,
            line_search_fn="strong_wolfe",
            tolerance_grad=1e-16,
            tolerance_change=1e-16,
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = (x @ fused.mT - wanted).square().mean()
            value.backward()
            return value

        optimizer.step(loss)
    return fused.detach()
