"""Training of one concept on a frozen base: methods, loop, losses, exact resume."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..seeds import seeded
    from .attach import attached, frozen_networks
    from .checkpoint import Changed, check_checkpoint, newest_checkpoint, restore_checkpoint, save_checkpoint
    from .loop import Broken, Cancelled, Diverged, OutOfMemory, Progress, Unfinished, train
    from .methods import new_adapters
    from .ownership import Occupied
    from .problem import Examples, Problem
    from .rehearsal import Estimate, rehearse
    from .run import Run, TrainResult
    from .settings import TrainSettings

__all__ = [
    "Broken",
    "Cancelled",
    "Changed",
    "Diverged",
    "Estimate",
    "Examples",
    "Occupied",
    "OutOfMemory",
    "Problem",
    "Progress",
    "Run",
    "TrainResult",
    "TrainSettings",
    "Unfinished",
    "attached",
    "check_checkpoint",
    "frozen_networks",
    "new_adapters",
    "newest_checkpoint",
    "rehearse",
    "restore_checkpoint",
    "save_checkpoint",
    "seeded",
    "train",
]

_PLACES = {
    **dict.fromkeys(("seeded",), "..seeds"),
    **dict.fromkeys(
        (
            "attached",
            "frozen_networks",
        ),
        ".attach",
    ),
    **dict.fromkeys(
        (
            "Changed",
            "check_checkpoint",
            "newest_checkpoint",
            "restore_checkpoint",
            "save_checkpoint",
        ),
        ".checkpoint",
    ),
    **dict.fromkeys(
        (
            "Broken",
            "Cancelled",
            "Diverged",
            "OutOfMemory",
            "Progress",
            "Unfinished",
            "train",
        ),
        ".loop",
    ),
    **dict.fromkeys(
        (
            "FlowSchedule",
            "NoiseSchedule",
            "Schedule",
        ),
        ".losses",
    ),
    **dict.fromkeys(("new_adapters",), ".methods"),
    **dict.fromkeys(("Occupied",), ".ownership"),
    **dict.fromkeys(
        (
            "Examples",
            "Problem",
        ),
        ".problem",
    ),
    **dict.fromkeys(
        (
            "Estimate",
            "rehearse",
        ),
        ".rehearsal",
    ),
    **dict.fromkeys(
        (
            "Run",
            "TrainResult",
        ),
        ".run",
    ),
    **dict.fromkeys(("TrainSettings",), ".settings"),
}


def __getattr__(name: str) -> object:
    """Each name from its file when it is first asked for: settings and presets are read without loading torch."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name], __name__), name)
