"""Which inputs of a node mean nothing beside which others: the one table by which nodes say so before they work.

What a method of merging or training does not read is in `modular_concepts/unread.py`, for the shell too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from comfy_api.latest import io

EDGES = ("left", "top", "right", "bottom")


@dataclass(frozen=True)
class Unused:
    """inputs: those that mean nothing where `when`, asked of all the node's values, is true; why: the reason."""

    inputs: tuple[str, ...]
    when: Callable[[Mapping], bool]
    why: str


_PREVIEWS = Unused(("preview_prompt",), lambda values: not values["preview_every"], "preview_every is 0")
_COMPANY = Unused(("company_pictures",), lambda values: not values["company"], "company is 0")
_BASIS_RANK = Unused(("rank",), lambda values: values["ortho_basis"] is not None, "the connected basis sets the rank")
_HASHED = Unused(
    ("slot",),
    lambda values: values["ortho_basis"].slot_policy != "slot",
    "the basis is set to take the columns from the concept's name",
)
_GUIDANCE = Unused(("negative",), lambda values: values["cfg"] <= 1, "cfg is 1, which is no guidance")

TABLE: Mapping[str, tuple[Unused, ...]] = {
    "OrthoBasisLoader": (
        Unused(("kind", "seed"), lambda values: values["basis"] != "generated", "the basis is a file"),
    ),
    "OrthoLoRATrainer": (_HASHED, _PREVIEWS, _COMPANY),
    "BlockLoRATrainer": (_BASIS_RANK, _PREVIEWS, _COMPANY),
    **dict.fromkeys(
        ("OwnWordTrainer", "LoRATrainer", "WordTrainer", "CustomDiffusionTrainer", "EDLoRATrainer"),
        (_PREVIEWS, _COMPANY),
    ),
    "LoRAToConcept": (
        Unused(("name",), lambda values: not isinstance(values["lora"], Mapping), "files have their own names"),
    ),
    "ConceptRegion": (
        Unused((*EDGES, "bounding_box"), lambda values: values["mask"] is not None, "the mask takes their place"),
        Unused(
            EDGES,
            lambda values: values["mask"] is None and values["bounding_box"] is not None,
            "the bounding box takes their place",
        ),
        Unused(
            (*EDGES, "feather"),
            lambda values: values["units"] == "automatic" and values["mask"] is None and values["bounding_box"] is None,
            "with automatic units the sampler finds the place",
        ),
    ),
    "RegionPreview": (Unused(("width", "height"), lambda values: values["image"] is not None, "the image has a size"),),
    "RegionalConceptSampler": (_GUIDANCE,),
    "FindRegions": (_GUIDANCE,),
}


def unused(node: type[io.ComfyNode], values: Mapping) -> list[str]:
    """A sentence for inputs that were set, to other than their widgets start with, and that nothing reads.

    values: the node's inputs by name; those that are missing count as they start.
    """
    schema = node.define_schema()
    starts = {entry.id: getattr(entry, "default", None) for entry in schema.inputs}
    chosen = {**starts, **values}
    sentences = []
    for rule in TABLE[schema.node_id]:
        names = [name for name in rule.inputs if _is_set(chosen[name], starts[name])]
        if names and rule.when(chosen):
            change = "changes" if len(names) == 1 else "change"
            sentences.append(f"{' and '.join(names)} {change} nothing: {rule.why}")
    return sentences


def _is_set(value: object, start: object) -> bool:
    if isinstance(value, str) and isinstance(start, str):
        return value.strip() not in ("", start.strip())
    return value is not None and (start is None or value != start)
