"""How much memory there is, and whether what is about to be made fits into it."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import AdapterError

SHARE = 0.5  # of what is free: more would push other programs out


def free_memory() -> int | None:
    """Bytes that a program can have without pushing others out, or None where the system does not tell."""
    found = [size for size in (_of_the_machine(), _of_the_container()) if size is not None]
    return min(found) if found else None


def check_room(what: str, size: int, otherwise: str) -> None:
    """Raise AdapterError unless `size` bytes are at most half of what is free; otherwise: the way out."""
    free = free_memory()
    if free is not None and size > SHARE * free:
        raise AdapterError(
            f"{what} takes about {size / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free; {otherwise}"
        )


def _of_the_machine() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _of_the_container() -> int | None:
    """What a control group leaves of its limit, page cache not counted."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        figures = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        return None if limit == "max" else max(0, int(limit) - used + int(figures.get("file", 0)))
    except (OSError, ValueError):
        return None
