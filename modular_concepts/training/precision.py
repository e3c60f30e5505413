"""What the base computes in while it trains; learned tensors and optimizer stay in float32."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def computing_in(precision: str, device: torch.device) -> torch.autocast:
    """The block in which matrix products and convolutions run in `precision`."""
    dtype = DTYPES[precision]
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


@dataclass
class LossScale:
    """What the loss is multiplied by so that small gradients do not vanish in float16; a power of two, so exact.

    A gradient that overflows halves it and the step is done again; so many good steps double it.
    Source: Micikevicius et al. 2018, section 3.2.
    """

    value: float = 2.0**16
    good_steps: int = 0
    patience: int = 1000

    def unscale(self, gradients: Iterable[Tensor]) -> None:
        torch._foreach_mul_(list(gradients), 1 / self.value)

    def grow(self) -> None:
        self.good_steps += 1
        if self.good_steps >= self.patience:
            self.value, self.good_steps = self.value * 2, 0

    def shrink(self) -> bool:
        """Whether there was room to."""
        self.value, self.good_steps = self.value / 2, 0
        return self.value >= 1

    def state(self) -> Tensor:
        return torch.tensor([self.value, self.good_steps], dtype=torch.float64)

    def set_state(self, state: Tensor) -> None:
        self.value, self.good_steps = state[0].item(), int(state[1])
