"""The training loop: step after step until the end, a cancel or a fault, none of which loses what was learned.

Everything random comes from the run's own generators, derived from the seed; the global one is neither
read nor moved.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from ..adapters.basis import OrthogonalBasis
from ..adapters.own_words import Spoken
from ..errors import AdapterError
from ..storage.keeping import check_room
from ..text.words import bounded
from .checkpoint import check_resumable, checkpoint_step, restore_checkpoint, save_checkpoint
from .estimate import Estimate, checkpoint_bytes, rehearse
from .last_step import LastStep
from .memory import memory_advice, ran_out_of_memory
from .ownership import checkpoints_to_come, claimed
from .problem import Problem
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


class Broken(Unfinished):
    """A step ended in a fault; `result` is the state before it."""


class OutOfMemory(Broken):
    """Memory ran out in a step; `result` is the state before it."""


class Diverged(Unfinished):
    """Loss or gradient is no finite number any more; `result` is the last state whose loss was finite."""


@dataclass(frozen=True)
class Progress:
    """What a callback is told after each step.  lr: the adapters', or the tokens' without adapters.

    tokens: trigger word -> its rows as they are learned just now, for a preview; the adapters are attached, or, where
    they act at its own words alone, in the tokens.
    """

    step: int
    steps: int
    loss: float
    smoothed_loss: float
    lr: float
    seconds: float
    tokens: Mapping[str, Tensor] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Listeners:
    """Who is told of a training while it goes on.

    step: told of each step; True, or `Cancelled` raised anywhere inside, stops with finished = False.
    estimate: told before the first step what time, memory and room it will take (`estimate.rehearse`).
    fault: told what was learned when an exception that is none of ours ends the training; then it is raised again.
    """

    step: Callable[[Progress], bool | None] | None = None
    estimate: Callable[[Estimate], None] | None = None
    fault: Callable[[TrainResult], object] | None = None


@dataclass(frozen=True)
class Keeping:
    """Where a training is kept, and what it goes on from.

    checkpoints: folder for one every `settings.checkpoint_every` steps, at the end, at a cancel and at any fault; it
    belongs to this training, and what is another's is refused, or moved to `before` in it with `set_aside`.
    resume: a checkpoint, or such a folder for its newest; `accept_changes` allows other settings or data.
    latents: a folder to keep latents in, so that the next training on the same pictures encodes none.
    """

    checkpoints: Path | str | None = None
    resume: Path | str | None = None
    accept_changes: bool = False
    set_aside: bool = False
    latents: Path | None = None


NOBODY, NOWHERE = Listeners(), Keeping()


def train(
    problem: Problem,
    settings: TrainSettings,
    listeners: Listeners = NOBODY,
    keeping: Keeping = NOWHERE,
    basis: OrthogonalBasis | None = None,
) -> TrainResult:
    """Train one concept on a frozen base; the base comes back bit for bit as it was, without hooks.

    basis: what frozen factors are columns of; None is the default one.
    Raises Diverged when the loss stops being a number, Broken for a fault inside a step, Unfinished when a checkpoint
    cannot be written (all hold what was learned), AdapterError for what cannot work.
    """
    started, checkpoints, resume = time.monotonic(), keeping.checkpoints, keeping.resume
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        done = 0 if resume is None else checkpoint_step(resume)
        if checkpoints is not None:
            stack.enter_context(claimed(checkpoints, resume, keeping.set_aside))
        if resume is not None:
            check_resumable(resume, Run(problem, settings, basis), keeping.accept_changes)
        if listeners.estimate is not None:
            listeners.estimate(rehearse(problem, settings, basis, done))
        run = Run(problem, settings, basis)
        if resume is not None:
            restore_checkpoint(resume, run, keeping.accept_changes)
        if checkpoints is not None:
            check_room(
                [(Path(checkpoints), checkpoints_to_come(checkpoints, settings, run.step) * checkpoint_bytes(run))]
            )
        try:
            with on_base(problem, run) as step:
                finished = _steps(step, lambda: _after_step(run, listeners.step, checkpoints, started))
            if checkpoints is not None:
                _save(checkpoints, run, finished)
        except BaseException as fault:
            _save_after(fault, checkpoints, run)
            ours = isinstance(fault, AdapterError | KeyboardInterrupt)
            if listeners.fault is not None and run.step and not ours:
                listeners.fault(run.result(run.step == settings.steps))
            raise
        return run.result(finished)


def _steps(step: Step, after_step: Callable[[], bool]) -> bool:
    """Step until the end or a cancel; whether the end was reached."""
    run = step.run
    last = LastStep(run)
    while run.step < run.settings.steps:
        last.begin()
        try:
            _one_step(step, last)
        except Cancelled:
            last.restore()
            return False
        except Diverged:
            raise
        except BaseException as error:
            last.restore()
            _raise_with_result(run, error)
        try:
            if after_step():
                return run.step == run.settings.steps
        except Cancelled:
            return False
        except Unfinished:
            raise
        except BaseException as error:
            _raise_with_result(run, error)
    return True


def _one_step(step: Step, last: LastStep) -> None:
    """Gradients and an update; or, where fp16's gradients overflow, a smaller loss scale and no step at all."""
    run = step.run
    _set_learning_rates(run)
    loss, norm = step.gradients()
    if math.isfinite(loss) and not math.isfinite(norm) and run.loss_scale is not None and run.loss_scale.shrink():
        run.set_random_state(last.random)
        return
    if not math.isfinite(loss) or not math.isfinite(norm):
        last.restore_learned()
        raise _diverged(run)
    last.before_update()
    run.optimizer.step()
    if run.loss_scale is not None:
        run.loss_scale.grow()
    _bound_tokens(run)
    run.record(loss)


def _set_learning_rates(run: Run) -> None:
    factor = learning_rate_factor(run.step, run.settings)
    for group in run.optimizer.param_groups:
        group["lr"] = group["full_lr"] * factor


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
    tokens = Spoken({trigger: rows.detach() for trigger, rows in run.tokens.items()}, run.by_word)
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
    way_back = f". What was learned up to step {run.step} is kept" if run.step else ""
    return Diverged(
        f"the loss is no longer a finite number at step {failed}; train with a lower learning rate {layers}"
        f"of the word (now {settings.token_lr:g}){other}{way_back}",
        run.result(finished=False),
    )


def _raise_with_result(run: Run, error: BaseException) -> NoReturn:
    """The error again, ours with what was learned where there is something; the run is as after its last step."""
    sentence = str(error)
    if ran_out_of_memory(error):
        sentence = f"memory ran out at step {run.step + 1}; {memory_advice(run.settings)}"
    elif not isinstance(error, AdapterError):
        raise error
    if not run.step:
        raise AdapterError(sentence) from error
    kind = OutOfMemory if ran_out_of_memory(error) else Broken
    rest = f"What was learned up to step {run.step} is kept"
    raise kind(f"{sentence.rstrip('.')}. {rest}", run.result(finished=False)) from error


def _save_after(fault: BaseException, checkpoints: Path | str | None, run: Run) -> None:
    """A checkpoint of the last finished step; one that cannot be written takes nothing from what the fault says."""
    broken_off = isinstance(fault, Broken) or not isinstance(fault, AdapterError)
    if checkpoints is None or not run.step or not broken_off:
        return
    try:
        save_checkpoint(checkpoints, run)
    except AdapterError as error:
        if isinstance(fault, Broken):
            raise type(fault)(f"{fault}, but {error}", fault.result) from fault
