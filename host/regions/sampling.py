"""Pictures by region in the host: a MODEL and prompts in which every region has a text of its own, for any sampler.

One pass for all regions at every step: `cross_attention.py` has what the cross-attention of a U-Net does for it,
`gating.py` what lets each concept act in its region alone, `joint_attention.py` what the attention of a diffusion
transformer does.  Nothing else of the sampling changes, so any sampler works and no region draws a random number.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
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
from ...modular_concepts.merging.own_words import acts_by_word, as_acting, notes_on_gated, split, split_gated
from ...modular_concepts.regions.assignment import acting, check_names, unheard
from ...modular_concepts.regions.geometry import Region, region_weights
from ...modular_concepts.regions.moment import Moment
from ...modular_concepts.regions.shares import Places
from ...modular_concepts.regions.warnings import doubtful_places
from ...modular_concepts.stack import NO_CONCEPTS, Stack
from ..families.cross_attention import replacements_in, text_patches_in
from ..families.lookup import host_family_of
from ..merging.notices import warnings_here, warnings_of
from ..merging.weights import concepts_in, is_inside, merge_into, merged_concepts
from ..messages import show_text
from ..model import HostModel
from ..text.layerwise import LAYERS, with_layers
from ..text.word_places import NOTE, Wording, wording_of
from ..text.words import encode_prompt, warnings_of_words
from .controlnet import weighted
from .cross_attention import MOMENT, Listening, Sigmas
from .find import place_regions
from .gating import HostGate, act_by_text, check_memory, fitting_stack, with_concepts, with_words
from .joint_attention import JointListening, positions_of
from .kinds import NEGATIVE, POSITIVE, marked, with_kinds
from .scene import Sampling, Scene

REGIONS = "modular_concepts_regions"
FROM_NOISE = 0.9  # share of the largest sigma from which on a sampling starts from noise alone


class Regional(NamedTuple):
    """What a sampler of the host takes: a MODEL that knows the regions, and CONDITIONING of the global prompts."""

    model: comfy.model_patcher.ModelPatcher
    positive: list
    negative: list


def sample_regions(host: HostModel, scene: Scene, latent: dict, how: Sampling, notes: Sequence[str] = ()) -> dict:
    """LATENT drawn with the scene's concepts and a prompt for each region; otherwise as `with_regions`.

    Regions without a place get one first (`find.place_regions`).
    """
    scene, drawn = _placed(host, scene, latent, how)
    size = tuple(drawn["samples"].shape[-2:])
    regional = with_regions(host, scene, size, notes)
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


def find_regions(host: HostModel, scene: Scene, latent: dict, how: Sampling) -> tuple[tuple[Region, ...], Tensor]:
    """The regions, each with a place, and MASK (R, H, W) of them in the picture's pixels."""
    if not scene.regions:
        raise AdapterError("there is no region; connect a Concept Region")
    scene, drawn = _placed(host, scene, latent, how)
    height, width = (side * host.scale for side in drawn["samples"].shape[-2:])
    return tuple(scene.regions), region_weights(scene.regions, height, width, scene.overlap)


def _placed(host: HostModel, scene: Scene, latent: dict, how: Sampling) -> tuple[Scene, dict]:
    """Regions in fractions of the latent's picture, those without a place in the one found; the latent as drawn."""
    fixed = comfy.sample.fix_empty_latent_channels(host.model, latent["samples"], latent.get("downscale_ratio_spacial"))
    height, width = (side * host.scale for side in fixed.shape[-2:])
    scene = replace(scene, regions=[region.placed(width, height) for region in scene.regions])
    drawn = {key: value for key, value in latent.items() if key != "downscale_ratio_spacial"} | {"samples": fixed}
    return replace(scene, regions=place_regions(host, scene, drawn, how)), drawn


def with_regions(
    host: HostModel, scene: Scene, size: tuple[int, int] | None = None, notes: Sequence[str] = ()
) -> Regional:
    """MODEL and CONDITIONING for any sampler.

    Regions in pixels are placed when the picture's size is known.  size: as `doubtful_places`.  notes: sentences to be
    shown too.
    Raises AdapterError for what cannot be drawn, another node's cross-attention for instance.
    """
    _check(host, scene)
    if sentences := [*notes, *_warnings(host, scene, size)]:
        show_text("\n".join(sentences))
    setup = _merged(host, scene) if scene.mode == "merged" or not scene.stack else _gated(host, scene)
    encode = cache(encode_prompt)
    (positive, negative), *regional = [
        tuple(encode(clip, prompt) for prompt in both) for clip, both in zip(setup.clips, scene.spoken, strict=True)
    ]
    contexts, negatives = ([_context(both[kind]) for both in regional] for kind in range(2))
    says = [(_wording(first), _wording(second)) for first, second in regional]
    places, gates = Places(scene.regions, scene.overlap, host.scale), any(setup.acts)
    if host.family.family.denoiser.joint:
        heard = JointListening(places, contexts, negatives)
    else:
        apart = gates or any(region.negative is not None for region in scene.regions)
        heard = Listening(places, contexts, negatives, apart, says)
    gate = HostGate(setup.host, setup.stack, setup.acts, places, setup.by_word) if gates else None
    model = listen(setup.host.model, heard, gate)
    if setup.stack.layerwise:
        with_layers(model)
    return Regional(model, marked(positive, POSITIVE), marked(negative, NEGATIVE))


class Setup(NamedTuple):
    """What draws: MODEL and CLIP, the concepts that are gated, and for each text its CLIP and who acts in it.

    by_word: numbers of the gated concepts that act at their own words alone in layers that read text.
    """

    host: HostModel
    stack: Stack
    clips: list[comfy.sd.CLIP]
    acts: list[tuple[int, ...]]
    by_word: frozenset[int] = frozenset()


def _merged(host: HostModel, scene: Scene) -> Setup:
    missing = [pair for pair in scene.stack if not is_inside(host.model, pair[0])]
    if missing:
        host = HostModel(*merge_into(host.model, host.clip, missing, act_on=scene.act_on))
    count = 1 + len(scene.regions)
    return Setup(host, NO_CONCEPTS, [host.clip] * count, [()] * count)


def _gated(host: HostModel, scene: Scene) -> Setup:
    stack = fitting_stack(host, scene.stack)
    check_memory(host.model, stack)
    residuals = split_gated(stack, scene.act_on)
    by_word = frozenset(residual.owner for residual in residuals)
    host = with_words(host, stack, residuals)
    acts = acting(stack, scene.prompts[0], scene.regions)
    reading = {
        numbers: with_concepts(host, Stack(stack[n] for n in numbers if n not in by_word)) for numbers in set(acts)
    }
    host = HostModel(act_by_text(host, residuals, acts), host.clip)
    return Setup(host, stack, [reading[numbers] for numbers in acts], acts, by_word)


def listen(
    model: comfy.model_patcher.ModelPatcher, heard: Listening | JointListening, gate: HostGate | None = None
) -> comfy.model_patcher.ModelPatcher:
    """A clone whose attention listens to the regions, and whose layers have the gate's concepts by region."""
    model = model.clone()
    if isinstance(heard, Listening):
        heard.patch(model)
    with_kinds(model)
    with_first_size(model, heard.places)
    sigmas = Sigmas(heard.places, model)

    def by_region(apply_model, x, sigma, concat=None, context: Any = None, control=None, options: Any = None, **more):
        moment = Moment(tuple(x.shape[-2:]), sigmas.progress(sigma))
        network, options = apply_model.class_obj.diffusion_model, {**(options or {}), MOMENT: moment}
        context, options, lengths = heard.prepared(network, context, options)
        control = weighted(control, heard.places, moment)
        moment = replace(moment, lengths=tuple(lengths), positions=positions_of(network, moment.latent_size))
        with gate.attached(network, moment, options) if gate is not None else nullcontext():
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


def _check(host: HostModel, scene: Scene) -> None:
    if not scene.regions:
        raise AdapterError("there is no region; connect a Concept Region, or use a plain sampler for one prompt")
    host_family_of(host.model)  # raises for what is no base of ours
    options = host.model.model_options["transformer_options"]
    if replacements_in(options) or text_patches_in(options):
        raise AdapterError(
            "another node has changed the model's cross-attention already (an IP adapter, attention couple or other "
            "regions), and regions cannot share it; take the model from before that node"
        )
    check_names(scene.regions, [*concepts_in(host.model), *(concept.name for concept, _ in scene.stack)])


def _warnings(host: HostModel, scene: Scene, size: tuple[int, int] | None) -> list[str]:
    """What a person should know of what is about to be drawn."""
    stack, gated = scene.stack, scene.mode == "gated"
    sentences = _idle_priorities(scene)
    sentences += warnings_of_words(host.clip, scene.texts, [*merged_concepts(host.model), *stack.concepts])
    if stack and gated:
        sentences += warnings_here(host, stack)
    elif stack:
        together = [(as_acting(concept, scene.act_on), strength) for concept, strength in stack]
        sentences += warnings_of(host, together, "weights")
    by_word = {number for number, (concept, _) in enumerate(stack) if acts_by_word(concept, scene.act_on)}
    way_out = "name it in the concepts of a region"
    sentences += unheard(stack, scene.prompts[0], scene.regions, gated, way_out, by_word, scene.prompts[1])
    sentences += notes_on_gated(stack, scene.act_on) if gated else split(stack, scene.act_on).notes
    return [*sentences, *doubtful_places(scene.regions, size, scene.overlap)]


def _idle_priorities(scene: Scene) -> list[str]:
    idle = scene.overlap != "priority" and any(region.priority for region in scene.regions)
    return [f"priority changes nothing: overlap is set to {scene.overlap}"] if idle else []


def _context(conditioning: list) -> Tensor:
    """(1, T, D) of a CONDITIONING with one entry, (1, L, T, D) where it is layer-wise."""
    plain, about = conditioning[0]
    return about.get(LAYERS, plain)


def _wording(conditioning: list) -> Wording:
    plain, about = conditioning[0]
    return wording_of(plain, about.get(NOTE))
