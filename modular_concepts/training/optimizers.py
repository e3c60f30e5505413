"""The optimizers, and their state as tensors that a checkpoint can hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from ..adapters.low_rank import LowRank
from ..errors import AdapterError
from .settings import TrainSettings

BETAS = (0.9, 0.999)
# The first moment over the root of the second, at most (Cauchy and Schwarz): 7.3, and somewhat for rounding.
MOST_MOMENT = 8.0


def new_optimizer(
    settings: TrainSettings, adapters: Mapping[str, LowRank], tokens: Mapping[str, Tensor]
) -> torch.optim.Optimizer:
    """AdamW with a group for each learning rate; only adapters decay.

    Raises AdapterError when there is nothing to train, or adamw8bit is chosen where bitsandbytes is missing.
    """
    layers, text_layers = [], []
    for name, adapter in adapters.items():
        apart = settings.text_encoder_lr is not None and name.startswith("text_encoder")
        (text_layers if apart else layers).extend(adapter.trainable().values())
    groups = [
        {"params": layers, "full_lr": settings.adapter_lr, "weight_decay": settings.weight_decay},
        {"params": text_layers, "full_lr": settings.text_encoder_lr, "weight_decay": settings.weight_decay},
        {"params": list(tokens.values()), "full_lr": settings.token_lr, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise AdapterError("there is nothing to train: no layer is chosen and no trigger word is given")
    fused = {"fused": True} if settings.optimizer == "adamw" else {}
    return optimizer_class(settings)(groups, lr=0.0, betas=BETAS, **fused)


def optimizer_class(settings: TrainSettings) -> Callable[..., torch.optim.Optimizer]:
    """Raises AdapterError for adamw8bit where bitsandbytes is missing."""
    if settings.optimizer == "adamw":
        return torch.optim.AdamW
    try:
        from bitsandbytes.optim import AdamW8bit
    except (ImportError, OSError, RuntimeError) as error:
        raise AdapterError(
            f"optimizer adamw8bit needs the package bitsandbytes, which is not usable here ({error}); "
            "install it into the Python that runs this, or choose adamw"
        ) from error
    return AdamW8bit


def limit_gradients(parameters: Iterable[Tensor], longest: float) -> Tensor:
    """Scale all gradients so that together they are at most so long; returns how long they were, of no dimension.

    The same bits as torch's own clipping by norm.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    lengths = [torch.linalg.vector_norm(gradient) for gradient in gradients]
    norm = torch.linalg.vector_norm(torch.stack([length.to(lengths[0].device) for length in lengths]))
    share = (longest / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:  # words may lie on another device than layers
        gradient.mul_(share.to(gradient.device))
    return norm


def optimizer_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """What the optimizer keeps of one parameter, as tensors; numbers become int64 of no dimension."""
    state = optimizer.state[parameter]
    if not state and isinstance(optimizer, torch.optim.AdamW):
        return _untouched(parameter)
    return {part: value if isinstance(value, Tensor) else torch.tensor(value) for part, value in state.items()}


def fresh_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """`optimizer_state` before a parameter's first gradient: the parts, shapes and types that it always has."""
    if isinstance(optimizer, torch.optim.AdamW):
        return _untouched(parameter)
    before = optimizer.state.pop(parameter, {})
    for number, group in enumerate(optimizer.param_groups):
        for place, other in enumerate(group["params"]):
            if other is parameter:
                cast(Any, optimizer).init_state(group, parameter, number, place)
    fresh = optimizer_state(optimizer, parameter)
    optimizer.state[parameter] = before
    return fresh


def set_optimizer_state(optimizer: torch.optim.Optimizer, parameter: Tensor, state: Mapping[str, Tensor]) -> None:
    """Bring back what `optimizer_state` gave."""
    moved: dict[str, Tensor | int] = {part: value.to(parameter.device) for part, value in state.items()}
    if not isinstance(optimizer, torch.optim.AdamW) and "step" in moved:
        moved["step"] = int(moved["step"])
    optimizer.state[parameter] = moved


def _untouched(parameter: Tensor) -> dict[str, Tensor]:
    """AdamW's state before a parameter's first gradient, a word that no caption has used yet for instance."""
    return {
        "step": torch.zeros(()),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }
