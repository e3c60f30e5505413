"""Room for what a work will write, looked at before it; places for what must not be lost where that fails after it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import AdapterError
from .atomic import Taken


@dataclass(frozen=True)
class Kept:
    """Where something was written; `fault` says why not where it was to be."""

    path: Path
    fault: AdapterError | None = None


def check_room(needs: Iterable[tuple[Path, int]]) -> None:
    """Raise AdapterError when a disk has not the bytes that files in these folders will take together."""
    wanted: dict[int, tuple[Path, int]] = {}
    for folder, size in needs:
        there = _existing(folder)
        with suppress(OSError):
            disk = there.stat().st_dev
            place, before = wanted.get(disk, (there, 0))
            wanted[disk] = (place, before + size)
    for place, size in wanted.values():
        try:
            free = shutil.disk_usage(place).free
        except OSError:
            continue  # it does not tell: the write itself will
        if free < size:
            raise AdapterError(
                f"the disk of {place} has {_megabytes(free)} left, and {_megabytes(size)} will be written there; make "
                "room, or choose a folder on another disk"
            )


def keep(write: Callable[[Path], None], path: Path, others: Sequence[Path]) -> Kept:
    """Write to `path`, or, where that cannot be, under a free name in the first of the other folders that takes it.

    write: makes the file whole or not at all.  Within `only_new`, a name that is taken has a free one beside it.
    Raises AdapterError, of the first place, when none takes it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
        return Kept(path)
    except (AdapterError, OSError) as error:
        fault = error if isinstance(error, AdapterError) else AdapterError(f"{path}: cannot be written: {error}")
    beside = [path.parent] if isinstance(fault, Taken) else []
    for folder in dict.fromkeys([*beside, *others]):
        if not folder.is_dir() or (folder == path.parent and not beside):
            continue
        with suppress(AdapterError, OSError):
            place = free_name(folder / path.name)
            write(place)
            return Kept(place, fault)
    raise fault


def last_places() -> list[Path]:
    """Folders that most likely can be written to: the working folder, the person's own, the one for temporary files."""
    places = []
    for find in (Path.cwd, Path.home, lambda: Path(tempfile.gettempdir())):
        with suppress(OSError, RuntimeError):
            places.append(find())
    return places


def free_name(path: Path) -> Path:
    """The path, or with the first number from 2 on that no file has."""
    number, free = 1, path
    while os.path.lexists(free):
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    return free


def _existing(folder: Path) -> Path:
    return next((place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir()), folder)


def _megabytes(size: int) -> str:
    return f"{size / 2**30:.1f} GB" if size >= 2**30 else f"{size / 2**20:.1f} MB"
