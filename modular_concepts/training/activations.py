"""Activations that a frozen network need not keep, computed again in backward from what it keeps anyway.

SiLU behind a GroupNorm: the norm keeps its input, and its output follows from that.
GEGLU, x * gelu(gate): both halves are kept as they come from one Linear, so gelu(gate) need not be.
The numbers are the same bit for bit.  Both are cheap to compute and as large as anything that is kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

# On a norm's output: (the norm's input, what gives the output again from it).
_ORIGIN = "_modular_concepts_origin"


def remember(output: Tensor, input: Tensor, again: Callable[[Tensor], Tensor]) -> Tensor:
    """Note on `output` that it is again(input); lost, harmlessly, with the next operation on it."""
    setattr(output, _ORIGIN, (input.detach(), again))
    return output


def activation_of(module: nn.Module) -> Callable | None:
    """A leaner forward for a SiLU or GEGLU module, else None.

    GEGLU is told by its class's name, since diffusers and hosts each have one of their own with a Linear `proj`.
    """
    if isinstance(module, nn.SiLU) and not module.inplace:
        return _silu
    if type(module).__name__ == "GEGLU" and isinstance(getattr(module, "proj", None), nn.Linear):
        return lambda x, *_, **__: _Gated.apply(module.proj(x))
    return None


def _silu(y: Tensor) -> Tensor:
    origin = getattr(y, _ORIGIN, None)
    return F.silu(y) if origin is None else _SiLU.apply(y, *origin)


class _SiLU(Function):
    @staticmethod
    def forward(ctx, y, input, again):
        ctx.again = again
        ctx.save_for_backward(input)
        return F.silu(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (input,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad, ctx.again(input)), None, None


class _Gated(Function):
    """(..., 2 width) -> (..., width): the first half times gelu of the second."""

    @staticmethod
    def forward(ctx, both):
        ctx.save_for_backward(both)
        x, gate = both.chunk(2, dim=-1)
        return x * F.gelu(gate)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (both,) = ctx.saved_tensors
        x, gate = both.chunk(2, dim=-1)
        result = torch.empty_like(both)
        grad_x, grad_gate = result.chunk(2, dim=-1)
        torch.mul(grad, F.gelu(gate), out=grad_x)
        grad_gate.copy_(torch.ops.aten.gelu_backward(grad * x, gate))
        return result
