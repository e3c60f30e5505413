"""Whether layers with hooks are called at all: compiled networks and fused kernels go around hooks.

A network that was traced does not look for hooks that come later, and keeps those that were there.  So where a MODEL
has hooks of ours its network runs as it was written; what still goes around a layer is told of in one sentence.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager

import torch
from comfy.patcher_extension import WrappersMP
from torch import nn

from ..modular_concepts.errors import AdapterError
from .messages import show_text

COMPILED = "torch.compile"  # the host's name for its wrapper


@contextmanager
def uncompiled() -> Generator[None]:
    """Within the block networks that were compiled run as they were written, which all hooks are for.

    Raises AdapterError where torch is too old for it.
    """
    if "torch._dynamo" not in sys.modules:  # nothing can be compiled, and importing it takes seconds
        yield
        return
    if not hasattr(torch.compiler, "set_stance"):
        raise AdapterError(
            "concepts as activations and gated regions cannot tell this torch to run a network uncompiled; use torch "
            "2.6 or newer, or set apply to weights and the regions to merged"
        )
    with torch.compiler.set_stance("force_eager"):
        yield


class Called:
    """Says, once for a MODEL, what goes around the layers of its network that have hooks.

    what: what the hooks are for.  way_out: what to do instead.
    """

    def __init__(self, what: str, way_out: str):
        self.what, self.way_out = what, way_out
        self._said: set[str] = set()
        self._called = False

    def look_at(self, network: nn.Module, options: Mapping | None) -> None:
        """Before a call of a network: whether it was compiled.  options: the call's transformer_options."""
        wrappers = (options or {}).get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
        first, self._called = not self._called, True
        if wrappers.get(COMPILED) or (first and _is_compiled(network)):
            self._say(
                "compiled",
                f"the model is compiled, and {self.what} have to hear every layer: it is drawn as it was before "
                f"compiling, at that speed; {self.way_out} to draw with the compiled one",
            )

    def count(self, silent: Sequence[str], layers: int) -> None:
        """After a call.  silent: the layers whose hooks were not called in it, of so many with hooks."""
        if silent:
            self._say(
                "silent",
                f"{len(silent)} of {layers} layers ({silent[0]} first) are computed without being called, by a fused "
                f"kernel or another node: {self.what} do not act there; {self.way_out}, or take the model from before "
                "that node",
            )

    def _say(self, kind: str, sentence: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            logging.warning(sentence)
            show_text(sentence)


def _is_compiled(network: nn.Module) -> bool:
    """Whether a network or any part of it was compiled, in place or into another module."""
    return "torch._dynamo" in sys.modules and any(
        hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None
        for part in network.modules()
    )
