"""Concepts as one of the host's weight hooks: keyframes change their strength while sampling, prompts turn them on."""

from __future__ import annotations

from collections.abc import Sequence

import comfy.hooks
import comfy.model_patcher
from comfy.weight_adapter.base import WeightAdapterBase

from ...modular_concepts.concept import Concept
from ...modular_concepts.errors import AdapterError
from ...modular_concepts.merging.own_words import acts_by_word
from ..model import HostModel
from .weights import merge_into


def make_hook(host: HostModel, stack: Sequence[tuple[Concept, float]]) -> comfy.hooks.HookGroup:
    """One hook with the sum of the concepts: one adapter for each layer, whatever their number.

    host: says where the layers are, and stays as it is.  Raises AdapterError as `weights.merge_into`.
    """
    for concept, _ in stack:
        if acts_by_word(concept):
            raise AdapterError(
                f"{concept.name} acts at its own words alone, which need no hook: a text that does not say them is "
                "drawn as without it; connect it to Merge Concepts"
            )
    changed, changed_clip = merge_into(host.model, host.clip, stack)
    hook = comfy.hooks.WeightHook()
    hook.need_weight_init = False
    hook.weights, hook.weights_clip = _added(host.model, changed), _added(host.clip.patcher, changed_clip.patcher)
    group = comfy.hooks.HookGroup()
    group.add(hook)
    return group


def _added(
    before: comfy.model_patcher.ModelPatcher, after: comfy.model_patcher.ModelPatcher
) -> dict[str, WeightAdapterBase]:
    """Weight key -> the adapter that a clone has and its original has not."""
    counts = {key: len(patches) for key, patches in before.patches.items()}
    return {key: patches[-1][1] for key, patches in after.patches.items() if len(patches) > counts.get(key, 0)}
