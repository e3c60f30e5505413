"""What each row of a batch is: the positive prompt's or the negative's, by a mark that the conditioning carries.

The host numbers prompts by their place in the list that a guider gave, and guiders order theirs as they like.  It also
hands on an id of each prompt; so a table of ids is made when a guider asks, and patches look rows up in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import comfy.model_patcher
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from ...modular_concepts.errors import AdapterError

POSITIVE, NEGATIVE = 0, 1
MARK = "modular_concepts_kind"  # in a CONDITIONING: POSITIVE or NEGATIVE
KINDS = "modular_concepts_kinds"  # in transformer_options: id of a prompt -> its kind


def marked(conditioning: Sequence[Sequence], kind: int) -> list:
    """A CONDITIONING that says of itself which prompt it is; nodes that change it hand the mark on."""
    return [[context, {**about, MARK: kind}] for context, about in conditioning]


def with_kinds(model: comfy.model_patcher.ModelPatcher) -> None:
    """Let a clone's sampling make the table; once is enough."""
    model.remove_wrappers_with_key(WrappersMP.CALC_COND_BATCH, KINDS)
    add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KINDS, _asked, model.model_options, is_model_options=True)


def kinds_of(options: Mapping) -> list[int]:
    """POSITIVE or NEGATIVE for each prompt of a batch, in the batch's order.

    options: the host's transformer_options.  Without a table, in a call that no guider made, by the host's numbers.
    """
    if KINDS in options:
        return [options[KINDS][prompt] for prompt in options["uuids"]]
    return [POSITIVE if place == 0 else NEGATIVE for place in options["cond_or_uncond"]]


def _asked(calculate, model, prompts: Sequence[Sequence[Mapping] | None], x, timestep, model_options: dict):
    """The host's prediction for a guider's list of prompts, each a list of entries or None."""
    table = {
        entry["uuid"]: entry[MARK] if MARK in entry else _by_place(place, len(prompts))
        for place, entries in enumerate(prompts)
        for entry in entries or ()
    }
    options = {**model_options.get("transformer_options", {}), KINDS: table}
    return calculate(model, prompts, x, timestep, {**model_options, "transformer_options": options})


def _by_place(place: int, count: int) -> int:
    """The kind of a prompt without a mark, where the usual order tells it: [positive, negative]."""
    if count > 2:
        raise AdapterError(
            f"this guider asks for {count} prompts, one of which says nothing of regions; connect the positive and the "
            "negative of Regional Concepts to all of its inputs"
        )
    return POSITIVE if place == 0 else NEGATIVE
