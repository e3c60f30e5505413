"""Gradients through a frozen network that save nothing of its weights: no second copy, whatever holds them.

dL/dx of a layer needs its weight again, not a saved copy of it: Linear gives grad W, a convolution its
transpose.  A program that keeps its weights as inference tensors, on another device, or quantised, can be
trained on this way: the weight is asked for at each forward and backward pass, and let go.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from ..adapters.adapted_linear import AdaptedLinear, LowRankTerm, computed_in
from ..adapters.recompute import activation_of, remember

Weights = Callable[[nn.Module, Tensor], AbstractContextManager[tuple[Tensor | None, Tensor | None]]]


def own_weights(module: Any, like: Tensor) -> AbstractContextManager[tuple[Tensor | None, Tensor | None]]:
    """(weight, bias) of a module in the dtype and on the device of `like`; a missing one is None."""
    parameters = (module.weight, getattr(module, "bias", None))
    weight, bias = (None if value is None else value.detach().to(like) for value in parameters)
    return nullcontext((weight, bias))


@contextmanager
def frozen_forward(networks: Iterable[nn.Module], weights: Weights = own_weights) -> Generator[None]:
    """Within the block every Linear, Conv2d, LayerNorm, GroupNorm, RMSNorm and Embedding of `networks` is frozen.

    Outputs are the same bit for bit; gradients reach inputs and never parameters; hooks act as before.
    weights(module, like): how a layer's weight and bias are had in the dtype and on the device of `like`.
    A layer that is frozen already, by a block around this one, stays as it is.
    The modules' own forwards come back on leaving, also by an exception.
    """
    before = []
    try:
        for module in dict.fromkeys(part for network in networks for part in network.modules()):
            frozen = _frozen(module, weights)
            if frozen is not None:
                before.append((module, module.__dict__.get("forward")))
                module.forward = frozen
        yield
    finally:
        for module, forward in before:
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _frozen(module: nn.Module, weights: Weights) -> Callable | None:
    """The forward to put in place of the module's own, or None where it has no weight that we know."""
    if isinstance(vars(module).get("forward"), FrozenForward):
        return None
    if isinstance(module, nn.Embedding):
        return torch.no_grad()(module.forward)
    if type(module).__name__ == "RMSNorm" and module.weight is not None:  # many programs have one of their own
        return partial(_rms_norm, module, weights)
    if isinstance(module, nn.Conv2d) and (isinstance(module.padding, str) or module.padding_mode != "zeros"):
        return None
    for kind, function in _FUNCTIONS.items():
        if isinstance(module, kind):
            return FrozenForward(function, module, weights)
    return activation_of(module)


def _rms_norm(module: Any, weights: Weights, input: Tensor) -> Tensor:
    """Its weight is so small, one number for each feature of a head, that a copy may be kept."""
    with weights(module, input) as (weight, _):
        weight = cast(Tensor, weight)  # `_frozen` lets no other in
        return F.rms_norm(input, weight.shape, weight.clone(), module.eps)


class FrozenForward:
    """What stands in place of a layer's forward.

    low_rank: what gives a term that joins a Linear's output in the same node of autograd, or None
    (`adapters/attach.py`).
    """

    def __init__(self, function: type[Function], module: nn.Module, weights: Weights):
        self.function, self.weights = function, weights
        self.module: Any = module  # of the kind that goes with the function
        self.low_rank: Callable[[], LowRankTerm] | None = None

    @property
    def takes_low_rank(self) -> bool:
        return self.function is _Linear and self.low_rank is None

    def __call__(self, input: Tensor) -> Tensor:
        if self.function is _GroupNorm:
            input = input.contiguous()
            return remember(_GroupNorm.apply(input, self.module, self.weights), input, self.normalised)
        if self.function is _LayerNorm:
            copied = input.detach().clone()
            return remember(_LayerNorm.apply(input, copied, self.module, self.weights), copied, self.normalised)
        if self.low_rank is None:
            return self.function.apply(input, self.module, self.weights)
        term = self.low_rank()
        return AdaptedLinear.apply(input, term.up, term.down, self.module, self.weights, term)

    def normalised(self, x: Tensor) -> Tensor:
        """A GroupNorm's or LayerNorm's output, with nothing for autograd."""
        with self.weights(self.module, x) as (weight, bias):
            if self.function is _LayerNorm:
                return F.layer_norm(x, self.module.normalized_shape, weight, bias, self.module.eps)
            return F.group_norm(x, self.module.num_groups, weight, bias, self.module.eps)


class _Linear(Function):
    @staticmethod
    def forward(ctx, x, module, weights):
        ctx.module, ctx.weights = module, weights
        with weights(module, computed_in(x)) as (weight, bias):
            return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        with ctx.weights(ctx.module, grad) as (weight, _):
            return grad @ weight, None, None


class _Conv2d(Function):
    @staticmethod
    def forward(ctx, x, module, weights):
        ctx.module, ctx.weights, ctx.shape = module, weights, x.shape
        with weights(module, computed_in(x)) as (weight, bias):
            return F.conv2d(x, weight, bias, module.stride, module.padding, module.dilation, module.groups)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        at = ctx.module
        with ctx.weights(at, grad) as (weight, _):
            grad = conv2d_input(ctx.shape, weight, grad, at.stride, at.padding, at.dilation, at.groups)
        return grad, None, None


class _LayerNorm(Function):
    """The input is kept as a copy, `kept`, since the text model of some programs adds to it in place."""

    @staticmethod
    def forward(ctx, x, kept, module, weights):
        with weights(module, x) as (weight, bias):
            out, mean, deviation = torch.native_layer_norm(x, module.normalized_shape, weight, bias, module.eps)
        ctx.module, ctx.weights = module, weights
        ctx.save_for_backward(kept, mean, deviation)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, mean, deviation = ctx.saved_tensors
        with ctx.weights(ctx.module, x) as (weight, bias):
            grad, _, _ = torch.ops.aten.native_layer_norm_backward(
                grad.to(x), x, ctx.module.normalized_shape, mean, deviation, weight, bias, [True, False, False]
            )
        return grad, None, None, None


class _GroupNorm(Function):
    @staticmethod
    def forward(ctx, x, module, weights):
        ctx.module, ctx.weights = module, weights
        ctx.sizes = (x.shape[0], x.shape[1], x[0, 0].numel(), module.num_groups)
        with weights(module, x) as (weight, bias):
            out, mean, deviation = torch.native_group_norm(x, weight, bias, *ctx.sizes, module.eps)
        ctx.save_for_backward(x, mean, deviation)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, mean, deviation = ctx.saved_tensors
        with ctx.weights(ctx.module, x) as (weight, _):
            grad, _, _ = torch.ops.aten.native_group_norm_backward(
                grad.to(x).contiguous(), x, mean, deviation, weight, *ctx.sizes, [True, False, False]
            )
        return grad, None, None


_FUNCTIONS: dict[type[nn.Module], type[Function]] = {
    nn.Linear: _Linear,
    nn.Conv2d: _Conv2d,
    nn.LayerNorm: _LayerNorm,
    nn.GroupNorm: _GroupNorm,
}
