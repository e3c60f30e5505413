"""How much memory there is, and whether what is about to be made fits into it."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import AdapterError

_GROUP = Path("/sys/fs/cgroup")
SHARE = 0.5  # of what is free: more would push other programs out


def free_memory() -> int | None:
    """Bytes that a program can have without pushing others out, or None where the system does not tell."""
    return _least(_available(), _of_the_container())


def machine_memory() -> int | None:
    """Bytes that a program could have if it were alone, or None where the system does not tell."""
    return _least(_of_the_machine(), _limit_of_the_container())


def check_room(what: str, size: int, otherwise: str) -> None:
    """Raise AdapterError unless `size` bytes are at most half of what is free; otherwise: the way out."""
    free = free_memory()
    if free is not None and size > SHARE * free:
        raise AdapterError(
            f"{what} takes about {size / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free; {otherwise}"
        )


def _least(*sizes: int | None) -> int | None:
    return min((size for size in sizes if size is not None), default=None)


def _available() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return _of_the_machine()


def _of_the_machine() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _limit_of_the_container() -> int | None:
    """What a control group may take at most."""
    try:
        limit = (_GROUP / "memory.max").read_text(encoding="ascii").strip()
        return None if limit == "max" else int(limit)
    except (OSError, ValueError):
        return None


def _of_the_container() -> int | None:
    """What a control group leaves of its limit, page cache not counted."""
    if (limit := _limit_of_the_container()) is None:
        return None
    try:
        used = int((_GROUP / "memory.current").read_text(encoding="ascii"))
        figures = dict(line.split() for line in (_GROUP / "memory.stat").read_text(encoding="ascii").splitlines())
        return max(0, limit - used + int(figures.get("file", 0)))
    except (OSError, ValueError):
        return None
