"""Adapters on a loaded model for the length of a `with` block; the model itself is never written."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import AdapterError
from .adapted_linear import ConvDown, LowRankTerm
from .low_rank import ConvGeometry, LowRank, scatter_rows
from .sites import Site


class Residual(Protocol):
    """What `attached` needs of an adapter that is not a LowRank, a merged layer for instance."""

    def residual(self, x: Tensor, conv: ConvGeometry | None = None, /) -> Tensor: ...


@contextmanager
def attached(
    layers: Mapping[str, nn.Module | Site],
    adapters: Mapping[str, LowRank | Residual],
    strength: float = 1.0,
    erasure: Mapping[str, Tensor] | None = None,
) -> Generator[None]:
    """Within the block each layer gives layer(x) + strength * adapter.residual(x).

    layers: layer name -> Linear, Conv2d or `Site`; adapters: layer name -> adapter, on the layer's device.
    erasure: layer name -> 0/1 mask (lora_up rows,), read anew at each forward pass; training only.
    Hooks do it, or the layer's own forward where it `takes_low_rank` (`training/frozen.py`); both end on leaving, also
    by an exception.
    Strength 0 attaches nothing.
    Raises AdapterError for an adapter whose layer is not in `layers`.
    """
    missing = [name for name in adapters if name not in layers]
    if missing:
        raise AdapterError(
            f"{missing[0]}: the adapter has no layer of this name in the model ({len(missing)} of "
            f"{len(adapters)} adapters do not fit); it was trained on another architecture"
        )
    with ExitStack() as stack:
        for name, adapter in adapters.items() if strength != 0 else ():
            mask, place = _mask_of(name, erasure), layers[name]
            module = place.module if isinstance(place, Site) else place
            if isinstance(place, Site) and isinstance(adapter, LowRank):
                adapter = place.lifted(adapter)
            forward: Any = vars(module).get("forward")
            if isinstance(adapter, LowRank) and adapter.kind != "full" and getattr(forward, "takes_low_rank", False):
                forward.low_rank = _term(adapter, strength, mask)
                stack.callback(setattr, forward, "low_rank", None)
            else:
                hook = _hook(place, adapter, strength, mask)
                stack.callback(module.register_forward_hook(hook).remove)
        yield


@contextmanager
def frozen_networks(modules: Iterable[nn.Module]) -> Generator[None]:
    """Within the block no parameter of `modules` asks for gradients and dropout is off; then as before."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    training = [part for module in modules for part in module.modules() if part.training]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        for part in training:
            part.training = False
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for part in training:
            part.training = True


def _mask_of(name: str, erasure: Mapping[str, Tensor] | None) -> Callable[[], Tensor | None]:
    return (lambda: None) if erasure is None else (lambda: erasure.get(name))


def _term(adapter: LowRank, strength: float, mask: Callable[[], Tensor | None]) -> Callable[[], LowRankTerm]:
    def term() -> LowRankTerm:
        erased = mask()
        up = adapter.lora_up if erased is None else adapter.lora_up * erased[:, None]
        return LowRankTerm(up, adapter.lora_down, strength * adapter.scale, adapter.rows)

    return term


def _hook(
    place: nn.Module | Site, adapter: LowRank | Residual, strength: float, mask: Callable[[], Tensor | None]
) -> Callable:
    conv = ConvGeometry.of(place) if isinstance(place, nn.Conv2d) else None
    if not isinstance(adapter, LowRank):

        def add_any(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            extra = adapter.residual(args[0]) if conv is None else adapter.residual(args[0], conv)
            if isinstance(place, Site):
                return output.index_add(-1, place.rows.to(output.device), extra.to(output.dtype), alpha=strength)
            return torch.add(output, extra, alpha=strength)

        return add_any
    if conv is not None:

        def add_conv(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output.add_(_conv_residual(args[0], adapter, conv, mask()), alpha=strength)

        return add_conv

    def add_linear(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return _plus_low_rank(output, args[0], adapter, strength, mask())

    return add_linear


def _plus_low_rank(output: Tensor, x: Tensor, adapter: LowRank, strength: float, mask: Tensor | None) -> Tensor:
    """output + strength * adapter.residual(x) for a Linear, in one fused pass over the output.

    Only the rank-wide hidden and the factors are kept for backward, x too where lora_down trains.
    """
    up, down = adapter.lora_up, adapter.lora_down
    if mask is not None:
        up = up * mask[:, None]
    hidden = x if adapter.kind == "full" else F.linear(x, down.to(x))
    scale = strength * adapter.scale
    if adapter.rows is not None:
        return output.index_add(
            -1, adapter.rows.to(output.device), F.linear(hidden, up.to(x)).to(output.dtype), alpha=scale
        )
    flat = torch.addmm(output.flatten(0, -2), hidden.flatten(0, -2), up.to(x).mT, alpha=scale)
    return flat.view(output.shape)


def _conv_residual(x: Tensor, adapter: LowRank, conv: ConvGeometry, mask: Tensor | None) -> Tensor:
    """adapter.residual(x, conv, mask), with less kept for backward where the adapter is a plain one."""
    down = adapter.lora_down
    if adapter.kind == "full" or conv.groups != 1 or isinstance(conv.padding, str):
        return adapter.residual(x, conv, mask)
    up = adapter.lora_up if mask is None else adapter.lora_up * mask[:, None]
    hidden = ConvDown.apply(x, down if down.dim() == 4 else down[:, :, None, None], conv)
    written = F.conv2d(hidden, (adapter.scale * up).to(hidden)[:, :, None, None])
    return scatter_rows(written, adapter.rows, adapter.out_features, dim=1)
