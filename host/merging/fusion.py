"""Gradient fusion in the host: what each concept's layers read is recorded while it is drawn alone, and kept.

Moments lie beside the concept file as NAME.moments, so that they are recorded once for a concept's content
and a base; a concept that came straight from a trainer, or was changed since it was loaded, is drawn each time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import comfy.model_patcher
import comfy.sample
import comfy.sd
import comfy.utils
import torch

from ...modular_concepts.concept import Concept
from ...modular_concepts.errors import AdapterError
from ...modular_concepts.files.moments import Recorded, load_moments, moments_path, recorded_from, save_moments, why_not
from ...modular_concepts.merging import Evidence, MergeOptions
from ...modular_concepts.merging.fusion import FUSION
from ...modular_concepts.merging.methods import Merge
from ...modular_concepts.merging.moments import Moment, recording
from ...modular_concepts.merging.own_words import split
from ...modular_concepts.models.fingerprint import concept_mark
from ...modular_concepts.recording import PROMPTS, trigger_of
from ...modular_concepts.settings import merging as declared
from ...modular_concepts.stack import Stack
from ..called import uncompiled
from ..files.concepts import file_of
from ..layers import host_layers
from ..model import HostModel
from ..text.words import encode_prompt
from .notices import warnings_of
from .weights import merge_into

SAMPLER = ("euler", "normal")


@dataclass(frozen=True)
class Drawing:
    """How a concept is drawn to be recorded: prompts in turn, {concept} becomes its trigger; no guidance.

    size: width and height in pixels.  Raises AdapterError for no prompt at all.
    """

    prompts: Sequence[str] = PROMPTS
    pictures: int = declared.RECORDED_PICTURES.default
    steps: int = declared.RECORDED_STEPS.default
    size: int = declared.RECORDED_SIDE.default
    seed: int = 0

    def __post_init__(self):
        if not any(self.texts()):
            raise AdapterError(f"there is no prompt to draw the concepts with; give one a line, such as {PROMPTS[0]}")

    def texts(self) -> list[str]:
        return [prompt.strip() for prompt in self.prompts if prompt.strip()]

    def said(self) -> str:
        """What a file of moments says of it, so that another drawing is noticed."""
        return json.dumps([self.texts(), self.pictures, self.steps, self.size])


def fuse(
    host: HostModel,
    stack: Sequence[tuple[Concept, float]],
    drawing: Drawing,
    ridge: float,
    anew: bool = False,
    beside: bool = False,
) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, str]:
    """(MODEL, CLIP, where each concept's moments came from and warnings, for a person); see `merging/fusion.py`.

    anew: record also what a file beside the concept already says.  beside: as `merge_into`.
    """
    # What does not fit together is refused before anything is drawn.
    split(Stack.of(stack), how=FUSION.name)
    merge_into(host.model, host.clip, stack)
    bar, moments, sentences = comfy.utils.ProgressBar(len(stack)), [], []
    for concept, _ in stack:
        each, source = _find_moments(host, concept, drawing, anew)
        moments.append(each)
        sentences.append(f"{concept.name}: {source}")
        bar.update(1)
    options, evidence = MergeOptions(ridge=ridge), Evidence(moments)
    result = merge_into(host.model, host.clip, stack, Merge(FUSION.name, options=options, evidence=evidence), beside)
    return *result, "\n".join([*sentences, *warnings_of(host, stack, "" if beside else "weights")])


def _find_moments(host: HostModel, concept: Concept, drawing: Drawing, anew: bool) -> tuple[Mapping[str, Moment], str]:
    file = file_of(concept)
    beside = None if file is None else moments_path(file)
    reason = "" if beside is None or anew else why_not_kept(concept, host.mark)
    if beside is not None and not anew and not reason:
        other = recorded_from(beside).drawing != drawing.said()
        hint = " (recorded with other prompts, pictures, steps or size; tick anew to record these)" if other else ""
        return load_moments(beside), f"moments read from {beside.name}{hint}"
    moments = record(host, concept, drawing)
    text = f"moments recorded from {drawing.pictures} pictures"
    if beside is None:
        return moments, text
    if beside.is_file() and reason:
        text += f", since {beside.name} {reason}"
    try:
        save_moments(moments, beside, Recorded(concept_mark(concept), host.mark, drawing.said()))
    except AdapterError as error:  # what was drawn for is used all the same
        return moments, f"{text}, but not kept: {error}"
    # As they will be read, so that the second time gives the same picture as the first.
    return load_moments(beside), f"{text}, kept in {beside.name}"


def kept_moments(concept: Concept) -> Mapping[str, Moment] | None:
    """The moments beside a concept's file, if they are of the content that the concept has, on whatever base."""
    file = file_of(concept)
    return None if file is None or why_not_kept(concept) else load_moments(moments_path(file))


def why_not_kept(concept: Concept, mark: str = "") -> str:
    """Why no moments beside a concept's file can be read for it, on the base of this mark; "" where they can."""
    file = file_of(concept)
    beside = None if file is None else moments_path(file)
    if beside is None or not beside.is_file():
        return "is not there"
    return why_not(recorded_from(beside), concept, mark)


@torch.no_grad()
def record(host: HostModel, concept: Concept, drawing: Drawing) -> dict[str, Moment]:
    """Draw a concept alone at strength 1 with the host's own sampler, and record what its layers read."""
    texts = drawing.texts()
    if any("{concept}" in text for text in texts):
        trigger = trigger_of(concept)
        texts = [text.replace("{concept}", trigger) for text in texts]
    everything = host_layers(host.model, host.clip)
    alone, alone_clip = merge_into(host.model, host.clip, [(concept, 1.0)])
    side = max(1, drawing.size // host.scale)
    shape = (1, host.latent_format.latent_channels, side, side)
    modules = {name: everything[name].module for name in concept.layers}
    with recording(modules) as recorder, uncompiled():
        for number in range(drawing.pictures):
            positive = encode_prompt(alone_clip, texts[number % len(texts)])
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(drawing.seed + number))
            latent = torch.zeros_like(noise)
            comfy.sample.sample(
                alone,
                noise,
                drawing.steps,
                1.0,
                *SAMPLER,
                positive,
                positive,
                latent,
                disable_pbar=True,
                seed=drawing.seed,
            )
    return recorder.moments()
