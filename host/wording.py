"""How concepts' words look to the layers that read text, by the host's own text encoding."""

from __future__ import annotations

from collections.abc import Sequence

import comfy.model_patcher
import comfy.sd
import torch

from ..modular_concepts.concept import Concept
from ..modular_concepts.evidence import ORDINARY, PROMPTS, refuse_layerwise, rows_of_word, trigger_of
from ..modular_concepts.merge import Evidence
from .clip import encode_prompt
from .patching import merged


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
        asked = [prompt.replace("{concept}", trigger) for prompt in PROMPTS]
        contexts, bare = (
            [encode_prompt(alone, text)[0][0][0] for text in given]
            for given in (asked, [text.replace(trigger, " ") for text in asked])
        )
        vectors = sum(len(rows) for rows in concept.tokens.values())
        texts.append(rows_of_word(contexts, bare, vectors).float().cpu())
    rows = torch.cat([encode_prompt(clip, text)[0][0][0] for text in ORDINARY]).double().cpu()
    return Evidence(texts=texts, usual=rows.mT @ rows / len(rows))
