"""How concepts' words look to the layers that read text, by the host's own text encoding."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import comfy.model_patcher
import comfy.sd
import torch
from torch import Tensor, nn

from ...modular_concepts.concept import Concept
from ...modular_concepts.merging import Evidence
from ...modular_concepts.recording import PROMPTS, length_of, refuse_layerwise, rows_of_word, trigger_of, usual_rows
from ..families.lookup import host_family_of
from ..text.words import encode_prompt
from .weights import merged

_USUAL: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, Tensor]] = weakref.WeakKeyDictionary()


@torch.no_grad()
def spoken_evidence(
    model: comfy.model_patcher.ModelPatcher, clip: comfy.sd.CLIP, stack: Sequence[tuple[Concept, float]]
) -> Evidence:
    """What Custom Diffusion's merge must know: each concept's own words at strength 1, and ordinary captions."""
    merged(model, clip, stack)  # What does not fit together is refused before anything is encoded.
    texts = []
    for concept, _ in stack:
        trigger = trigger_of(concept)
        refuse_layerwise(concept)
        _, alone = merged(model, clip, [(concept, 1.0)])
        prompts = [prompt.replace("{concept}", trigger) for prompt in PROMPTS]
        contexts, bare = (
            [encode_prompt(alone, text)[0][0][0] for text in wording]
            for wording in (prompts, [text.replace(trigger, " ") for text in prompts])
        )
        vectors = sum(len(rows) for rows in concept.tokens.values())
        texts.append(rows_of_word(contexts, bare, vectors).float().cpu())
    return Evidence(texts=texts, usual=_usual(model, clip))


def _usual(model: comfy.model_patcher.ModelPatcher, clip: comfy.sd.CLIP) -> Tensor:
    """Second moments of ordinary captions as this CLIP reads them; read once for a CLIP, its patches and its layer."""
    state = (clip.patcher.patches_uuid, clip.layer_idx)
    stored = _USUAL.get(clip.cond_stage_model)
    if stored is None or stored[0] != state:
        captions = host_family_of(model).family.ordinary()
        end = _ids(clip, "")[1]
        contexts = [encode_prompt(clip, text)[0][0][0] for text in captions]
        lengths = [length_of(_ids(clip, text), end) for text in captions]
        stored = _USUAL[clip.cond_stage_model] = (state, usual_rows(contexts, lengths))
    return stored[1]


def _ids(clip: comfy.sd.CLIP, text: str) -> list[int]:
    """What the first of its text encoders reads, with start, end and padding."""
    return [token[0] for chunk in next(iter(clip.tokenize(text).values())) for token in chunk]
