"""The training loop: noise the latents, let the hooked base predict, step AdamW on adapters and tokens.

Everything random comes from the run's own generators, derived from the seed; the global one is neither
read nor moved.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..adapters import erasure_mask
from ..bases import OrthogonalBasis
from ..errors import AdapterError
from ..tokens import bounded
from .attach import attached, frozen_networks
from .checkpoint import restore_checkpoint, save_checkpoint
from .losses import draw_noise, masked_mean
from .problem import Problem
from .run import Run, TrainResult
from .settings import TrainSettings, learning_rate_factor


class Cancelled(Exception):
    """Raised by a callback, or by anything that the base calls, to stop a training; its state is kept."""


class Unfinished(AdapterError):
    """A fault in mid-training that loses nothing: `result` holds what was learned until then."""

    def __init__(self, message: str, result: TrainResult):
        super().__init__(message)
        self.result = result


class Diverged(Unfinished):
    """Loss or gradient is no finite number any more; `result` is the last state whose loss was finite."""


@dataclass(frozen=True)
class Progress:
    """What a callback is told after each step.  lr: the adapters', or the tokens' without adapters.

    tokens: trigger word -> its rows as they are learned just now, for a preview; the adapters are attached.
    """

    step: int
    steps: int
    loss: float
    smoothed_loss: float
    lr: float
    seconds: float
    tokens: Mapping[str, Tensor] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, eq=False)
class Batch:
    """Latents (B, C, H, W), masks (B, 1, H, W) or None, and each sample's weight (B,) in the loss."""

    latents: Tensor
    captions: list[str]
    masks: Tensor | None
    weights: Tensor


def train(
    problem: Problem,
    settings: TrainSettings,
    callback: Callable[[Progress], bool | None] | None = None,
    resume: Path | str | None = None,
    *,
    basis: OrthogonalBasis | None = None,
    checkpoints: Path | str | None = None,
    accept_changes: bool = False,
) -> TrainResult:
    """Train one concept on a frozen base; the base comes back bit for bit as it was, without hooks.

    callback: told of each step; True, or `Cancelled` raised anywhere inside, stops with finished = False.
    checkpoints: folder for one every `settings.checkpoint_every` steps, at the end and at a cancel.
    resume: a checkpoint, or such a folder for its newest; `accept_changes` allows other settings or data.
    Raises Diverged when the loss stops being a number, Unfinished when a checkpoint cannot be written (both hold
    what was learned), AdapterError for what cannot work.
    """
    started = time.monotonic()
    with torch.inference_mode(False), torch.enable_grad():
        run = Run(problem, settings, basis)
        if resume is not None:
            restore_checkpoint(resume, run, accept_changes)
        erasure: dict[str, Tensor] = {}
        with frozen_networks(problem.modules), attached(problem.layers, run.adapters, erasure=erasure):
            finished = _steps(problem, run, erasure, lambda: _after_step(run, callback, checkpoints, started))
        if checkpoints is not None:
            _save(checkpoints, run, finished)
        return run.result(finished)


def _steps(problem: Problem, run: Run, erasure: dict[str, Tensor], after_step: Callable[[], bool]) -> bool:
    """Step until the end or a cancel; whether the end was reached."""
    parameters = list(run.parameters().values())
    good = [parameter.detach().clone() for parameter in parameters]
    while run.step < run.settings.steps:
        before = run.random_state()
        try:
            loss = _backward(problem, run, erasure, parameters)
        except Cancelled:
            run.set_random_state(before)
            return False
        except torch.OutOfMemoryError as error:
            raise AdapterError(
                f"memory ran out at step {run.step + 1}; choose a smaller batch, smaller pictures or bf16 precision"
            ) from error
        if not math.isfinite(loss):
            _copy(good, parameters)
            raise _diverged(run)
        _copy(parameters, good)
        run.optimizer.step()
        _bound_tokens(run)
        run.record(loss)
        try:
            if after_step():
                return run.step == run.settings.steps
        except Cancelled:
            return False
    return True


def _backward(problem: Problem, run: Run, erasure: dict[str, Tensor], parameters: Sequence[Tensor]) -> float:
    """Gradients of one batch, clipped; the loss, or NaN when the gradient is not finite."""
    settings = run.settings
    factor = learning_rate_factor(run.step, settings)
    for group in run.optimizer.param_groups:
        group["lr"] = group["full_lr"] * factor
    run.optimizer.zero_grad()
    _draw_erasure(run, erasure)
    loss = _loss(problem, run, _draw_batch(problem, run))
    if not loss.requires_grad:
        raise AdapterError("no chosen layer and no trigger word has a part in the prediction; nothing can be learned")
    loss.backward()
    erasure.clear()  # so that a callback's previews show the whole adapter
    norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm or math.inf)
    value, norm = torch.stack([loss.detach(), norm.to(loss)]).tolist()
    return value if math.isfinite(norm) else math.nan


def _loss(problem: Problem, run: Run, batch: Batch) -> Tensor:
    """Weighted mean over samples of the (masked) mean squared error at random timesteps."""
    settings, schedule, latents = run.settings, problem.schedule, batch.latents
    noise = draw_noise(latents.shape, run.generators["noise"], settings.noise_offset).to(latents)
    indices = schedule.draw(len(latents), run.generators["noise"]).to(latents.device)
    noisy = schedule.noisy(latents, noise, indices)
    with torch.autocast(latents.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
        context = problem.encode(batch.captions, run.tokens)
        prediction = problem.predict(noisy, schedule.times_of(indices), context)
    error = (prediction.to(latents.dtype) - schedule.target(latents, noise, indices)).square()
    per_sample = masked_mean(error, batch.masks)
    weights = batch.weights
    if settings.min_snr is not None:
        weights = weights * schedule.loss_weight(indices, settings.min_snr).to(weights)
    return (per_sample * weights).sum()


def _draw_batch(problem: Problem, run: Run) -> Batch:
    """The next examples in the data order, followed by as many class pictures where there are any."""
    settings, count = run.settings, run.settings.batch
    drawn = [(problem.examples, run.orders["examples"].take(count), 1.0)]
    if problem.prior is not None:
        drawn.append((problem.prior, run.orders["prior"].take(count), settings.prior_weight))
    device, dtype = (
        problem.examples.latents.device,
        torch.promote_types(problem.examples.latents.dtype, torch.float32),
    )
    latents = torch.cat([examples.latents[indices].to(device, dtype) for examples, indices, _ in drawn])
    masks = None
    if any(examples.masks is not None for examples, _, _ in drawn):
        everything = torch.ones(count, 1, *latents.shape[2:], device=device, dtype=dtype)
        masks = torch.cat(
            [
                everything if examples.masks is None else examples.masks[indices].to(everything)
                for examples, indices, _ in drawn
            ]
        )
    captions = [examples.captions[index] for examples, indices, _ in drawn for index in indices.tolist()]
    weights = torch.tensor([weight / count for _, _, weight in drawn], dtype=dtype).repeat_interleave(count)
    return Batch(latents, captions, masks, weights.to(device))


def _draw_erasure(run: Run, erasure: dict[str, Tensor]) -> None:
    """A fresh mask of output rows for each layer and step, from one draw."""
    if run.settings.erasure == 0 or not run.adapters:
        return
    heights = [len(adapter.lora_up) for adapter in run.adapters.values()]
    masks = erasure_mask(sum(heights), run.settings.erasure, run.generators["erasure"]).split(heights)
    for (name, adapter), mask in zip(run.adapters.items(), masks, strict=True):
        erasure[name] = mask.to(adapter.lora_up)


def _copy(source: Sequence[Tensor], destination: Sequence[Tensor]) -> None:
    with torch.no_grad():
        torch._foreach_copy_(destination, source)


def _bound_tokens(run: Run) -> None:
    if run.settings.token_norm is not None:
        with torch.no_grad():
            for rows in run.tokens.values():
                rows.copy_(bounded(rows, run.settings.token_norm))


def _after_step(
    run: Run,
    callback: Callable[[Progress], bool | None] | None,
    checkpoints: Path | str | None,
    started: float,
) -> bool:
    """Checkpoint where one is due, tell the callback; whether it wants to stop."""
    settings = run.settings
    due = settings.checkpoint_every and run.step % settings.checkpoint_every == 0 and run.step < settings.steps
    if checkpoints is not None and due:
        _save(checkpoints, run, finished=False)
    if callback is None:
        return False
    lr, seconds = run.optimizer.param_groups[0]["lr"], time.monotonic() - started
    tokens = {trigger: rows.detach() for trigger, rows in run.tokens.items()}
    progress = Progress(run.step, settings.steps, run.losses[-1], run.smoothed_loss, lr, seconds, tokens)
    return bool(callback(progress))


def _save(checkpoints: Path | str, run: Run, finished: bool) -> None:
    try:
        save_checkpoint(checkpoints, run)
    except AdapterError as error:
        raise Unfinished(f"{error}. What was learned up to step {run.step} is kept", run.result(finished)) from error


def _diverged(run: Run) -> Diverged:
    failed, run.step = run.step + 1, max(0, run.step - 1)
    settings = run.settings
    return Diverged(
        f"the loss is no longer a finite number at step {failed}; train with a lower adapter_lr "
        f"(now {settings.adapter_lr:g}) or token_lr (now {settings.token_lr:g}). What was learned up to step "
        f"{run.step} is kept",
        run.result(finished=False),
    )
