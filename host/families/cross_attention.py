"""The host's words for a U-Net's cross-attention: its patches, its replacements, and the places that have one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import comfy.model_patcher

from ...modular_concepts.families.unet import CROSS_ATTENTION

TEXT_PATCHES = f"{CROSS_ATTENTION}_patch"


def patch_texts(model: comfy.model_patcher.ModelPatcher, patch: Callable) -> None:
    """Have a clone call `patch` (hidden, context, value, options) before each cross-attention reads its text."""
    model.set_model_attn2_patch(patch)


def replace_attention(model: comfy.model_patcher.ModelPatcher, attend: Callable, block: str, number: int) -> None:
    """Have a clone call `attend` (query, key, value, options) in one cross-attention."""
    model.set_model_attn2_replace(attend, block, number)


def replacements_in(options: Mapping) -> Mapping:
    """(block, number, ...) -> what stands in a cross-attention's place, of transformer_options."""
    return options.get("patches_replace", {}).get(CROSS_ATTENTION, {})


def text_patches_in(options: Mapping) -> list:
    """What changes the texts that cross-attentions read, of transformer_options."""
    return options.get("patches", {}).get(TEXT_PATCHES, [])


def blocks_of(unet: Any) -> list[tuple[str, int]]:
    """The host's names of the places in a U-Net where a cross-attention can be replaced."""
    counts = {"input": len(unet.input_blocks), "middle": 1, "output": len(unet.output_blocks)}
    return [(name, number) for name, count in counts.items() for number in range(count)]
