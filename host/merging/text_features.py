"""How concepts' words look to the layers that read text, by the host's own text encoding."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import comfy.sd
import torch
from torch import Tensor, nn

from ...modular_concepts.concept import Concept
from ...modular_concepts.merging import Evidence
from ...modular_concepts.recording import PROMPTS, length_of, refuse_layerwise, rows_of_word, trigger_of, usual_rows
from ..model import HostModel
from ..text.words import encode_prompt
from .weights import merge_into

_USUAL: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, Tensor]] = weakref.WeakKeyDictionary()


@torch.no_grad()
def read_evidence(host: HostModel, stack: Sequence[tuple[Concept, float]]) -> Evidence:
    """What Custom Diffusion's merge must know: each concept's own words at strength 1, and ordinary captions."""
    merge_into(host.model, host.clip, stack)  # What does not fit together is refused before anything is encoded.
    texts = []
    for concept, _ in stack:
        trigger = trigger_of(concept)
        refuse_layerwise(concept)
        _, alone = merge_into(host.model, host.clip, [(concept, 1.0)])
        prompts = [prompt.replace("{concept}", trigger) for prompt in PROMPTS]
        contexts, bare = (
            [encode_prompt(alone, text)[0][0][0] for text in texts_of]
            for texts_of in (prompts, [text.replace(trigger, " ") for text in prompts])
        )
        vectors = sum(len(rows) for rows in concept.tokens.values())
        texts.append(rows_of_word(contexts, bare, vectors).float().cpu())
    return Evidence(texts=texts, usual=_usual(host))


def _usual(host: HostModel) -> Tensor:
    """Second moments of ordinary captions as this CLIP reads them; read once for a CLIP, its patches and its layer."""
    clip = host.clip
    state = (clip.patcher.patches_uuid, clip.layer_idx)
    read = _USUAL.get(clip.patcher.model)
    if read is None or read[0] != state:
        captions = host.family.family.ordinary()
        end = _ids(clip, "")[1]
        contexts = [encode_prompt(clip, text)[0][0][0] for text in captions]
        lengths = [length_of(_ids(clip, text), end) for text in captions]
        read = _USUAL[clip.patcher.model] = (state, usual_rows(contexts, lengths))
    return read[1]


def _ids(clip: comfy.sd.CLIP, text: str) -> list[int]:
    """What the first of its text encoders reads, with start, end and padding."""
    return [token[0] for chunk in next(iter(clip.tokenize(text).values())) for token in chunk]
