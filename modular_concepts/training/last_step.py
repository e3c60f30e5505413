"""The state after the last finished step, to go back to from a step that was broken off anywhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .run import Run


class LastStep:
    """A copy of what a step changes: learned tensors, their optimizer state, generators, order, losses.

    `begin` comes before a step, `before_update` before the optimizer; `restore` undoes whatever came after.
    """

    def __init__(self, run: Run):
        self.run = run
        self.parameters = list(run.parameters().values())
        self.learned = [parameter.detach().clone() for parameter in self.parameters]
        self.moments: list[dict[str, object]] = [{} for _ in self.parameters]
        self.updating = False
        self.begin()

    def begin(self) -> None:
        """A step begins: what it draws can be drawn again."""
        run = self.run
        self.random = run.random_state()
        self.scale = None if run.loss_scale is None else run.loss_scale.state()
        self.step, self.smoothed_loss = run.step, run.smoothed_loss
        self.updating = False

    def before_update(self) -> None:
        """The gradients are there; what the optimizer changes is copied."""
        states = [self.run.optimizer.state.get(parameter, {}) for parameter in self.parameters]
        with torch.no_grad():
            torch._foreach_copy_(self.learned, self.parameters)
            _copy_states(states, self.moments)
        self.updating = True

    def restore(self) -> None:
        """The run is as it was when the step began."""
        run = self.run
        run.optimizer.zero_grad()
        run.set_random_state(self.random)
        if self.scale is not None and run.loss_scale is not None:
            run.loss_scale.set_state(self.scale)
        run.step, run.smoothed_loss = self.step, self.smoothed_loss
        del run.losses[self.step :]
        if self.updating:
            self.restore_learned()
            for parameter, before in zip(self.parameters, self.moments, strict=True):
                if not before:
                    run.optimizer.state.pop(parameter, None)
            stepped = [place for place, before in enumerate(self.moments) if before]
            with torch.no_grad():
                _copy_states(
                    [self.moments[place] for place in stepped],
                    [run.optimizer.state[self.parameters[place]] for place in stepped],
                )
        self.updating = False

    def restore_learned(self) -> None:
        """Only what was learned, as it was before the last update."""
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.learned)


def _copy_states(sources: Sequence[dict], targets: Sequence[dict]) -> None:
    """The same values in `targets`, in the tensors that they have already where those fit."""
    into, values = [], []
    for source, target in zip(sources, targets, strict=True):
        for part, value in source.items():
            there = target.get(part)
            if isinstance(value, Tensor) and isinstance(there, Tensor) and there.shape == value.shape:
                into.append(there)
                values.append(value)
            else:
                target[part] = value.detach().clone() if isinstance(value, Tensor) else value
    if into:
        torch._foreach_copy_(into, values)
