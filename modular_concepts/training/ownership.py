"""Whose a folder of checkpoints is: one training's, which alone writes and prunes there.

Each checkpoint names its run, drawn when a training starts and handed on when it is resumed.  While a training goes
on its folder is locked, by the system and not by a file that would outlive a killed process.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import AdapterError
from ..storage.atomic import sync_folder
from ..storage.safetensors import FLOATS, read_header
from .checkpoint_checks import read_origin
from .settings import TrainSettings

PATTERN = re.compile(r"step-(\d{8})\.safetensors")
TORN = re.compile(r"\.step-\d{8}\.safetensors\.part")
DTYPES = (*FLOATS, "I64", "U8")  # that a checkpoint holds
BEFORE = "before"
LOCK = ".training.lock"  # where a folder itself cannot be locked
_BUSY = (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK)


class Occupied(AdapterError):
    """A folder holds another training's checkpoints; `movable` when none of them is being written just now."""

    def __init__(self, message: str, movable: bool):
        super().__init__(message)
        self.movable = movable


@dataclass(frozen=True)
class Owner:
    """The training that a checkpoint is of: its run, its concept's name, its step of so many (0: not known)."""

    run: str
    name: str
    step: int
    steps: int

    @property
    def finished(self) -> bool:
        return 0 < self.steps <= self.step

    def __str__(self) -> str:
        whose = f"{self.name!r}, " if self.name else ""
        return f"{whose}step {self.step}{f' of {self.steps}' if self.steps else ''}"


def checkpoints_in(folder: Path) -> list[Path]:
    """By rising step."""
    return sorted(path for path in folder.iterdir() if PATTERN.fullmatch(path.name)) if folder.is_dir() else []


def owner_of(path: Path) -> Owner | None:
    """Whose a checkpoint is; None for a file that cannot be read as one."""
    try:
        origin = read_origin(read_header(path, DTYPES, empty=True).metadata)
    except AdapterError:
        return None
    name, steps = (origin.identity["settings"].get(key) for key in ("name", "steps"))
    return Owner(origin.run, str(name or "")[:80], _step(path), steps if isinstance(steps, int) else 0)


def prune(folder: Path, run: str, keep: int) -> None:
    """Remove a run's checkpoints but for the newest `keep`; whatever else lies in the folder stays.

    One that cannot be removed, as a program may hold it open, costs room and nothing else: the next time it may go.
    """
    ours = [path for path in checkpoints_in(folder) if (owner := owner_of(path)) is not None and owner.run == run]
    remove_if_possible(ours[:-keep])


def remove_if_possible(paths: Iterable[Path]) -> None:
    """Remove files that nobody needs; what cannot be removed stays."""
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()


def checkpoints_to_come(folder: Path | str, settings: TrainSettings, done: int = 0) -> int:
    """How many more files than now a training will have there at once: those it keeps, and the one it writes."""
    every = settings.checkpoint_every
    written = 1 + ((settings.steps - 1) // every - done // every if every else 0)
    return max(1, min(written, settings.keep_checkpoints + 1 - len(checkpoints_in(Path(folder)))))


def refuse_two_runs(folder: Path) -> None:
    """Raise AdapterError for a folder with checkpoints of several trainings, where the newest may be another's."""
    owners = {path: owner for path in checkpoints_in(folder) if (owner := owner_of(path)) is not None}
    newest = {owner.run: (path.name, owner) for path, owner in owners.items()}
    if len(newest) > 1:
        listed = " and ".join(f"{name} of {owner}" for name, owner in newest.values())
        raise AdapterError(
            f"{folder} holds checkpoints of {len(newest)} trainings: {listed}; name the file to go on from"
        )


def check_folder(folder: Path | str, resume: Path | str | None = None) -> None:
    """Raise Occupied before any work for a folder that `claimed` would refuse; nothing is made or moved."""
    folder = Path(folder)
    if folder.is_dir():
        with _locked(folder):
            run, step = _run_and_step(resume)
            _refuse(folder, _others(folder, run, step), run)


@contextmanager
def claimed(folder: Path | str, resume: Path | str | None = None, set_aside: bool = False) -> Generator[None]:
    """Within the block the folder, which is made, belongs to one training alone.

    resume: the checkpoint that it goes on from, or a folder for its newest; its own later ones count as another's, for
    they would outlive what it does.
    set_aside: what is another's moves to a folder `before` in it; of a training that was not finished nothing is lost.
    Raises Occupied for a folder that is another's, AdapterError for one that cannot be made.
    """
    folder = Path(folder)
    _make(folder)
    with _locked(folder) as alone:
        run, step = _run_and_step(resume)
        others = _others(folder, run, step)
        if others and set_aside:
            _move(folder, others)
        else:
            _refuse(folder, others, run)
        if alone:
            remove_if_possible([torn for torn in folder.iterdir() if TORN.fullmatch(torn.name)])
        yield


def _run_and_step(resume: Path | str | None) -> tuple[str, int]:
    """Of the checkpoint that is resumed, or of the newest in that folder."""
    checkpoints = [] if resume is None else checkpoints_in(Path(resume)) if Path(resume).is_dir() else [Path(resume)]
    owner = owner_of(checkpoints[-1]) if checkpoints and PATTERN.fullmatch(checkpoints[-1].name) else None
    return ("", 0) if owner is None else (owner.run, owner.step)


def _others(folder: Path, run: str, step: int) -> dict[Path, Owner | None]:
    owners = {path: owner_of(path) for path in checkpoints_in(folder)}
    return {path: owner for path, owner in owners.items() if owner is None or owner.run != run or owner.step > step}


def _refuse(folder: Path, others: Mapping[Path, Owner | None], run: str) -> None:
    if not others:
        return
    path, owner = list(others.items())[-1]
    if owner is None:
        whose, way_out = f"{path.name}, which cannot be read", "move it away"
    elif owner.run == run:
        whose, way_out = f"later checkpoints of this training ({owner})", "go on from the newest"
    else:
        whose, way_out = f"the checkpoints of another training ({owner})", "resume that one"
    raise Occupied(f"{folder} holds {whose}; {way_out}, or choose another folder for checkpoints", movable=True)


def _move(folder: Path, others: Mapping[Path, Owner | None]) -> None:
    """To `before`, or where that holds a training that was not finished, to the first free before-2, before-3, ..."""
    number, place = 1, folder / BEFORE
    # A link may lead to somebody else's.
    while place.is_symlink() or not _all_finished(checkpoints_in(place)):
        number += 1
        place = folder / f"{BEFORE}-{number}"
    _make(place)
    try:
        for old in checkpoints_in(place):
            old.unlink()
        for path in others:
            path.replace(place / path.name)
    except OSError as error:
        raise AdapterError(
            f"the checkpoints in {folder} cannot be put aside into {place.name} ({error.strerror}); "
            "choose another folder for checkpoints"
        ) from error
    sync_folder(place)
    sync_folder(folder)


def _all_finished(paths: Sequence[Path]) -> bool:
    """Whether they are of one training that came to its end, and hence in a concept's file."""
    if not paths:
        return True
    owners = [owner for path in paths if (owner := owner_of(path)) is not None]
    return len(owners) == len(paths) and len({owner.run for owner in owners}) == 1 and owners[-1].finished


def _make(folder: Path) -> None:
    try:
        new = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for made in new:
            sync_folder(made.parent)
    except OSError as error:
        raise AdapterError(
            f"the folder {folder} cannot be made ({error.strerror}); choose another for checkpoints"
        ) from error


@contextmanager
def _locked(folder: Path) -> Generator[bool]:
    """Whether the lock is held; a file system without locks has none.  Raises Occupied where another process has it."""
    try:
        handle = _lock(folder)
    except OSError as error:
        if isinstance(error, FileExistsError | BlockingIOError) or error.errno in _BUSY:
            raise Occupied(
                f"another training is writing its checkpoints to {folder} just now; wait for its end, or choose "
                "another folder for checkpoints",
                movable=False,
            ) from error
        handle = None
    try:
        yield handle is not None
    finally:
        if handle is not None:
            os.close(handle)


def _lock(folder: Path) -> int:
    """A file descriptor that holds the folder until it is closed, by us or by the end of the process."""
    if os.name == "nt":  # deleted by the system when it is closed
        return os.open(folder / LOCK, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_TEMPORARY)
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def _step(path: Path) -> int:
    named = PATTERN.fullmatch(path.name)
    return int(named[1]) if named else 0
