"""The training loop: step after step until the end, a cancel or a fault, none of which loses what was learned.

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

from ..bases import OrthogonalBasis
from ..errors import AdapterError
from ..tokens import bounded
from .checkpoint import checkpoint_step, restore_checkpoint, save_checkpoint
from .memory import memory_advice, ran_out_of_memory
from .problem import Problem
from .rehearsal import Estimate, rehearse
from .run import Run, TrainResult
from .settings import TrainSettings, learning_rate_factor
from .step import Step, on_base


class Cancelled(Exception):
    """Raised by a callback, or by anything that the base calls, to stop a training; its state is kept."""


class Unfinished(AdapterError):
    """A fault in mid-training that loses nothing: `result` holds what was learned until then."""

    def __init__(self, message: str, result: TrainResult):
        super().__init__(message)
        self.result = result


class OutOfMemory(Unfinished):
    """Memory ran out in a step; `result` is the state before it."""


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


def train(
    problem: Problem,
    settings: TrainSettings,
    callback: Callable[[Progress], bool | None] | None = None,
    resume: Path | str | None = None,
    *,
    basis: OrthogonalBasis | None = None,
    checkpoints: Path | str | None = None,
    accept_changes: bool = False,
    estimate: Callable[[Estimate], None] | None = None,
) -> TrainResult:
    """Train one concept on a frozen base; the base comes back bit for bit as it was, without hooks.

    callback: told of each step; True, or `Cancelled` raised anywhere inside, stops with finished = False.
    checkpoints: folder for one every `settings.checkpoint_every` steps, at the end and at a cancel.
    resume: a checkpoint, or such a folder for its newest; `accept_changes` allows other settings or data.
    estimate: told before the first step what time and memory it will take (`rehearsal.rehearse`).
    Raises Diverged when the loss stops being a number, Unfinished when a checkpoint cannot be written (both hold
    what was learned), AdapterError for what cannot work.
    """
    started = time.monotonic()
    with torch.inference_mode(False), torch.enable_grad():
        if estimate is not None:
            done = 0 if resume is None else checkpoint_step(resume)
            estimate(rehearse(problem, settings, basis, done))
        run = Run(problem, settings, basis)
        if resume is not None:
            restore_checkpoint(resume, run, accept_changes)
        try:
            with on_base(problem, run) as step:
                finished = _steps(step, lambda: _after_step(run, callback, checkpoints, started))
        except OutOfMemory:
            if checkpoints is not None:
                _save(checkpoints, run, finished=False)
            raise
        if checkpoints is not None:
            _save(checkpoints, run, finished)
        return run.result(finished)


def _steps(step: Step, after_step: Callable[[], bool]) -> bool:
    """Step until the end or a cancel; whether the end was reached."""
    run, parameters = step.run, step.parameters
    good = [parameter.detach().clone() for parameter in parameters]
    while run.step < run.settings.steps:
        before = run.random_state()
        _set_learning_rates(run)
        try:
            loss, norm = step.gradients()
        except Cancelled:
            run.set_random_state(before)
            return False
        except (RuntimeError, MemoryError) as error:
            if ran_out_of_memory(error):
                run.set_random_state(before)
                raise _out_of_memory(run, OutOfMemory) from error
            raise
        if math.isfinite(loss) and not math.isfinite(norm) and run.loss_scale is not None and run.loss_scale.shrink():
            run.set_random_state(before)
            continue
        if not math.isfinite(loss) or not math.isfinite(norm):
            _copy(good, parameters)
            raise _diverged(run)
        _copy(parameters, good)
        try:
            run.optimizer.step()
        except (RuntimeError, MemoryError) as error:
            if ran_out_of_memory(error):
                _copy(good, parameters)
                raise _out_of_memory(run, Unfinished) from error
            raise
        if run.loss_scale is not None:
            run.loss_scale.grow()
        _bound_tokens(run)
        run.record(loss)
        try:
            if after_step():
                return run.step == run.settings.steps
        except Cancelled:
            return False
    return True


def _set_learning_rates(run: Run) -> None:
    factor = learning_rate_factor(run.step, run.settings)
    for group in run.optimizer.param_groups:
        group["lr"] = group["full_lr"] * factor


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
    other = ", or in bf16 or fp32 precision" if settings.precision == "fp16" else ""
    layers = "" if settings.method == "words" else f"of the layers (now {settings.adapter_lr:g}) or "
    kept = f". What was learned up to step {run.step} is kept" if run.step else ""
    return Diverged(
        f"the loss is no longer a finite number at step {failed}; train with a lower learning rate {layers}"
        f"of the word (now {settings.token_lr:g}){other}{kept}",
        run.result(finished=False),
    )


def _out_of_memory(run: Run, kind: type[Unfinished]) -> AdapterError:
    """With what was learned, where there is something; the adapters themselves are as after the step before."""
    run.optimizer.zero_grad()
    said = f"memory ran out at step {run.step + 1}; {memory_advice(run.settings)}"
    if not run.step:
        return AdapterError(said)
    return kind(f"{said}. What was learned up to step {run.step} is kept", run.result(finished=False))
