"""Layer-wise contexts: every cross-attention layer of a U-Net reads a text of its own.  P+, Voynov et al. 2023.

A context (B, L, T, D) has one (B, T, D) for each of the L transformers, in the order in which the U-Net runs them:
down, middle, up.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from ..errors import AdapterError

_PARTS = ("down_blocks", "mid_block", "up_blocks")


def cross_attention_transformers(unet: nn.Module) -> dict[str, nn.Module]:
    """Path -> diffusers' Transformer2DModel, in running order, which is not that of the module tree."""
    transformers = {
        path: module
        for path, module in unet.named_modules()
        if path.startswith(_PARTS) and isinstance(getattr(module, "transformer_blocks", None), nn.ModuleList)
    }
    return {path: transformers[path] for path in sorted(transformers, key=_running_order)}


@contextmanager
def routed(unet: nn.Module, context: Tensor) -> Generator[None]:
    """Within the block transformer i of a U-Net that is given `context` (B, L, T, D) reads its slice i.

    The hooks are removed on leaving, also by an exception.
    Raises AdapterError for a context of another number of layers.
    """
    transformers = cross_attention_transformers(unet)
    if context.shape[1] != len(transformers):
        raise AdapterError(
            f"the text was encoded for {context.shape[1]} cross-attention layers, this base has {len(transformers)}"
        )
    handles = [
        module.register_forward_pre_hook(partial(_read_slice, index), with_kwargs=True)
        for index, module in enumerate(transformers.values())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _read_slice(index: int, _module: nn.Module, args: tuple, named: dict) -> tuple[tuple, dict]:
    return args, named | {"encoder_hidden_states": named["encoder_hidden_states"][:, index]}


def _running_order(path: str) -> tuple[int, list[int]]:
    part = path.split(".", 1)[0]
    return _PARTS.index(part), [int(number) for number in re.findall(r"\d+", path)]
