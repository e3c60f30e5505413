"""A frozen Linear and its low-rank adapter as one node of autograd: fewer passes over what is as large as the output.

    out    = W x + b + scale * up (down x)
    dL/dx  = W^T g + scale * down^T (up^T g),  dL/dup = scale * g (down x)^T,  dL/ddown = scale * (up^T g) x^T

Both sums are made in place of the larger part, and only the rank-wide down x is kept.  Where down trains, x is needed
too: computed again from what its own layer keeps (`recompute.py`), and kept itself only where that is not known.
A convolution's adapter has a node for down x alone, whose input is as large.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input, conv2d_weight

from .low_rank import ConvGeometry
from .recompute import origin_of


class LowRankTerm(NamedTuple):
    """scale * up (down x); rows: the output rows that up (rows, rank) writes, None for all (out, rank)."""

    up: Tensor
    down: Tensor
    scale: float
    rows: Tensor | None


def computed_in(x: Tensor) -> Tensor:
    """An example of what autocast makes of x in a product, so that a weight is cast once and not on the way too."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return x.new_empty(0, dtype=torch.get_autocast_dtype(kind))
    return x


class AdaptedLinear(Function):
    """apply(x, term.up, term.down, module, weights, term), with `weights` as in `frozen.frozen_forward`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor, module: nn.Module, weights, term: LowRankTerm) -> Tensor:
        with weights(module, computed_in(x)) as (weight, bias):
            out = F.linear(x, weight, bias)
        hidden = F.linear(x, down.to(x)).to(out.dtype).flatten(0, -2)
        rows = None if term.rows is None else term.rows.to(out.device)
        flat, factor = out.view(-1, out.shape[-1]), up.to(out.dtype).mT
        if rows is None:
            flat.addmm_(hidden, factor, alpha=term.scale)
        else:
            flat.index_add_(1, rows, hidden @ factor, alpha=term.scale)
        ctx.module, ctx.weights, ctx.scale = module, weights, term.scale
        source = _kept(ctx, x) if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(hidden, up, down, rows, source)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        hidden, up, down, rows, source = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        written = flat if rows is None else flat[:, rows]
        grad_x = grad_up = grad_down = None
        if ctx.needs_input_grad[1]:
            grad_up = (written.mT @ hidden).to(up.dtype).mul_(ctx.scale)
        grad_hidden = (written @ up.to(grad.dtype)).mul_(ctx.scale)
        if ctx.needs_input_grad[2]:
            x = ctx.again(source).to(grad.dtype)
            grad_down = (grad_hidden.mT @ x.flatten(0, -2)).to(down.dtype)
        if ctx.needs_input_grad[0]:
            with ctx.weights(ctx.module, grad) as (weight, _):
                grad_x = (flat @ weight).addmm_(grad_hidden, down.to(grad.dtype)).view(*grad.shape[:-1], -1)
        return grad_x, grad_up, grad_down, None, None, None


class ConvDown(Function):
    """apply(x, down, conv): a plain convolution, (B, in, H, W) -> (B, rank, H', W'), down (rank, in, kh, kw)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, conv: ConvGeometry) -> Tensor:
        ctx.conv, ctx.shape = conv, x.shape
        ctx.save_for_backward(down, _kept(ctx, x) if ctx.needs_input_grad[1] else None)
        return F.conv2d(x, down.to(x), None, conv.stride, conv.padding, conv.dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        down, source = ctx.saved_tensors
        how = (ctx.conv.stride, ctx.conv.padding, ctx.conv.dilation)
        grad_x = grad_down = None
        if ctx.needs_input_grad[0]:
            grad_x = conv2d_input(ctx.shape, down.to(grad.dtype), grad, *how)
        if ctx.needs_input_grad[1]:
            x = ctx.again(source).to(grad.dtype)
            grad_down = conv2d_weight(x, down.shape, grad, *how).to(down.dtype)
        return grad_x, grad_down, None


def _kept(ctx: Any, x: Tensor) -> Tensor:
    """What to keep for a backward pass that needs x, which ctx.again makes of it."""
    source, ctx.again = origin_of(x) or (x, _itself)
    return source


def _itself(x: Tensor) -> Tensor:
    return x
