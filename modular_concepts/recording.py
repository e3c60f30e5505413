"""What a concept's layers read while it is drawn, and how its words look to the layers that read text.

Fusion and Custom Diffusion's merge need this beside the adapters.  It is had by drawing the concept alone, as
Mix-of-Show does it: no guidance, a few prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .adapters.sites import with_sites
from .concept import Concept
from .errors import AdapterError
from .merging.moments import Recorder, recording
from .models.base import BaseModel
from .models.targets import EVERYTHING, concept_layers
from .sampling import SampleSettings, customised, sample
from .settings import merging as declared
from .text.contexts import text_of
from .text.learned_word import layers_of

PROMPTS = ("a photo of a {concept}", "a {concept}", "{concept}")
PADDING = 4  # rows of a caption that all its padding counts as; a caption has three to twelve of its own
BATCH = 32
DRAWING = SampleSettings(steps=declared.RECORDED_STEPS.default, cfg=1.0, batch=8)


@torch.no_grad()
def recorded(
    base: BaseModel,
    concept: Concept,
    prompts: Sequence[str] = PROMPTS,
    count: int = declared.RECORDED_PICTURES.default,
    settings: SampleSettings = DRAWING,
    seed: int = 0,
) -> Recorder:
    """Everything that the concept's layers read while `count` pictures of it alone are drawn, at strength 1.

    prompts: used in turn, {concept} becomes the trigger.  Source: Mix-of-Show's gradient fusion, features recorded
    without guidance.
    """
    trigger = trigger_of(concept)
    texts = [prompts[index % len(prompts)].replace("{concept}", trigger) for index in range(count)]
    everything = with_sites(concept_layers(base, EVERYTHING))
    modules = {name: everything[name] for name in concept.layers if name in everything}
    with customised(base, [concept], [1.0]) as tokens, recording(modules) as recorder:
        sample(base, texts, range(seed, seed + count), tokens, settings)
    return recorder


@torch.no_grad()
def text_features(base: BaseModel, concept: Concept, prompts: Sequence[str] = PROMPTS) -> Tensor:
    """(rows, width) of what key and value layers see of the concept's own words, for Custom Diffusion's merge.

    On the CPU.  From the trigger's first token to the end mark, without padding, as the concept's own text encoder
    gives them.
    Raises AdapterError for a concept without a trigger, or with one that differs from layer to layer.
    """
    trigger = trigger_of(concept)
    refuse_layerwise(concept)
    texts = [prompt.replace("{concept}", trigger) for prompt in prompts]
    vectors = sum(len(rows) for rows in concept.tokens.values())
    with customised(base, [concept], [1.0]) as tokens:
        bare = text_of(base.context([text.replace(trigger, " ") for text in texts], {}))
        return rows_of_word([text_of(base.context([text], tokens))[0] for text in texts], bare, vectors).cpu()


def refuse_layerwise(concept: Concept) -> None:
    """Raise AdapterError for a word that differs from layer to layer."""
    if any(map(layers_of, concept.tokens.values())):
        raise AdapterError(
            f"{concept.name}: its word was learned for each layer apart, which this merge cannot answer; merge by sum"
        )


def rows_of_word(contexts: Sequence[Tensor], bare: Tensor | Sequence[Tensor], vectors: int) -> Tensor:
    """(rows, width): of each context (T, width) the word's own rows and the end mark, which padding follows.

    bare: the same prompts without the word; vectors: how many rows the word has.
    """
    rows = []
    for context, without in zip(contexts, bare, strict=True):
        differs = (context - without).abs().amax(1) > 1e-6
        first = int(differs.nonzero()[0])
        rows.append(context[first : first + vectors + 1])
    return torch.cat(rows)


@torch.no_grad()
def usual_text(base: BaseModel, prompts: Sequence[str] | None = None) -> Tensor:
    """(width, width) second moments of ordinary captions' text features, without any concept: see `usual_rows`.

    prompts: the base's own ordinary captions unless given.
    """
    texts = list(base.ordinary if prompts is None else prompts)
    end = int(base.tokenize([""], {})[0][1])
    contexts, lengths = [], []
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        contexts += list(text_of(base.context(batch, {})))
        lengths += [length_of(ids, end) for ids in base.tokenize(batch, {}).tolist()]
    return usual_rows(contexts, lengths)


def usual_rows(contexts: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
    """(width, width) float64 second moments of captions' rows on the CPU, from the start to the end mark each.

    contexts: (T, width) each; lengths: how many rows come before the padding.  What follows is most of a context, and
    nearly the same in all: it counts as `PADDING` rows of a caption, for the layers read it too, and no more.
    """
    total, weight = torch.zeros((), dtype=torch.float64), 0.0
    for context, length in zip(contexts, lengths, strict=True):
        rows, rest = context.double().cpu().split([length, len(context) - length])
        share = min(1.0, PADDING / max(1, len(rest)))
        total, weight = total + rows.mT @ rows + share * (rest.mT @ rest), weight + length + share * len(rest)
    return total / weight


def length_of(ids: Sequence[int], end: int) -> int:
    """How many ids a caption has from its start to its end mark; all where it was cut off."""
    return next((place + 1 for place, number in enumerate(ids) if place and number == end), len(ids))


def trigger_of(concept: Concept) -> str:
    """The first of a concept's trigger words.  AdapterError for one that has none."""
    words = list(concept.tokens) or list(concept.recipe.triggers)
    if not words:
        raise AdapterError(f"{concept.name} has no trigger word, so it cannot be asked for; merge it by sum")
    return words[0]
