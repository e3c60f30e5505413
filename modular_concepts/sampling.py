"""Sampling without a host: classifier-free guidance over one of diffusers' samplers, with regions.

Every picture has a seed of its own, and its noise is the same whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from .adapters.attach import attached
from .adapters.own_words import Spoken
from .adapters.sites import with_sites
from .concept import Concept
from .errors import AdapterError
from .merging.compatibility import fit, fitting_concepts, learned_words
from .merging.methods import Merge
from .merging.own_words import EVERYWHERE, split, spoken
from .models.base import BaseModel
from .models.budget import check_pictures
from .models.targets import EVERYTHING, concept_layers
from .regions.assignment import acting
from .regions.conditioning import Speaking
from .regions.geometry import Region
from .regions.shares import Places
from .settings import drawing as declared
from .settings.merging import ACT_ON
from .stack import NO_CONCEPTS, Stack

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing has it from Python 3.11 on


@dataclass(frozen=True)
class SampleSettings:
    """Each is declared in `settings/drawing.py`.  Raises AdapterError for values that cannot work."""

    steps: int = declared.STEPS.default
    cfg: float = declared.CFG.default
    height: int | None = declared.HEIGHT.default
    width: int | None = declared.WIDTH.default
    negative: str = declared.NEGATIVE.default
    batch: int = declared.BATCH.default

    def __post_init__(self):
        for name, setting in declared.DRAWING.items():
            setting.check(getattr(self, name))


class RegionOptions(TypedDict, total=False):
    """What a call may say of regions by name: fields of `ByRegion`."""

    mode: str
    stack: Sequence[tuple[Concept, float]]
    overlap: str
    act_on: str


@dataclass(frozen=True)
class ByRegion:
    """How pictures are divided, and among whom.

    regions hold in every picture; their prompts replace the picture's prompt inside; overlap: as `region_weights`.
    mode: "merged" draws with the base as it is, concepts in it; "gated" with the concepts of `stack` (concept,
    strength) besides, each only where its regions are, or, if none has it, outside of all where the prompt calls it.
    act_on: as `merging.own_words.split`; in gated mode layers that read text then act by word, all others by place.
    Raises AdapterError for a mode that is none, and for concepts that nothing would draw with.
    """

    regions: Sequence[Region] = ()
    mode: str = "merged"
    stack: Sequence[tuple[Concept, float]] = NO_CONCEPTS
    overlap: str = "average"
    act_on: str = EVERYWHERE

    def __post_init__(self):
        declared.MODE.check(self.mode)
        ACT_ON.check(self.act_on)
        if self.stack and self.mode == "merged":
            raise AdapterError("merged mode draws with the base as it is; merge the concepts into it, or choose gated")


def warnings_on_guidance(cfg: float) -> list[str]:
    """A sentence for guidance that does not draw what the prompt says."""
    if cfg == 0:
        return ["cfg is 0, so no word of the prompt is drawn, only what an empty or negative prompt gives; 1 draws it"]
    if cfg < 0:
        return [f"cfg is {cfg:g}, below 0, so the picture is led away from what the prompt says; usual is 3 to 8"]
    return []


def check_drawing(base: BaseModel, seeds: Sequence[int], settings: SampleSettings) -> tuple[int, int]:
    """(height, width) that is drawn; raises AdapterError for sizes, steps or seeds that this base cannot take."""
    height, width = (
        usual if chosen is None else chosen
        for chosen, usual in zip((settings.height, settings.width), base.size, strict=True)
    )
    if height % base.multiple or width % base.multiple or min(height, width) < base.multiple:
        raise AdapterError(
            f"pictures of {width} x {height} pixels do not fit this base; choose multiples of {base.multiple}"
        )
    check_pictures(base, width, height, min(settings.batch, len(seeds)))
    if settings.steps > len(base.schedule):
        raise AdapterError(
            f"steps is {settings.steps}; this base has {len(base.schedule)} noise levels, choose no more"
        )
    outside = [seed for seed in seeds if not 0 <= seed < 2**63]
    if outside:
        raise AdapterError(f"seed {outside[0]} is not a whole number from 0 to 2^63 - 1; choose another seed")
    return height, width


@torch.no_grad()
def sample(
    base: BaseModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    tokens: Mapping[str, Tensor] | None = None,
    settings: SampleSettings = SampleSettings(),
    regions: Sequence[Region] = (),
    callback: Callable[[int, int], None] | None = None,
    **options: Unpack[RegionOptions],
) -> Tensor:
    """One picture per (prompt, seed): (N, 3, H, W) in 0..1, on the CPU wherever the base is.

    tokens: trigger word -> learned rows, as `customised` gives them, with what acts at these words.
    regions and options (mode, stack, overlap, act_on): see `ByRegion`.
    callback(done, total) counts sampling steps over all batches.
    Raises AdapterError, before anything is drawn, for sizes, steps or seeds that this base cannot take; and for a
    picture that is not finite.
    """
    divided = ByRegion(regions, **options)
    if len(prompts) != len(seeds):
        raise AdapterError(f"{len(prompts)} prompts but {len(seeds)} seeds; give one seed for each prompt")
    if not len(prompts):
        raise AdapterError("there is no prompt to draw; give at least one")
    height, width = check_drawing(base, seeds, settings)
    stack = Stack.of(divided.stack)
    places = Places([region.placed(width, height) for region in regions], divided.overlap)
    batches = []
    for acts, numbers in _by_concepts(stack, prompts, regions).items():
        speaking = Speaking(base, places, tokens or {}, stack, acts, divided.act_on)
        batches += [
            (speaking, numbers[first : first + settings.batch]) for first in range(0, len(numbers), settings.batch)
        ]
    pictures: dict[int, Tensor] = {}
    for done, (speaking, numbers) in enumerate(batches):

        def step_done(step: int, done: int = done * settings.steps) -> None:
            if callback is not None:
                callback(done + step, settings.steps * len(batches))

        drawn = _sample_batch(
            speaking, [prompts[n] for n in numbers], [seeds[n] for n in numbers], settings, (height, width), step_done
        )
        decoded = base.decode(drawn).float().cpu()
        for number, latents, picture in zip(numbers, drawn, decoded, strict=True):
            _check_finite(prompts[number], latents, picture)
            pictures[number] = picture
    return torch.stack([pictures[number] for number in range(len(prompts))])


def _check_finite(prompt: str, latents: Tensor, picture: Tensor) -> None:
    if not (bool(torch.isfinite(latents).all()) and bool(torch.isfinite(picture).all())):
        raise AdapterError(
            f"{prompt[:80]!r}: what was drawn holds NaN or infinity; lower cfg or the concepts' strengths, and if "
            "it is so without concepts, take another base"
        )


def _by_concepts(stack: Stack, prompts: Sequence[str], regions: Sequence[Region]) -> dict[tuple, list[int]]:
    """Which concepts act where, as `acting` has it -> the numbers of the prompts for which it is so."""
    numbers: dict[tuple, list[int]] = {}
    for number, prompt in enumerate(prompts):
        numbers.setdefault(tuple(acting(stack, prompt, regions)), []).append(number)
    return numbers


def _sample_batch(speaking: Speaking, prompts, seeds, settings, size, step_done) -> Tensor:
    from diffusers import DPMSolverMultistepScheduler

    base, guided = speaking.base, settings.cfg != 1
    latent_size = (size[0] // base.downscale, size[1] // base.downscale)
    scheduler: Any = DPMSolverMultistepScheduler(**base.betas, timestep_spacing="trailing")
    scheduler.set_timesteps(settings.steps)
    latents = torch.stack(
        [
            torch.randn(base.latent_channels, *latent_size, generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
    ).to(base.device)
    context, texts = speaking.contexts(prompts, settings.negative if guided else None)
    with speaking.acting(texts, latent_size) as at:
        for step, timestep in enumerate(scheduler.timesteps):
            at(1 - float(timestep) / (len(base.schedule) - 1))
            doubled = torch.cat([latents, latents]) if guided else latents
            predicted = base.predict(doubled, timestep.to(base.device).expand(len(doubled)), context)
            if guided:
                unconditional, conditional = predicted.chunk(2)
                predicted = unconditional + settings.cfg * (conditional - unconditional)
            latents = scheduler.step(predicted, timestep, latents, return_dict=False)[0]
            step_done(step + 1)
    return latents


@contextmanager
def customised(
    base: BaseModel,
    concepts: Sequence[Concept],
    strengths: Sequence[float],
    how: str = "sum",
    act_on: str = EVERYWHERE,
) -> Generator[Spoken]:
    """Within the block the base draws with the merged concepts; yields their learned tokens for prompts.

    Below strength 1 a learned word goes back towards its class word (`merging.compatibility.learned_words`).
    act_on: as `merging.own_words.split`.  What acts at its own words alone is in the tokens: a prompt that is read with
    them says where.
    Raises AdapterError for a concept of another base.
    """
    everything = with_sites(concept_layers(base, EVERYTHING))
    shapes = {name: module.weight.shape for name, module in everything.items()}
    fitting = fitting_concepts(base.architecture, shapes, concepts)
    stack = Stack(zip(fitting, strengths, strict=True))
    divided = split(stack, act_on, how)
    merged, _ = fit(base.architecture, shapes, divided.everywhere, Merge(how))
    words = learned_words(stack, base.word_rows)
    with attached(everything, merged):
        yield spoken(words, divided.by_word, base.word_rows)
