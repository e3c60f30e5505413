"""Concepts as one of the host's weight hooks: keyframes change their strength while sampling, prompts turn them on."""

from __future__ import annotations

from collections.abc import Sequence

import comfy.hooks
import comfy.model_patcher
import comfy.sd
from comfy.weight_adapter.base import WeightAdapterBase

from ...modular_concepts.concept import Concept
from .weights import merged


def hook_of(
    model: comfy.model_patcher.ModelPatcher, clip: comfy.sd.CLIP, stack: Sequence[tuple[Concept, float]]
) -> comfy.hooks.HookGroup:
    """One hook with the sum of the concepts: one adapter for each layer, whatever their number.

    model, clip: say where the layers are, and stay as they are.  Raises AdapterError as `patching.merged`.
    """
    changed, changed_clip = merged(model, clip, stack)
    hook = comfy.hooks.WeightHook()
    hook.need_weight_init = False
    hook.weights, hook.weights_clip = _added(model, changed), _added(clip.patcher, changed_clip.patcher)
    group = comfy.hooks.HookGroup()
    group.add(hook)
    return group


def _added(
    before: comfy.model_patcher.ModelPatcher, after: comfy.model_patcher.ModelPatcher
) -> dict[str, WeightAdapterBase]:
    """Weight key -> the adapter that a clone has and its original has not."""
    counts = {key: len(patches) for key, patches in before.patches.items()}
    return {key: entries[-1][1] for key, entries in after.patches.items() if len(entries) > counts.get(key, 0)}
