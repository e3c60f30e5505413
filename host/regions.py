"""Pictures by region in the host: a MODEL and prompts in which every region has a text of its own, for any sampler.

One pass for all regions at every step: `listening.py` has what the cross-attention of a U-Net does for it.  Nothing
else of the sampling changes, so any sampler works and no region draws a random number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import comfy.model_patcher
import comfy.sample
import comfy.sd
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from nodes import common_ksampler  # the host's own

from ..modular_concepts.concept import Concept
from ..modular_concepts.errors import AdapterError
from ..modular_concepts.regions.geometry import Region
from ..modular_concepts.regions.places import Places
from .clip import encode_prompt
from .layers import architecture_of
from .layerwise import LAYERS, cross_attention_layers
from .listening import PROGRESS, Clock, Listening
from .patching import concepts_in, merged

MODES = ("merged",)
REGIONS = "modular_concepts_regions"


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
    stack: Sequence[tuple[Concept, float]],
    prompts: tuple[str, str],
    regions: Sequence[Region],
    latent: dict,
    how: Sampling,
    mode: str = "merged",
    overlap: str = "average",
) -> dict:
    """LATENT drawn with the stack's concepts and a prompt for each region; otherwise as `with_regions`."""
    fixed = comfy.sample.fix_empty_latent_channels(model, latent["samples"], latent.get("downscale_ratio_spacial"))
    height, width = (side * _scale(model) for side in fixed.shape[-2:])
    placed = [region.placed(width, height) for region in regions]
    regional = with_regions(model, clip, stack, placed, prompts, mode, overlap)
    drawn = {key: value for key, value in latent.items() if key != "downscale_ratio_spacial"} | {"samples": fixed}
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


def with_regions(
    model: comfy.model_patcher.ModelPatcher,
    clip: comfy.sd.CLIP,
    stack: Sequence[tuple[Concept, float]],
    regions: Sequence[Region],
    prompts: tuple[str, str],
    mode: str = "merged",
    overlap: str = "average",
) -> Regional:
    """MODEL and CONDITIONING for any sampler; prompts: the global one and the negative one.

    mode: "merged" has all concepts in the weights, everywhere.  overlap: as `region_weights`.
    Concepts that are in the model already are not merged again.  Regions in pixels are placed when the picture's size
    is known.  Raises AdapterError for what cannot be drawn, another node's cross-attention for instance.
    """
    _check(model, regions, mode)
    _check_names(regions, [concept.name for concept, _ in stack], concepts_in(model))
    missing = [pair for pair in stack if pair[0].name not in concepts_in(model)]
    if missing:
        model, clip = merged(model, clip, missing)
    positive, negative = (encode_prompt(clip, prompt) for prompt in prompts)
    contexts = [_context(encode_prompt(clip, region.prompt)) for region in regions]
    negatives = [
        _context(negative if region.negative is None else encode_prompt(clip, region.negative)) for region in regions
    ]
    places = Places(regions, overlap, _scale(model))
    own = any(region.negative is not None for region in regions)
    return Regional(listening(model, places, contexts, negatives, own), positive, negative)


def listening(
    model: comfy.model_patcher.ModelPatcher,
    places: Places,
    contexts: Sequence[Tensor],
    negatives: Sequence[Tensor],
    own: bool,
) -> comfy.model_patcher.ModelPatcher:
    """A clone whose cross-attention listens to the regions; contexts and all after it: as `Listening`."""
    model = model.clone()
    Listening(places, contexts, negatives, own).patch(model)
    clock = Clock(places, model)

    def tell_progress(apply_model, x, sigma, concat=None, context=None, control=None, options=None, **more):
        options = {**(options or {}), PROGRESS: clock.progress(sigma)}
        return apply_model(x, sigma, concat, context, control, options, **more)

    add_wrapper_with_key(WrappersMP.APPLY_MODEL, REGIONS, tell_progress, model.model_options, is_model_options=True)
    return model


def _check(model: comfy.model_patcher.ModelPatcher, regions: Sequence[Region], mode: str) -> None:
    if mode not in MODES:
        raise AdapterError(f"mode is {mode!r}; choose one of {', '.join(MODES)}")
    if not regions:
        raise AdapterError("there is no region; connect a Concept Region, or use a plain sampler for one prompt")
    architecture_of(model)  # raises for what is no base of ours
    if not cross_attention_layers(model):
        raise AdapterError(
            "the model is a diffusion transformer, which has no cross-attention that a region could hold for; draw "
            "regions with Stable Diffusion 1.x, 2.x or XL, or the whole picture with a plain sampler"
        )
    options = model.model_options["transformer_options"]
    if options.get("patches_replace", {}).get("attn2") or options.get("patches", {}).get("attn2_patch"):
        raise AdapterError(
            "another node has changed the model's cross-attention already (an IP adapter, attention couple or other "
            "regions), and regions cannot share it; take the model from before that node"
        )


def _check_names(regions: Sequence[Region], stack: Sequence[str], inside: Sequence[str]) -> None:
    known = [*inside, *(name for name in stack if name not in inside)]
    for region in regions:
        for name in region.concepts or ():
            if name not in known:
                raise AdapterError(
                    f"region {region.prompt!r} asks for the concept {name!r}, and there is none of that name; "
                    f"there {'is ' + ', '.join(known) if known else 'are no concepts'}"
                )


def _scale(model: comfy.model_patcher.ModelPatcher) -> int:
    """Pixels of the picture to one of the latent."""
    return model.get_model_object("latent_format").spacial_downscale_ratio


def _context(conditioning: list) -> Tensor:
    """(1, T, D) of a CONDITIONING with one entry, (1, L, T, D) where it is layer-wise."""
    plain, about = conditioning[0]
    return about.get(LAYERS, plain)
