"""What time and memory a training will take, measured before it starts: a picture or two, forward and backward."""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..adapters.basis import OrthogonalBasis
from ..errors import AdapterError
from .company import canvases_of
from .memory import memory_advice, ran_out_of_memory
from .problem import Problem
from .run import Run
from .settings import TrainSettings
from .step import Step, on_base

MOMENTS = {"adamw": 8.0, "adamw8bit": 2.0}  # bytes for each trained number
HEADER = 512  # bytes that a file says of a tensor, at most


@dataclass(frozen=True)
class Estimate:
    """seconds_per_step, and memory_bytes at the peak beside the base itself; `steps` is for how many.

    done: how many a checkpoint has behind it already.
    concept_bytes, checkpoint_bytes: of the concept's file, and of one checkpoint.
    """

    seconds_per_step: float
    memory_bytes: int
    steps: int
    done: int = 0
    concept_bytes: int = 0
    checkpoint_bytes: int = 0

    def __str__(self) -> str:
        whole = self.seconds_per_step * self.steps
        steps = "step" if self.steps == 1 else "steps"
        which = f"{self.steps} more {steps} after step {self.done}" if self.done else f"{self.steps} {steps}"
        return (
            f"about {_duration(self.seconds_per_step)} a step, {_duration(whole)} for {which}; "
            f"about {self.memory_bytes / 2**30:.2g} GiB of memory beside the model"
        )


def rehearse(
    problem: Problem, settings: TrainSettings, basis: OrthogonalBasis | None = None, done: int = 0
) -> Estimate:
    """Measure small steps and scale them to the batch; what the training itself will draw is not touched.

    Memory grows by the same for each further picture; time is that of the pictures one by one, which a large batch on
    an accelerator stays below.  In company it is the mean of both kinds of steps, and the memory of the larger.
    done: steps that a checkpoint has behind it, which take no time any more.
    Raises AdapterError when even one picture is too much for the memory.
    """
    with torch.inference_mode(False), torch.enable_grad():
        run = Run(problem, replace(settings, batch=1), basis)
        try:
            with on_base(problem, run) as step:
                measured = {share: _measure(step, settings, share) for share in _kinds_of_steps(settings)}
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
            raise AdapterError(
                f"memory is too small for {run.settings.batch} of {settings.batch} pictures at once; "
                f"{memory_advice(run.settings)}"
            ) from error
    left = max(0, settings.steps - done)
    share = settings.company
    seconds = sum((share if wide else 1 - share) * each for wide, (each, _) in measured.items())
    peak = max(peak for _, peak in measured.values())
    # The identity of whole weights is as large as the square of a layer's width.
    frozen = sum(_bytes(getattr(adapter, part)) for adapter in run.adapters.values() for part in adapter.frozen)
    memory = frozen + _learned_bytes(step, peak, frozen, left, done)
    return Estimate(seconds, memory, left, done, concept_bytes(run), checkpoint_bytes(run))


def _kinds_of_steps(settings: TrainSettings) -> list[float]:
    """Shares of company with which every step is one kind: pictures alone, and wide canvases."""
    return [kind for kind, there in ((0.0, settings.company < 1), (1.0, settings.company > 0)) if there]


def _measure(step: Step, settings: TrainSettings, company: float) -> tuple[float, int]:
    """Seconds of a step, and bytes at its peak, of a whole batch, from those of one picture or canvas and of two."""
    run, wide = step.run, company > 0
    # Of pictures: two make one canvas, and class pictures are as many as before.
    count, *batches = (canvases_of(settings.batch), 2, 4) if wide else (settings.batch, 1, 2)
    less, more = (replace(settings, batch=min(batch, settings.batch), company=company) for batch in batches)
    run.settings = less
    one = _peak(step)
    started = time.monotonic()
    step.gradients()
    _wait(step.parameters[0].device)
    seconds = time.monotonic() - started
    run.settings = more
    return seconds * count, one + (_peak(step) - one) * (count - 1)


def _learned_bytes(step: Step, peak: int, frozen: int, left: int, done: int) -> int:
    """The most of factors, moments, copies of both as after the last step, gradients and what these come from.

    peak: of a step's gradients; frozen: of frozen factors, which the result copies too.  Moments come with the first
    update, their copies with the second.
    """
    numbers = sum(parameter.numel() for parameter in step.parameters)
    factors, moments = sum(map(_bytes, step.parameters)), round(numbers * MOMENTS[step.run.settings.optimizer])
    there = min(2, max(0, left - (not done)))
    return 2 * factors + max(there * moments + peak, min(2, there + 1) * moments + factors, moments + factors + frozen)


def concept_bytes(run: Run) -> int:
    """At most, with the recipe: the file of a concept whose adapters and words these are."""
    adapters = run.adapters.values()
    factors = sum(adapter.out_features * adapter.rank + adapter.lora_down.numel() + HEADER // 4 for adapter in adapters)
    return 4 * (factors + sum(rows.numel() for rows in run.tokens.values())) + 64 * HEADER


def checkpoint_bytes(run: Run) -> int:
    """At most: learned tensors, moments and losses."""
    numbers = [parameter.numel() for parameter in run.parameters().values()]
    each = 4 + MOMENTS[run.settings.optimizer]
    return round(sum(numbers) * each) + 4 * HEADER * len(numbers) + 8 * run.settings.steps + 64 * HEADER


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _peak(step: Step) -> int:
    step.run.optimizer.zero_grad()
    with LiveMemory() as live:
        step.gradients()
    return live.peak


class LiveMemory(TorchDispatchMode):
    """The most bytes of new tensors that were alive at once, of any device, forward and backward."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._born(leaf.untyped_storage(), before)
        return output

    def _born(self, storage: torch.UntypedStorage, before: set[int]) -> None:
        key = storage._cdata
        if key in self.known or key in before:
            return
        size = storage.nbytes()
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._died, key, size)

    def _died(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def _wait(device: torch.device) -> None:
    """An accelerator answers before it is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
