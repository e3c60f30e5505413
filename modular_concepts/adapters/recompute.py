"""Activations that a frozen network need not keep, computed again in backward from what it keeps anyway.

SiLU behind a GroupNorm: the norm keeps its input, and its output follows from that.
GEGLU, x * gelu(gate): both halves are kept as they come from one Linear, so gelu(gate) need not be.
What comes out of these and of a LayerNorm knows its origin, so that an adapter whose lora_down trains need not keep
its input either (`adapters/adapted_linear.py`).
The numbers are the same bit for bit.  All are cheap to compute and as large as anything that is kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

# On an output: (what it was computed from, what computes it again, the output's version).
_ORIGIN = "_modular_concepts_origin"

Origin = tuple[Tensor, Callable[[Tensor], Tensor]]


def remember(output: Tensor, input: Tensor, again: Callable[[Tensor], Tensor]) -> Tensor:
    """Note on `output` that it is again(input); lost, harmlessly, with the next operation on it."""
    if not output.is_inference():  # those count no versions
        setattr(output, _ORIGIN, (input.detach(), again, output._version))
    return output


def origin_of(output: Tensor) -> Origin | None:
    """(input, again) with again(input) equal to `output`, or None where that is not known or no longer true."""
    noted: tuple[Tensor, Callable[[Tensor], Tensor], int] | None = getattr(output, _ORIGIN, None)
    return None if noted is None or noted[2] != output._version else noted[:2]


def activation_of(module: nn.Module) -> Callable | None:
    """A leaner forward for a SiLU or GEGLU module, else None.

    GEGLU is told by its class's name, since diffusers and hosts each have one of their own with a Linear `proj`.
    """
    if isinstance(module, nn.SiLU) and not module.inplace:
        return _silu
    project = getattr(module, "proj", None)
    if type(module).__name__ == "GEGLU" and isinstance(project, nn.Linear):
        return lambda x, *_, **__: _gated(project(x))
    return None


def _silu(y: Tensor) -> Tensor:
    origin = origin_of(y)
    if origin is None:
        return remember(F.silu(y), y, F.silu)
    input, again = origin
    return remember(_SiLU.apply(y, input, again), input, lambda x: F.silu(again(x)))


def _gated(both: Tensor) -> Tensor:
    return remember(_Gated.apply(both), both, _gated_product)


def _gated_product(both: Tensor) -> Tensor:
    x, gate = both.chunk(2, dim=-1)
    return x * F.gelu(gate)


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
        return _gated_product(both)

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
