"""Pictures by region in the host: every cross-attention of one pass listens to each region's own text.

Regions' texts ride behind the global one as further tokens of the context, so that keys and values of all come
from one product; a replacement of the attention takes them apart again, attends to each, and blends before the
output projection, just as the headless sampler does.  Nothing else of the sampling changes, so any sampler works
and no region draws a random number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import comfy.ldm.modules.attention as host_attention
import comfy.model_patcher
import comfy.sample
import comfy.sd
import torch
from torch import Tensor

from nodes import common_ksampler  # the host's own

from ..modular_concepts.concept import Concept
from ..modular_concepts.errors import AdapterError
from ..modular_concepts.regions.attention import blend_regions
from ..modular_concepts.regions.geometry import Region, grid_of, region_weights
from .clip import encode_prompt
from .layers import architecture_of
from .layerwise import LAYERS, choose, cross_attention_layers, joined
from .patching import concepts_in, merged

CONDITIONAL = 0  # the host's number for rows of the positive prompt in `cond_or_uncond`


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


def sample_regions(
    model: comfy.model_patcher.ModelPatcher,
    clip: comfy.sd.CLIP,
    stack: Sequence[tuple[Concept, float]],
    prompts: tuple[str, str],
    regions: Sequence[Region],
    latent: dict,
    how: Sampling,
) -> dict:
    """LATENT drawn with the stack's concepts and a prompt for each region; prompts: global and negative.

    Concepts that are in the model already are not merged again.  Raises AdapterError before anything is drawn.
    """
    if not regions:
        raise AdapterError("there is no region; connect a Concept Region, or use a plain sampler for one prompt")
    architecture_of(model)  # raises for what is no base of ours
    if not cross_attention_layers(model):
        raise AdapterError(
            "the model is a diffusion transformer, which has no cross-attention that a region could hold for; draw "
            "regions with Stable Diffusion 1.x, 2.x or XL, or the whole picture with a plain sampler"
        )
    fixed = comfy.sample.fix_empty_latent_channels(model, latent["samples"], latent.get("downscale_ratio_spacial"))
    height, width = fixed.shape[-2:]
    scale = model.get_model_object("latent_format").spacial_downscale_ratio
    regions = [region.placed(width * scale, height * scale) for region in regions]
    missing = [pair for pair in stack if pair[0].name not in concepts_in(model)]
    if missing:
        model, clip = merged(model, clip, missing)
    positive, negative = (encode_prompt(clip, prompt) for prompt in prompts)
    contexts = [_context(encode_prompt(clip, region.prompt)) for region in regions]
    negatives = [
        _context(negative if region.negative is None else encode_prompt(clip, region.negative)) for region in regions
    ]
    regional = with_regions(model, regions, contexts, negatives)
    drawn = {key: value for key, value in latent.items() if key != "downscale_ratio_spacial"} | {"samples": fixed}
    (result,) = common_ksampler(
        regional, how.seed, how.steps, how.cfg, how.sampler, how.scheduler, positive, negative, drawn, how.denoise
    )
    return result


def with_regions(
    model: comfy.model_patcher.ModelPatcher,
    regions: Sequence[Region],
    contexts: Sequence[Tensor],
    negatives: Sequence[Tensor],
) -> comfy.model_patcher.ModelPatcher:
    """A clone whose cross-attention listens to the regions.

    contexts, negatives: (1, T, D) for each of them, (1, L, T, D) where it is layer-wise.
    Raises AdapterError when another node has replaced the model's cross-attention already.
    """
    options = model.model_options["transformer_options"]
    if options.get("patches_replace", {}).get("attn2") or options.get("patches", {}).get("attn2_patch"):
        raise AdapterError(
            "another node has changed the model's cross-attention already (an IP adapter or attention couple), and "
            "regions cannot share it; take the model from before that node"
        )
    listening = _Listening(regions, contexts, negatives)
    model = model.clone()
    model.set_model_attn2_patch(listening.append_texts)
    unet = model.model.diffusion_model
    for name, count in (("input", len(unet.input_blocks)), ("middle", 1), ("output", len(unet.output_blocks))):
        for number in range(count):
            model.set_model_attn2_replace(listening.attend, name, number)
    return model


class _Listening:
    """The two patches of one sampling; what they compute depends on nothing but the call and the regions."""

    def __init__(self, regions: Sequence[Region], contexts: Sequence[Tensor], negatives: Sequence[Tensor]):
        self.regions = regions
        pairs = [_same_length(c, n) for c, n in zip(contexts, negatives, strict=True)]
        self.lengths = [positive.shape[-2] for positive, _ in pairs]
        self.texts = [joined(texts) for texts in zip(*pairs, strict=True)]
        self.own_negatives = any(region.negative is not None for region in regions)
        self.weights: dict[tuple, Tensor] = {}

    def append_texts(self, hidden: Tensor, context: Tensor, value: Tensor, options: dict) -> tuple:
        """Put all regions' texts behind the global one: (rows, T, D) -> (rows, T + all of theirs, D)."""
        kinds = options["cond_or_uncond"]
        texts = [choose(self.texts[int(kind != CONDITIONAL)], options).to(context) for kind in kinds]
        each = len(context) // len(kinds)
        longer = torch.cat([context, torch.cat([text.expand(each, -1, -1) for text in texts])], dim=1)
        return hidden, longer, longer if value is context else torch.cat([value, longer[:, context.shape[1] :]], dim=1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, options: dict) -> Tensor:
        """Attention to the global text, blended with that to each region's where it holds."""
        lengths = [key.shape[1] - sum(self.lengths), *self.lengths]
        keys, values = key.split(lengths, dim=1), value.split(lengths, dim=1)
        attended = _attention(query, keys[0], values[0], options)
        weights = self._weights(query, options)
        each = len(query) // len(options["cond_or_uncond"])
        for chunk, kind in enumerate(options["cond_or_uncond"]):
            if kind != CONDITIONAL and not self.own_negatives:
                continue  # one negative everywhere: the regions would say the same again
            rows = slice(chunk * each, (chunk + 1) * each)
            inside = [
                _attention(query[rows], k[rows], v[rows], options) for k, v in zip(keys[1:], values[1:], strict=True)
            ]
            attended[rows] = blend_regions(attended[rows], torch.stack(inside), weights)
        return attended

    def _weights(self, query: Tensor, options: dict) -> Tensor:
        place = (query.shape[1], *options["original_shape"][-2:], query.device, query.dtype)
        if place not in self.weights:
            grid = grid_of(*place[:3])
            self.weights[place] = region_weights(self.regions, *grid).flatten(1).to(query)
        return self.weights[place]


def _attention(query: Tensor, key: Tensor, value: Tensor, options: dict) -> Tensor:
    return host_attention.optimized_attention(
        query,
        key,
        value,
        options["n_heads"],
        attn_precision=options["attn_precision"],
        transformer_options=options,
    )


def _same_length(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two contexts repeated to one number of tokens, which attention does not notice."""
    length = math.lcm(first.shape[-2], second.shape[-2])
    return tuple(one.repeat(*[1] * (one.dim() - 2), length // one.shape[-2], 1) for one in (first, second))


def _context(conditioning: list) -> Tensor:
    """(1, T, D) of a CONDITIONING with one entry, (1, L, T, D) where it is layer-wise."""
    plain, about = conditioning[0]
    return about.get(LAYERS, plain)
