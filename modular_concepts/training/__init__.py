"""Training of one concept on a frozen base: methods, loop, losses, exact resume."""

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
