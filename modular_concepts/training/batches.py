"""What a step trains on: the next pictures with their captions, and as many class pictures where there are any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..text.triggers import split_tags
from .problem import Examples, Problem
from .run import Run


@dataclass(frozen=True, eq=False)
class Batch:
    """Latents (B, C, H, W), masks (B, 1, H, W) or None, and each sample's weight (B,) in the loss."""

    latents: Tensor
    captions: list[str]
    masks: Tensor | None
    weights: Tensor


def draw_batches(problem: Problem, run: Run) -> list[Batch]:
    """One batch, or two to be predicted one after the other where the class pictures are of another size."""
    settings = run.settings
    parts = [_own_pictures(problem.examples, run)]
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


def _own_pictures(examples: Examples, run: Run) -> Batch:
    settings, count = run.settings, run.settings.batch
    indices = run.orders["examples"].take(count)
    mirrored = torch.rand(count, generator=run.generators["flip"]) < 0.5 if settings.flip else None
    latents, masks = examples.at(indices, mirrored)
    captions = [_varied(examples.captions[index], run) for index in indices.tolist()]
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
    masks = None if part.masks is None else part.masks.to(device, dtype)
    return Batch(part.latents.to(device, dtype), part.captions, masks, part.weights.to(device, dtype))


def _joined(parts: Sequence[Batch]) -> Batch:
    """Several parts of one size as one batch; where some have masks, the others count whole."""
    masks = None
    if any(part.masks is not None for part in parts):
        masks = torch.cat(
            [torch.ones_like(part.latents[:, :1]) if part.masks is None else part.masks for part in parts]
        )
    return Batch(
        torch.cat([part.latents for part in parts]),
        [caption for part in parts for caption in part.captions],
        masks,
        torch.cat([part.weights for part in parts]),
    )


def _dtype(problem: Problem) -> torch.dtype:
    return torch.promote_types(problem.examples.latents[0].dtype, torch.float32)
