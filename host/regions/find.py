"""Places for regions that have none: the first steps are drawn once to hear where each concept's words are said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import comfy.model_patcher
import comfy.sd
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from nodes import common_ksampler

from ...modular_concepts.concept import Concept
from ...modular_concepts.errors import AdapterError
from ...modular_concepts.merging.own_words import split_gated
from ...modular_concepts.regions.assignment import acting, called
from ...modular_concepts.regions.find import HeardWords, disjoint_masks
from ...modular_concepts.regions.geometry import Region
from ...modular_concepts.regions.moment import Moment
from ...modular_concepts.regions.shares import Places
from ...modular_concepts.stack import Stack
from ..model import HostModel
from ..text.layerwise import with_layers
from ..text.words import encode_prompt, word_positions
from .cross_attention import attention, replace_cross_attention
from .gating import HostGate, act_by_text, fitting_stack, with_concepts, with_words
from .kinds import POSITIVE, kinds_of
from .scene import Sampling, Scene

FIRST = 0.4  # of the steps; the earlier half of them shows noise alone
KEY = "modular_concepts_scout"


def place_regions(host: HostModel, scene: Scene, latent: dict, how: Sampling) -> list[Region]:
    """Regions of which those without a place have a mask, where their concepts' words are heard in the first steps.

    The steps are drawn with the noise and the settings `how` of the picture itself, all concepts acting everywhere.
    The global prompt should call the concepts; where it does not, the regions' prompts are said behind it.
    Raises AdapterError for a region without a concept, for several pictures at once and for diffusion transformers.
    """
    searched = [number for number, region in enumerate(scene.regions) if region.unplaced]
    if not searched:
        return list(scene.regions)
    _check(host, latent)
    stack = fitting_stack(host, scene.stack)
    wanted = _wanted(stack, scene.regions, searched)
    prompt = _whole_prompt(stack, scene.prompts[0], wanted)
    residuals = split_gated(stack, scene.act_on)
    host, by_word = with_words(host, stack, residuals), {residual.owner for residual in residuals}
    words = [_positions(host.clip, prompt, region, [stack[n][0] for n in numbers]) for region, numbers in wanted]
    reading = with_concepts(host, Stack(pair for number, pair in enumerate(stack) if number not in by_word))
    positive, negative = (encode_prompt(reading, text) for text in (prompt, scene.prompts[1]))
    heard = HeardWords(words, positive[0][0].shape[1], tuple(latent["samples"].shape[-2:]))
    steps = max(1, round(FIRST * how.steps))
    everyone = tuple(range(len(stack)))
    gate = HostGate(host, stack, [everyone], Places([]), by_word)
    scout = _scouting(act_by_text(host, residuals, [everyone]), gate, heard, steps // 2)
    if stack.layerwise:
        with_layers(scout)
    common_ksampler(
        scout, how.seed, how.steps, how.cfg, how.sampler, how.scheduler, positive, negative, latent, how.denoise,
        last_step=steps,
    )  # fmt: skip
    placed = list(scene.regions)
    for number, mask in zip(searched, disjoint_masks(heard.maps()), strict=True):
        placed[number] = replace(placed[number], mask=mask)
    return placed


def _check(host: HostModel, latent: dict) -> None:
    if host.family.family.denoiser.joint:
        raise AdapterError(
            "the model is a diffusion transformer, whose words' places are not looked for; draw a box or a mask for "
            "each region"
        )
    if len(latent["samples"]) != 1:
        raise AdapterError(
            f"{len(latent['samples'])} pictures are drawn at once, and regions without a place lie elsewhere in each; "
            "draw one at a time, or give each region a box or a mask"
        )


def _wanted(stack: Stack, regions: Sequence[Region], searched: Sequence[int]) -> list[tuple[Region, tuple[int, ...]]]:
    """The regions that are searched for, each with the numbers of its concepts."""
    acts = acting(stack, "", regions)[1:]
    wanted = [(regions[number], acts[number]) for number in searched]
    for region, numbers in wanted:
        if not numbers:
            raise AdapterError(
                f"region {region.prompt!r} has neither a place nor a concept, so there is no word to look "
                "for; draw a box or a mask, or name a concept of the stack in it"
            )
    return wanted


def _whole_prompt(stack: Stack, prompt: str, wanted: Sequence[tuple[Region, tuple[int, ...]]]) -> str:
    """The global prompt if it calls all concepts that are looked for; else with the regions' prompts behind it."""
    if {number for _, numbers in wanted for number in numbers} <= set(called(stack, prompt)):
        return prompt
    return ", ".join(part for part in (prompt.strip(), *(region.prompt for region, _ in wanted)) if part)


def _positions(clip: comfy.sd.CLIP, prompt: str, region: Region, concepts: Sequence[Concept]) -> list[int]:
    words = {word for concept in concepts for word in (*concept.tokens, *concept.recipe.triggers)}
    positions = sorted({position for word in words for position in word_positions(clip, prompt, word)})
    if not positions:
        raise AdapterError(
            f"region {region.prompt!r} has no place, and neither it nor the global prompt says "
            f"{' or '.join(sorted(words))}, by which one could be found; say it in one of them"
        )
    return positions


def _scouting(
    model: comfy.model_patcher.ModelPatcher, gate: HostGate, heard: HeardWords, first: int
) -> comfy.model_patcher.ModelPatcher:
    """A clone in which all concepts act everywhere, and whose attention to words is noted from step `first` on."""
    model = model.clone()

    def attend(query: Tensor, key: Tensor, value: Tensor, options: dict) -> Tensor:
        if options[KEY]:
            kinds = kinds_of(options)
            each = len(query) // len(kinds)
            for chunk, kind in enumerate(kinds):
                if kind == POSITIVE:
                    rows = slice(chunk * each, (chunk + 1) * each)
                    heard.hear(query[rows], key[rows], options["n_heads"])
        return attention(query, key, value, options)

    def call(apply_model, x, sigma, concat=None, context=None, control=None, options: Any = None, **more):
        late = bool(sigma.flatten()[0] <= options["sample_sigmas"][first])
        moment = Moment(tuple(x.shape[-2:]), lengths=())
        with gate.attached(apply_model.class_obj.diffusion_model, moment, options):
            return apply_model(x, sigma, concat, context, control, {**options, KEY: late}, **more)

    replace_cross_attention(model, attend)
    add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, call, model.model_options, is_model_options=True)
    return model
