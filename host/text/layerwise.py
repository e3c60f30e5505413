"""Words that mean something else to each cross-attention layer (P+, ED-LoRA), while the host samples.

A layer-wise prompt is a context for each layer.  They ride behind each other in the one context that the host
carries, and a patch hands each layer its own; other prompts of the same sampling are repeated to that length, which
attention does not notice, so that positive and negative still go through the network as one batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import comfy.model_patcher
import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.patcher_extension import WrappersMP
from einops import rearrange, repeat
from torch import Tensor

from ...modular_concepts.errors import AdapterError
from ...modular_concepts.text.learned_word import LearnedWord
from ..families.cross_attention import TEXT_PATCHES

LAYERS = "modular_concepts_layers"  # in a CONDITIONING: (1, L, T, D)


def cross_attention_layers(model: comfy.model_patcher.ModelPatcher) -> int:
    """How many contexts a layer-wise prompt has: one for each of the U-Net's transformers, 16 in SD1.5; 0 elsewhere.

    The host counts them in the order in which it runs them: input, middle, output (`transformer_index`).
    """
    return sum(isinstance(part, SpatialTransformer) for part in model.model.diffusion_model.modules())


def refuse_other_layers(words: Iterable[LearnedWord], layers: int) -> None:
    """Raise AdapterError for a layer-wise word that was learned for another number of layers."""
    for word in words:
        if word.layers and not layers:
            raise AdapterError(
                f"{word.trigger} was learned for each cross-attention layer apart, and this model has none; "
                "use it with a model of the family that it was trained on"
            )
        if word.layers not in (0, layers):
            raise AdapterError(
                f"{word.trigger} was learned for {word.layers} cross-attention layers, and this model has {layers}; "
                "use it with a model of the family that it was trained on"
            )


def with_layers(model: comfy.model_patcher.ModelPatcher) -> None:
    """Let a clone's sampling know layer-wise prompts; nothing changes for others, and once is enough."""
    model.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, LAYERS)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, LAYERS, _outer_sample)


def stacked(contexts: Tensor, length: int | None = None) -> Tensor:
    """(B, L, T, D) -> (B, L * length, D), each layer's tokens repeated to `length`, a multiple of T."""
    repeats = (length or contexts.shape[2]) // contexts.shape[2]
    return repeat(contexts, "b l t d -> b (l repeats t) d", repeats=repeats)


def own_context(layers: int, context: Tensor, options: Mapping) -> Tensor:
    """Of a stacked context (B, L * T, D), the T tokens of the transformer that asks just now."""
    return rearrange(context, "b (l t) d -> b l t d", l=layers)[:, options["transformer_index"]]


class PickLayer:
    """A patch of the texts of cross-attention: each transformer listens to its own part of a stacked context."""

    def __init__(self, layers: int):
        self.layers = layers

    def __call__(self, hidden: Tensor, context: Tensor, value: Tensor, options: dict) -> tuple:
        context_here = own_context(self.layers, context, options)
        return hidden, context_here, context_here if value is context else own_context(self.layers, value, options)


def _outer_sample(sample, *args, **kwargs):
    """The host's sampling of one picture, its prompts brought to one shape if any is layer-wise."""
    guider = sample.class_obj
    conditions = [entry for entries in guider.conds.values() for entry in entries]
    counts = {entry[LAYERS].shape[1] for entry in conditions if LAYERS in entry}
    if not counts:
        return sample(*args, **kwargs)
    layers = cross_attention_layers(guider.model_patcher)
    if counts != {layers}:
        raise AdapterError(
            f"the prompt's learned word has {' and '.join(map(str, sorted(counts)))} layers and this model {layers}; "
            "use the model that the concept was trained for"
        )
    texts = [entry for entry in conditions if entry.get("cross_attn") is not None]
    length = math.lcm(*(entry["cross_attn"].shape[1] for entry in texts))
    for entry in texts:
        plain = entry["cross_attn"]
        if any("control" in one for one in conditions):
            # A ControlNet has its own transformers, which know nothing of layers.
            entry.setdefault("cross_attn_controlnet", plain)
        contexts = entry.pop(LAYERS) if LAYERS in entry else plain[:, None].expand(-1, layers, -1, -1)
        entry["cross_attn"] = stacked(contexts, length)
    patches = guider.model_options.setdefault("transformer_options", {}).setdefault("patches", {})
    # Before all others, which then see what they would have seen without layers.
    patches[TEXT_PATCHES] = [PickLayer(layers), *patches.get(TEXT_PATCHES, [])]
    return sample(*args, **kwargs)


def choose(contexts: Tensor, options: Mapping) -> Tensor:
    """(1, T, D) for the transformer that asks just now, of a context (1, T, D) or a layer-wise one (1, L, T, D)."""
    return contexts[:, options["transformer_index"]] if contexts.dim() == 4 else contexts


def joined(contexts: Sequence[Tensor]) -> Tensor:
    """Contexts behind each other: (1, sum of T, D), or (1, L, sum of T, D) if any is layer-wise."""
    layers = max((context.shape[1] for context in contexts if context.dim() == 4), default=None)
    if layers is None:
        return torch.cat(list(contexts), dim=-2)
    return torch.cat(
        [context if context.dim() == 4 else context[:, None].expand(-1, layers, -1, -1) for context in contexts], dim=-2
    )
