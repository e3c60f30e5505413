"""What a trial saw, kept in one JSON file a trial, so that a run that ends early keeps what it has."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from modular_concepts.storage.atomic import replacing


@dataclass(frozen=True)
class Scale:
    """How often things are tried."""

    seeds: int = 8
    one_in: int = 1  # of the law tests, only every so-manyth
    mutations: int = 5200
    golden: int = 1000
    cycles: int = 3
    crashed: int = 200
    killed: int = 50
    queued: int = 500
    cancels: int = 50
    host_tests: bool = True
    host_files: tuple[str, ...] = ()


QUICK = Scale(1, 40, 260, 20, 1, 4, 2, 20, 2, False)


@dataclass(frozen=True)
class Trial:
    """name: of its file.  rows: the promises that it speaks for.  run: () -> facts."""

    name: str
    rows: tuple[int, ...]
    run: Callable[[], dict]


def carried_out(trial: Trial, folder: Path) -> dict:
    """Run a trial and keep what it saw.  A trial that fails is evidence too: {"fault": ...}."""
    start = time.monotonic()
    try:
        facts = trial.run()
    except Exception as error:  # what is wrong with one promise must not hide the others
        facts = {"fault": f"{type(error).__name__}: {error}"[:1500]}
    seen = {
        "trial": trial.name,
        "rows": trial.rows,
        "when": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": machine(),
        "seconds": round(time.monotonic() - start, 1),
        **facts,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / f"{trial.name}.json") as file:
        file.write(json.dumps(seen, indent=1).encode())
    return seen


def gathered(folder: Path) -> dict[str, dict]:
    """Trial -> what it saw, of every trial that this folder has evidence of."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> str:
    """In plain words, without anything that names this very machine."""
    return (
        f"{cores()} core{'s' * (cores() != 1)} ({processor_name()}), {memory()}no GPU, {platform.system()}, "
        f"Python {platform.python_version()}, torch {torch.__version__.partition('+')[0]}"
    )


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB, "
    except (AttributeError, ValueError, OSError):
        return ""
