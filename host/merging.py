"""Merging as a node asks for it: patched clones, and words for what a family costs."""

from __future__ import annotations

from collections.abc import Sequence

import comfy.model_patcher
import comfy.sd

from ..modular_concepts.concept import Concept
from ..modular_concepts.merge import MergeOptions, merge_concepts
from ..modular_concepts.merge.truncation import share_kept
from .messages import show_text
from .patching import merged


def merged_by(
    model: comfy.model_patcher.ModelPatcher,
    clip: comfy.sd.CLIP,
    stack: Sequence[tuple[Concept, float]],
    family: str,
    options: MergeOptions,
) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP]:
    """`merged`; a cut to a lower rank says on the node what it keeps of the sum."""
    result = merged(model, clip, stack, family, options=options)
    if family == "svd":
        show_text(kept_by_cut(stack, options))
    return result


def kept_by_cut(stack: Sequence[tuple[Concept, float]], options: MergeOptions) -> str:
    concepts, strengths = [concept for concept, _ in stack], [strength for _, strength in stack]
    cut = merge_concepts(concepts, strengths, "svd", options=options)
    kept = share_kept(cut, merge_concepts(concepts, strengths))
    return f"rank {options.rank} keeps {kept:.1%} of the sum's energy, {1 - kept:.1%} is lost"
