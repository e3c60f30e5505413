"""The tensors of a merged layer, for who keeps and moves them without looking into it: ComfyUI's weight patches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor

from .methods import Merged


def tensors_of(merged: Merged) -> list[Tensor]:
    """All tensors of a merged layer, detached, in an order of its own; nothing is copied."""
    return list(_walk(merged))


def with_tensors(merged: Merged, tensors: Iterable[Tensor]) -> Merged:
    """The same merged layer with other tensors in place of `tensors_of`, such as copies on another device."""
    return _replaced(merged, iter(tensors))


def _walk(part: Any) -> Iterator[Tensor]:
    if isinstance(part, Tensor):
        yield part.detach()
    elif isinstance(part, tuple):
        for entry in part:
            yield from _walk(entry)
    elif is_dataclass(part):
        for field in fields(part):
            yield from _walk(getattr(part, field.name))


def _replaced(part: Any, tensors: Iterator[Tensor]) -> Any:
    """`part` with each tensor that `_walk` meets replaced by the next one."""
    if isinstance(part, Tensor):
        return next(tensors)
    if isinstance(part, tuple):
        return tuple(_replaced(entry, tensors) for entry in part)
    if is_dataclass(part):
        return replace(part, **{field.name: _replaced(getattr(part, field.name), tensors) for field in fields(part)})
    return part
