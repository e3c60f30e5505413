"""Merging as a node asks for it: patched clones, and words for what a method costs and what does not belong there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

import comfy.model_patcher
import comfy.sd

from ...modular_concepts.concept import Concept
from ...modular_concepts.crosstalk.report import warnings_between, warnings_on_base
from ...modular_concepts.merging import MergeOptions, merge_concepts
from ...modular_concepts.merging.method import TEXTS
from ...modular_concepts.merging.methods import Merge
from ...modular_concepts.merging.own_words import EVERYWHERE, as_acting, split
from ...modular_concepts.merging.truncation import SVD, share_kept
from ...modular_concepts.stack import Stack
from ...modular_concepts.unread import MERGE, find_unread
from ..layers import quantised
from ..messages import show_text
from ..model import HostModel
from .text_features import read_evidence
from .weights import merge_into

APPLY = ("weights", "activations")


def merge_by(
    host: HostModel,
    stack: Sequence[tuple[Concept, float]],
    merge: Merge,
    apply: str = APPLY[0],
    act_on: str = EVERYWHERE,
) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP]:
    """`merge_into`, and on the node: warnings, and what a cut to a lower rank keeps of the sum.

    merge: by any method but fusion, which draws first (`fusion.fuse`).  apply: one of `APPLY`.
    """
    divided = split(Stack.of(stack), act_on, merge.how)
    if merge.method.needs == TEXTS:
        merge = replace(merge, evidence=read_evidence(host, stack))
    result = merge_into(host.model, host.clip, stack, merge, apply == "activations", act_on)
    chosen = [name for name, value in asdict(merge.options).items() if value != getattr(MergeOptions(), name)]
    acting = [(as_acting(concept, act_on), strength) for concept, strength in stack]
    sentences = [*find_unread(MERGE, chosen, merge.how), *divided.notes, *warnings_of(host, acting, apply)]
    if merge.how == SVD.name:
        sentences.append(kept_by_cut(stack, merge.options))
    if sentences:
        show_text("\n".join(sentences))
    return result


def warnings_of(host: HostModel, stack: Sequence[tuple[Concept, float]], apply: str = "") -> list[str]:
    """What a person should know of these concepts together and on this model, each with the way out."""
    sentences = [*warnings_between(Stack.of(stack).concepts), *warnings_here(host, stack)]
    if apply == "weights" and quantised(host.model):
        sentences.append(
            "the model's weights are quantised: the sum is rounded to their few bits, which can lose as much as the "
            "concepts bring; set apply to activations"
        )
    return sentences


def warnings_here(host: HostModel, stack: Sequence[tuple[Concept, float]]) -> list[str]:
    """What a person should know of each of these concepts on this model."""
    return warnings_on_base(Stack.of(stack).concepts, host.known_hash, host.sample)


def kept_by_cut(stack: Sequence[tuple[Concept, float]], options: MergeOptions) -> str:
    concepts, strengths = Stack.of(stack).concepts, Stack.of(stack).strengths
    cut = merge_concepts(concepts, strengths, SVD.name, options=options)
    share = share_kept(cut, merge_concepts(concepts, strengths))
    return f"rank {options.rank} keeps {share:.1%} of the sum's energy, {1 - share:.1%} is lost"
