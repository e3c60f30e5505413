"""What to say when memory runs out."""

from __future__ import annotations

import torch

from .settings import TrainSettings

# The CPU's allocator raises a plain RuntimeError, so its words are all that there is to know it by.
_SIGNS = ("can't allocate memory", "not enough memory", "out of memory")


def ran_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


def memory_advice(settings: TrainSettings) -> str:
    """The three settings that help most, of those that are not used yet; in the order of docs/training.md."""
    ways = (
        (settings.batch > 1, f"lower batch (now {settings.batch})"),
        (settings.batch == 1 and settings.company > 0, "set company to 0 (its pictures are twice as wide)"),
        (True, "train on smaller pictures"),
        (not settings.gradient_checkpointing, "turn gradient_checkpointing on"),
        (settings.precision == "fp32", "set precision to bf16"),
        (True, "train fewer layers"),
        (True, f"lower rank (now {settings.rank})"),
    )
    first, second, third = [words for helps, words in ways if helps][:3]
    return f"{first}, {second} or {third}"
