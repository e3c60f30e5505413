"""Merged layers as activations: what they add is computed beside the weights at every step, and no weight changes.

For weights that cannot take a sum exactly (quantised ones) and for strengths that change often.  The host's own bypass
replaces a module's `forward`, and two of those on one module do not come off in order; forward hooks do.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

import comfy.model_base
import comfy.model_patcher
import torch
from comfy.patcher_extension import PatcherInjection, WrappersMP
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...modular_concepts.adapters.low_rank import ConvGeometry
from ...modular_concepts.merging import Merged, MergedSum
from ..called import Called, uncompiled

NAME = "modular_concepts"


class Beside:
    """One merged layer on the device and in the precision of what its module reads, prepared once for each.

    A sum prepares its factors without strengths (`modular_concepts/merging/sums.py`), and shares them with the sum of
    the same concepts at other strengths: a slider that moves copies nothing.
    """

    def __init__(self, merged: Merged):
        self.merged = merged
        self._ready: Merged | None = None
        self._for: tuple[torch.device, torch.dtype] | None = None
        self.called = False

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x, self.called = inputs[0], True
        if self._ready is None or self._for != (x.device, x.dtype):
            sum_of_factors = isinstance(self.merged, MergedSum)
            self._ready = self.merged if sum_of_factors else self.merged.to(x.device, x.dtype)
            self._for = (x.device, x.dtype)
        conv = ConvGeometry.of(module) if isinstance(module, nn.Conv2d) else None
        return output + self._ready.residual(x, conv).to(output.dtype)

    def forget(self) -> None:
        """What was prepared goes with the model that it was prepared for."""
        self._ready = self._for = None


def set_beside(patcher: comfy.model_patcher.ModelPatcher, layers: Mapping[str, Sequence[Merged]]) -> None:
    """Let a clone compute merged layers beside its weights whenever it is loaded.

    layers: weight key -> what is merged there, in turn; in the place of what was set before.
    """
    residuals = {key.removesuffix(".weight"): [Beside(merged) for merged in parts] for key, parts in layers.items()}
    # By model: clones share an injection, and a copy for another device has modules of its own.
    inside: weakref.WeakKeyDictionary[nn.Module, list[RemovableHandle]] = weakref.WeakKeyDictionary()

    def inject(loaded: comfy.model_patcher.ModelPatcher) -> None:
        if loaded.model not in inside:
            inside[loaded.model] = [
                loaded.model.get_submodule(path).register_forward_hook(part)
                for path, parts in residuals.items()
                for part in parts
            ]

    def eject(loaded: comfy.model_patcher.ModelPatcher) -> None:
        for handle in inside.pop(loaded.model, ()):
            handle.remove()
        for parts in residuals.values():
            for part in parts:
                part.forget()

    patcher.set_injections(NAME, [PatcherInjection(inject=inject, eject=eject)])
    if isinstance(patcher.model, comfy.model_base.BaseModel):
        patcher.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, NAME)
        patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, NAME, _heard(residuals))


def _heard(layers: Mapping[str, Sequence[Beside]]):
    """Around each call of the network: hooks are heard, and what goes around them is told of."""
    watch = Called("concepts as activations", "set apply to weights")

    def apply(apply_model, x, sigma, concat=None, context=None, control=None, options=None, **more):
        watch.look_at(apply_model.class_obj.diffusion_model, options)
        for part in (part for parts in layers.values() for part in parts):
            part.called = False
        with uncompiled():
            result = apply_model(x, sigma, concat, context, control, {} if options is None else options, **more)
        watch.count([path for path, parts in layers.items() if not all(part.called for part in parts)], len(layers))
        return result

    return apply
