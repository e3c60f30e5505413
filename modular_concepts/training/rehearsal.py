"""What time and memory a training will take, measured before it starts: one picture, forward and backward."""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..bases import OrthogonalBasis
from ..errors import AdapterError
from .memory import memory_advice, ran_out_of_memory
from .problem import Problem
from .run import Run
from .settings import TrainSettings
from .step import on_base

MOMENTS = {"adamw": 8.0, "adamw8bit": 2.0}  # bytes for each trained number


@dataclass(frozen=True)
class Estimate:
    """seconds_per_step, and memory_bytes at the peak beside the base itself; `steps` is for how many."""

    seconds_per_step: float
    memory_bytes: int
    steps: int

    def __str__(self) -> str:
        whole = self.seconds_per_step * self.steps
        return (
            f"about {_duration(self.seconds_per_step)} a step, {_duration(whole)} for {self.steps} steps; "
            f"at most about {self.memory_bytes / 2**30:.2g} GiB of memory beside the model"
        )


def rehearse(problem: Problem, settings: TrainSettings, basis: OrthogonalBasis | None = None) -> Estimate:
    """Measure one picture's step and scale it to the batch; what the training itself will draw is not touched.

    A batch costs at most as much time and memory as its pictures one by one; a large one on an accelerator less time.
    Raises AdapterError when even one picture is too much for the memory.
    """
    with torch.inference_mode(False), torch.enable_grad():
        run = Run(problem, replace(settings, batch=1), basis)
        trained = list(run.parameters().values())
        numbers = sum(parameter.numel() for parameter in trained)
        try:
            with on_base(problem, run) as step:
                with LiveMemory() as live:
                    step.gradients()
                started = time.monotonic()
                step.gradients()
                _wait(trained[0].device)
                seconds = time.monotonic() - started
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
            raise AdapterError(
                f"memory is too small for one picture; {memory_advice(replace(settings, batch=1))}"
            ) from error
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    one = max(0, live.peak - gradients)
    kept = round(gradients * 3 + numbers * MOMENTS[settings.optimizer])  # factors, their last good copy, gradients
    return Estimate(seconds * settings.batch, one * settings.batch + kept, settings.steps)


class LiveMemory(TorchDispatchMode):
    """The most bytes of new tensors that were alive at once, of any device, forward and backward."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        output = function(*args, **(kwargs or {}))
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
