"""Prompts as the host's own nodes encode them, for a training: in batches, and with gradients to learned words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import comfy.sd
import torch
from einops import rearrange
from torch import Tensor

from ...modular_concepts.errors import AdapterError
from ...modular_concepts.text.learned_word import LearnedWord
from ..families.family import HostFamily
from ..families.lookup import host_family_of_texts
from ..layers import text_encoders_of
from .words import MEAN, at_layer, key_of, layers_in, with_words


class HostContext(NamedTuple):
    """What models with two text encoders are told: text (B, T, D), (B, L, T, D) layer-wise, and pooled (B, P)."""

    text: Tensor
    pooled: Tensor


def check_text_models(clip: comfy.sd.CLIP, family: HostFamily) -> None:
    """Raise AdapterError for a CLIP that does not belong to the family, or lacks a text model that words are for."""
    whole, there, wanted = clip.cond_stage_model, text_encoders_of(clip), family.family.text_encoders
    if family.clip_model is not None and not (isinstance(whole, family.clip_model) and len(there) == len(wanted)):
        raise AdapterError(
            f"the CLIP is a {type(whole).__name__} with {' and '.join(there)}, and training on {family.family.title} "
            f"needs its own {' and '.join(encoder.title for encoder in wanted)}; load a checkpoint that holds them, or "
            "both with DualCLIPLoader or TripleCLIPLoader"
        )
    if family.clip_model is None and len(there) != 1:
        raise AdapterError(
            f"the CLIP is a {type(whole).__name__} with {len(there)} text models where {family.family.title} has one; "
            "connect the CLIP that belongs to the model"
        )


def contexts(
    clip: comfy.sd.CLIP,
    prompts: Sequence[str],
    words: Sequence[LearnedWord],
    read: dict[tuple[int, ...], Tensor],
) -> Tensor | HostContext:
    """What the model is told of each prompt, learned words standing for their rows.

    With a layer-wise word text is (B, L, T, D), and pooled that of the layers' mean.  T5 reads class words.
    read: what T5 made of token ids before, which never changes; more is put there.
    Brackets in a prompt are words, not weights.  Prompts longer than one section lengthen all of them.
    """
    speaking = with_words(clip, words)
    layers = max((word.layers for word in words), default=0)
    apart = [bool(layers_in(speaking, prompt)) for prompt in prompts]
    mean = at_layer(speaking, MEAN) if layers else speaking
    texts = [mean.tokenize(prompt, disable_weights=True) for prompt in prompts]
    for layer in range(layers if any(apart) else 0):
        here = at_layer(speaking, layer)
        texts += [here.tokenize(prompts[i], disable_weights=True) for i, is_apart in enumerate(apart) if is_apart]
    text, pooled = _encoded(clip, texts, read)
    if layers:
        text = _by_layer(text, apart, layers)
    return text if pooled is None else HostContext(text, pooled[: len(prompts)])


def _by_layer(text: Tensor, apart: Sequence[bool], layers: int) -> Tensor:
    """(B + L * those apart, T, D), all prompts and then those apart for one layer after another -> (B, L, T, D)."""
    rows, places = list(text[: len(apart), None].expand(-1, layers, -1, -1)), [i for i, one in enumerate(apart) if one]
    for number, at in enumerate(places):
        rows[at] = text[len(apart) + number :: len(places)]
    return torch.stack(rows)


def _encoded(
    clip: comfy.sd.CLIP, texts: Sequence[Mapping[str, list]], read: dict[tuple[int, ...], Tensor]
) -> tuple[Tensor, Tensor | None]:
    """(text, pooled or None) of prompts as the host's tokenizers read them, put together as the host's encoder does."""
    whole, empty = clip.cond_stage_model, clip.tokenize("", disable_weights=True)
    whole.reset_clip_options()
    if clip.layer_idx is not None:
        whole.set_clip_options({"layer": clip.layer_idx})
    whole.set_clip_options({"execution_device": clip.patcher.load_device})
    hidden, pooled = {}, {}
    for name, encoder in text_encoders_of(clip).items():
        sections = [text[key_of(name)] for text in texts]
        longest = max(map(len, sections))
        padded = [each + empty[key_of(name)] * (longest - len(each)) for each in sections]
        text, summary = encoder([[token for token, *_ in section] for each in padded for section in each])[:2]
        hidden[name] = rearrange(text, "(b sections) t d -> b (sections t) d", b=len(texts))
        # The host takes that of the first section.
        pooled[name] = rearrange(summary, "(b sections) d -> b sections d", b=len(texts))[:, 0]
    return host_family_of_texts(clip).put_together(clip, hidden, pooled, texts, read)
