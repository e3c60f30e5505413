"""What a step trains on: the next pictures or canvases with their captions, and class pictures where there are any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from ..text.triggers import split_tags
from .company import Company, canvases_of, joined
from .problem import Examples, Problem
from .run import Run


@dataclass(frozen=True, eq=False)
class Batch:
    """Latents (B, C, H, W), masks (B, 1, H, W) or None, and each sample's weight (B,) in the loss.

    attended: (B, 1, H, W) where the learned word may look, if that is not the masks.
    """

    latents: Tensor
    captions: list[str]
    masks: Tensor | None
    weights: Tensor
    attended: Tensor | None = None


def draw_batches(problem: Problem, run: Run) -> list[Batch]:
    """One batch, or two to be predicted one after the other where the class pictures are of another size."""
    settings = run.settings
    parts = [_next_pictures(problem, run)]
    if problem.prior is not None:
        indices = run.orders["prior"].take(settings.batch)
        latents, masks = problem.prior.at(indices)
        weights = torch.full((settings.batch,), settings.prior_weight / settings.batch, dtype=_dtype(problem))
        parts.append(Batch(latents, [problem.prior.captions[index] for index in indices.tolist()], masks, weights))
    device, dtype = problem.examples.latents[0].device, _dtype(problem)
    parts = [_moved(part, device, dtype) for part in parts]
    if len({part.latents.shape[2:] for part in parts}) == 1:
        return [_joined(parts)]
    return parts


def _next_pictures(problem: Problem, run: Run) -> Batch:
    """The concept's next pictures alone or, in a share of the steps, half as many in company."""
    settings, company = run.settings, problem.company
    if settings.company and torch.rand((), generator=run.generators["company"]) < settings.company:
        return _canvases(problem.examples, cast(Company, company), run)
    latents, masks, captions = _take(problem.examples, run, settings.batch)
    return _weighed(latents, [_varied(caption, run) for caption in captions], masks)


def _canvases(examples: Examples, company: Company, run: Run) -> Batch:
    """Wide canvases: each of the concept's next pictures in the left or the right half, somebody else in the other."""
    generator, watched = run.generators["company"], run.settings.attention_regularisation
    pictures, masks, captions = _take(examples, run, canvases_of(run.settings.batch))
    left = torch.rand(len(captions), generator=generator) < 0.5
    guests = [company.invited(caption) for caption in captions]
    numbers = [those[int(torch.randint(len(those), (), generator=generator))] for those in guests]
    others = company.latents[pictures.shape[-2]][numbers].to(pictures)
    sides = zip(captions, numbers, left.tolist(), strict=True)
    texts = [_varied(company.caption(caption, number, first), run) for caption, number, first in sides]
    beside = torch.ones_like(others[:, :1])
    shown = torch.ones_like(pictures[:, :1]) if masks is None else masks.to(pictures)
    covered = None if masks is None else joined(shown, beside, left)
    attended = joined(shown, torch.zeros_like(beside), left) if watched else None
    return replace(_weighed(joined(pictures, others, left), texts, covered), attended=attended)


def _take(examples: Examples, run: Run, count: int) -> tuple[Tensor, Tensor | None, list[str]]:
    """Latents, masks and captions of the next pictures of one size, some mirrored."""
    indices = run.orders["examples"].take(count)
    mirrored = torch.rand(count, generator=run.generators["flip"]) < 0.5 if run.settings.flip else None
    return *examples.at(indices, mirrored), [examples.captions[index] for index in indices.tolist()]


def _weighed(latents: Tensor, captions: list[str], masks: Tensor | None) -> Batch:
    count = len(captions)
    return Batch(latents, captions, masks, torch.full((count,), 1.0 / count, dtype=latents.dtype))


def _varied(caption: str, run: Run) -> str:
    """The caption, or an empty one, or its parts between commas in another order but for the first."""
    settings, generator = run.settings, run.generators.get("captions")
    if settings.caption_dropout and torch.rand((), generator=generator) < settings.caption_dropout:
        return ""
    if not settings.shuffle_tags:
        return caption
    first, *others = split_tags(caption, run.tokens)
    if not others:
        return caption
    order = torch.randperm(len(others), generator=generator).tolist()
    return ", ".join([first, *(others[index] for index in order)])


def _moved(part: Batch, device: torch.device, dtype: torch.dtype) -> Batch:
    masks, attended = (None if each is None else each.to(device, dtype) for each in (part.masks, part.attended))
    return Batch(part.latents.to(device, dtype), part.captions, masks, part.weights.to(device, dtype), attended)


def _joined(parts: Sequence[Batch]) -> Batch:
    """Several parts of one size as one batch; where some have masks, the others count whole."""
    return Batch(
        torch.cat([part.latents for part in parts]),
        [caption for part in parts for caption in part.captions],
        _masks_of(parts, [part.masks for part in parts]),
        torch.cat([part.weights for part in parts]),
        _masks_of(parts, [part.attended for part in parts]),
    )


def _masks_of(parts: Sequence[Batch], masks: Sequence[Tensor | None]) -> Tensor | None:
    if all(mask is None for mask in masks):
        return None
    each = zip(parts, masks, strict=True)
    return torch.cat([torch.ones_like(part.latents[:, :1]) if mask is None else mask for part, mask in each])


def _dtype(problem: Problem) -> torch.dtype:
    return torch.promote_types(problem.examples.latents[0].dtype, torch.float32)
