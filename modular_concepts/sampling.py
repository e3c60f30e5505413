"""Sampling without a host: classifier-free guidance over one of diffusers' samplers, with regions.

Every picture has a seed of its own, and its noise is the same whatever else is in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base_model import BaseModel
from .contexts import joined, text_of
from .errors import AdapterError
from .regions.attention import regional_attention
from .regions.geometry import Region
from .regions.places import Places


@dataclass(frozen=True)
class SampleSettings:
    """height, width in pixels, None for the base's own; cfg is the guidance scale, 1 is none.

    Raises AdapterError for values that cannot work.
    """

    steps: int = 20
    cfg: float = 5.0
    height: int | None = None
    width: int | None = None
    negative: str = ""
    batch: int = 16

    def __post_init__(self):
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise AdapterError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not math.isfinite(self.cfg):
            raise AdapterError(f"cfg is {self.cfg}; it must be a finite number, 1 for no guidance")


@torch.no_grad()
def sample(
    base: BaseModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    tokens: Mapping[str, Tensor] | None = None,
    settings: SampleSettings = SampleSettings(),
    regions: Sequence[Region] = (),
    callback: Callable[[int, int], None] | None = None,
    *,
    overlap: str = "average",
) -> Tensor:
    """One picture per (prompt, seed): (N, 3, H, W) in 0..1.

    tokens: trigger word -> learned rows.  regions hold in every picture; their prompts replace the picture's
    prompt inside; overlap: as `region_weights`.  callback(done, total) counts sampling steps over all batches.
    Raises AdapterError, before anything is drawn, for sizes, steps or seeds that this base cannot take.
    """
    height, width = (
        own if chosen is None else chosen
        for chosen, own in zip((settings.height, settings.width), base.size, strict=True)
    )
    if height % base.multiple or width % base.multiple or min(height, width) < base.multiple:
        raise AdapterError(
            f"pictures of {width} x {height} pixels do not fit this base; choose multiples of {base.multiple}"
        )
    if settings.steps > len(base.schedule):
        raise AdapterError(
            f"steps is {settings.steps}; this base has {len(base.schedule)} noise levels, choose no more"
        )
    if len(prompts) != len(seeds):
        raise AdapterError(f"{len(prompts)} prompts but {len(seeds)} seeds; give one seed for each prompt")
    if not len(prompts):
        raise AdapterError("there is no prompt to draw; give at least one")
    outside = [seed for seed in seeds if not 0 <= seed < 2**63]
    if outside:
        raise AdapterError(f"seed {outside[0]} is not a whole number from 0 to 2^63 - 1; choose another seed")
    places = Places([region.placed(width, height) for region in regions], overlap)
    chunks = [slice(start, start + settings.batch) for start in range(0, len(prompts), settings.batch)]
    pictures = []
    for number, chunk in enumerate(chunks):
        done = number * settings.steps

        def step_done(step: int, done: int = done) -> None:
            if callback is not None:
                callback(done + step, settings.steps * len(chunks))

        latents = _sample_batch(
            base, prompts[chunk], seeds[chunk], tokens or {}, settings, places, (height, width), step_done
        )
        pictures.append(base.decode(latents))
    return torch.cat(pictures)


def _sample_batch(base, prompts, seeds, tokens, settings, places, size, step_done) -> Tensor:
    from diffusers import DPMSolverMultistepScheduler

    count, guided = len(prompts), settings.cfg != 1
    latent_size = (size[0] // base.downscale, size[1] // base.downscale)
    scheduler = DPMSolverMultistepScheduler(**base.betas, timestep_spacing="trailing")
    scheduler.set_timesteps(settings.steps)
    latents = torch.stack(
        [
            torch.randn(base.latent_channels, *latent_size, generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
    )
    context = base.context(prompts, tokens)
    contexts = [base.context([region.prompt] * count, tokens) for region in places.regions]
    if guided:
        negative = base.context([settings.negative] * count, tokens)
        context = joined([negative, context])
        for index, region in enumerate(places.regions):
            own = negative if region.negative is None else base.context([region.negative] * count, tokens)
            contexts[index] = joined([own, contexts[index]])
    texts = torch.stack([text_of(own) for own in contexts]) if contexts else None
    now, last = [0.0], len(base.schedule) - 1
    with regional_attention(base.unet, places, texts, latent_size, lambda: now[0]):
        for step, timestep in enumerate(scheduler.timesteps):
            now[0] = 1 - float(timestep) / last
            doubled = torch.cat([latents, latents]) if guided else latents
            predicted = base.predict(doubled, timestep.expand(len(doubled)), context)
            if guided:
                unconditional, conditional = predicted.chunk(2)
                predicted = unconditional + settings.cfg * (conditional - unconditional)
            latents = scheduler.step(predicted, timestep, latents, return_dict=False)[0]
            step_done(step + 1)
    return latents
