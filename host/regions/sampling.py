"""Pictures by region in the host: a MODEL and prompts in which every region has a text of its own, for any sampler.

One pass for all regions at every step: `cross_attention.py` has what the cross-attention of a U-Net does for it,
`gating.py` what lets each concept act in its region alone, `joint_attention.py` what the attention of a diffusion
transformer does.  Nothing else of the sampling changes, so any sampler works and no region draws a random number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import comfy.model_patcher
import comfy.sample
import comfy.sd
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from comfy_execution.utils import get_executing_context
from torch import Tensor

from nodes import common_ksampler

from ...modular_concepts.errors import AdapterError
from ...modular_concepts.regions.assignment import acting, check_names, unheard
from ...modular_concepts.regions.geometry import Region, region_weights
from ...modular_concepts.regions.shares import Places
from ...modular_concepts.regions.warnings import doubtful_places
from ...modular_concepts.settings.drawing import MODE
from ...modular_concepts.stack import NO_CONCEPTS, Stack
from ..families.cross_attention import replacements_in, text_patches_in
from ..families.lookup import host_family_of
from ..layers import architecture_of
from ..merging.notices import warnings_here, warnings_of
from ..merging.weights import concepts_in, is_inside, merged, merged_concepts
from ..messages import show_text
from ..text.layerwise import LAYERS, with_layers
from ..text.words import encode_prompt, warnings_of_words
from .controlnet import weighted
from .cross_attention import PROGRESS, Clock, Listening
from .find import found_regions
from .gating import HostGate, check_memory, fitting_stack, with_concepts, with_words
from .joint_attention import JointListening
from .kinds import NEGATIVE, POSITIVE, marked, with_kinds

MODES = MODE.choices
REGIONS = "modular_concepts_regions"
FROM_NOISE = 0.9  # share of the largest sigma from which on a sampling starts from noise alone


@dataclass(frozen=True)
class Sampling:
    """The host's KSampler settings.  Raises AdapterError for numbers that are none."""

    sampler: str
    scheduler: str
    steps: int
    cfg: float
    seed: int
    denoise: float = 1.0

    def __post_init__(self):
        for name in ("cfg", "denoise"):
            if not math.isfinite(getattr(self, name)):
                raise AdapterError(f"{name} is {getattr(self, name)}; it must be a finite number")


class Regional(NamedTuple):
    """What a sampler of the host takes: a MODEL that knows the regions, and CONDITIONING of the global prompts."""

    model: comfy.model_patcher.ModelPatcher
    positive: list
    negative: list


def sample_regions(
    model: comfy.model_patcher.ModelPatcher,
    clip: comfy.sd.CLIP,
    stack: Stack,
    prompts: tuple[str, str],
    regions: Sequence[Region],
    latent: dict,
    how: Sampling,
    mode: str = "merged",
    overlap: str = "average",
    notes: Sequence[str] = (),
) -> dict:
    """LATENT drawn with the stack's concepts and a prompt for each region; otherwise as `with_regions`.

    Regions without a place get one first (`automatic.found_regions`).
    """
    placed, drawn = _all_placed(model, clip, stack, prompts, regions, latent, how)
    size = tuple(drawn["samples"].shape[-2:])
    regional = with_regions(model, clip, stack, placed, prompts, mode, overlap, size, notes)
    (result,) = common_ksampler(
        regional.model,
        how.seed,
        how.steps,
        how.cfg,
        how.sampler,
        how.scheduler,
        regional.positive,
        regional.negative,
        drawn,
        how.denoise,
    )
    return result


def find_regions(
    model: comfy.model_patcher.ModelPatcher,
    clip: comfy.sd.CLIP,
    stack: Stack,
    prompts: tuple[str, str],
    regions: Sequence[Region],
    latent: dict,
    how: Sampling,
    overlap: str = "average",
) -> tuple[tuple[Region, ...], Tensor]:
    """The regions, each with a place, and MASK (R, H, W) of them in the picture's pixels."""
    if not regions:
        raise AdapterError("there is no region; connect a Concept Region")
    placed, drawn = _all_placed(model, clip, stack, prompts, regions, latent, how)
    height, width = (side * _scale(model) for side in drawn["samples"].shape[-2:])
    return tuple(placed), region_weights(placed, height, width, overlap)


def _all_placed(model, clip, stack, prompts, regions, latent: dict, how: Sampling) -> tuple[list[Region], dict]:
    """Regions in fractions of the latent's picture, those without a place in the one found; the latent as drawn."""
    fixed = comfy.sample.fix_empty_latent_channels(model, latent["samples"], latent.get("downscale_ratio_spacial"))
    height, width = (side * _scale(model) for side in fixed.shape[-2:])
    placed = [region.placed(width, height) for region in regions]
    drawn = {key: value for key, value in latent.items() if key != "downscale_ratio_spacial"} | {"samples": fixed}
    return found_regions(model, clip, stack, placed, prompts, drawn, how), drawn


def with_regions(
    model: comfy.model_patcher.ModelPatcher,
    clip: comfy.sd.CLIP,
    stack: Stack,
    regions: Sequence[Region],
    prompts: tuple[str, str],
    mode: str = "merged",
    overlap: str = "average",
    size: tuple[int, int] | None = None,
    notes: Sequence[str] = (),
) -> Regional:
    """MODEL and CONDITIONING for any sampler; prompts: the global one and the negative one.

    mode: "merged" has all concepts in the weights, everywhere; concepts that are in the model already are not merged
    again.  "gated" leaves the weights alone and lets each concept act where its regions are, or, if no region has it,
    outside of all of them if the global prompt calls it.  overlap: as `region_weights`.  size: as `doubtful_places`.
    Regions in pixels are placed when the picture's size is known.  notes: sentences to be shown too.
    Raises AdapterError for what cannot be drawn, another node's cross-attention for instance.
    """
    _check(model, regions, mode)
    check_names(regions, [*concepts_in(model), *(concept.name for concept, _ in stack)])
    concepts = [*merged_concepts(model), *(concept for concept, _ in stack)]
    said = [*notes, *_idle_priorities(regions, overlap)]
    said += warnings_of_words(clip, [*prompts, *(region.prompt for region in regions)], concepts)
    if stack:
        said += warnings_of(model, clip, stack, "weights") if mode == "merged" else warnings_here(model, clip, stack)
    said += unheard(stack, prompts[0], regions, mode == "gated", "name it in the concepts of a region")
    said += doubtful_places(regions, size, overlap)
    if said:
        show_text("\n".join(said))
    places = Places(regions, overlap, _scale(model))
    if mode == "merged" or not stack:
        missing = [pair for pair in stack if not is_inside(model, pair[0])]
        if missing:
            model, clip = merged(model, clip, missing)
        stack, clips = NO_CONCEPTS, [clip] * (1 + len(regions))
        acts = [()] * len(clips)
    else:
        stack = fitting_stack(model, clip, stack)
        check_memory(model, stack)
        clip = with_words(model, clip, stack)
        acts = acting(stack, prompts[0], regions)
        reading = {own: with_concepts(architecture_of(model), clip, Stack(stack[n] for n in own)) for own in set(acts)}
        clips = [reading[own] for own in acts]
    said = [prompts, *((r.prompt, prompts[1] if r.negative is None else r.negative) for r in regions)]
    encode = cache(encode_prompt)
    (positive, negative), *regional = [
        tuple(encode(own, prompt) for prompt in both) for own, both in zip(clips, said, strict=True)
    ]
    contexts, negatives = ([_context(both[kind]) for both in regional] for kind in range(2))
    own = any(acts) or any(region.negative is not None for region in regions)
    if host_family_of(model).family.denoiser.joint:
        heard = JointListening(places, contexts, negatives)
    else:
        heard = Listening(places, contexts, negatives, own)
    gate = HostGate(model, stack, acts, places) if any(acts) else None
    model = listening(model, heard, gate)
    if any(rows.dim() == 3 for concept, _ in stack for rows in concept.tokens.values()):
        with_layers(model)
    return Regional(model, marked(positive, POSITIVE), marked(negative, NEGATIVE))


def listening(
    model: comfy.model_patcher.ModelPatcher, heard: Listening | JointListening, gate: HostGate | None = None
) -> comfy.model_patcher.ModelPatcher:
    """A clone whose attention listens to the regions, and whose layers have the gate's concepts by region."""
    model = model.clone()
    if isinstance(heard, Listening):
        heard.patch(model)
    with_kinds(model)
    with_first_size(model, heard.places)
    clock = Clock(heard.places, model)

    def by_region(apply_model, x, sigma, concat=None, context: Any = None, control=None, options: Any = None, **more):
        progress = clock.progress(sigma)
        network, options = apply_model.class_obj.diffusion_model, {**(options or {}), PROGRESS: progress}
        context, options, lengths = heard.prepared(network, x, context, options)
        size = tuple(x.shape[-2:])
        control = weighted(control, heard.places, size, progress)
        with gate.attached(network, size, progress, lengths, options) if gate is not None else nullcontext():
            return apply_model(x, sigma, concat, context, control, options, **more)

    add_wrapper_with_key(WrappersMP.APPLY_MODEL, REGIONS, by_region, model.model_options, is_model_options=True)
    return model


def with_first_size(model: comfy.model_patcher.ModelPatcher, places: Places) -> None:
    """Let a clone's samplings fix regions in pixels to the first picture, so that a larger second pass keeps them.

    A picture from noise alone, in another run of the workflow, is a new first picture.
    """
    if not any(region.pixels for region in places.regions):
        return

    def of_sampling(sample, noise, latent, sampler, sigmas, *args, **more):
        guider, running = sample.class_obj, get_executing_context()
        whole = float(guider.model_patcher.get_model_object("model_sampling").sigma_max)
        fresh = len(sigmas) > 0 and float(sigmas[0]) > FROM_NOISE * whole
        places.fix(tuple(noise.shape[-2:]), None if running is None else running.prompt_id, fresh)
        return sample(noise, latent, sampler, sigmas, *args, **more)

    model.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, REGIONS)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, REGIONS, of_sampling)


def _check(model: comfy.model_patcher.ModelPatcher, regions: Sequence[Region], mode: str) -> None:
    MODE.check(mode)
    if not regions:
        raise AdapterError("there is no region; connect a Concept Region, or use a plain sampler for one prompt")
    host_family_of(model)  # raises for what is no base of ours
    options = model.model_options["transformer_options"]
    if replacements_in(options) or text_patches_in(options):
        raise AdapterError(
            "another node has changed the model's cross-attention already (an IP adapter, attention couple or other "
            "regions), and regions cannot share it; take the model from before that node"
        )


def _idle_priorities(regions: Sequence[Region], overlap: str) -> list[str]:
    idle = overlap != "priority" and any(region.priority for region in regions)
    return [f"priority changes nothing: overlap is set to {overlap}"] if idle else []


def _scale(model: comfy.model_patcher.ModelPatcher) -> int:
    """Pixels of the picture to one of the latent."""
    form: Any = model.get_model_object("latent_format")
    return form.spacial_downscale_ratio


def _context(conditioning: list) -> Tensor:
    """(1, T, D) of a CONDITIONING with one entry, (1, L, T, D) where it is layer-wise."""
    plain, about = conditioning[0]
    return about.get(LAYERS, plain)
