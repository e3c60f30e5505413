"""Promises 1, 2 and 8: mutated files of every kind, writes that break off, trainings that are killed."""

from __future__ import annotations

import importlib
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, is_dataclass
from multiprocessing import get_context
from pathlib import Path

from bench.torture.laws import ROOT

SLOWEST = 1.0  # processor seconds that reading one file may take
GROWTH = 64 * 2**20  # bytes that the peak may rise by


def of_tests(module: str, function: str, *inputs: object, **named: object):
    """Call MODULE.FUNCTION(*inputs, folder, **named) of the tests in a process of its own, which may crash."""
    with tempfile.TemporaryDirectory() as place, ProcessPoolExecutor(1, get_context("spawn")) as one:
        inside = Path(place) / "around" / "folder"  # what others write to the folder for temporary files is not seen
        inside.mkdir(parents=True)
        try:
            return one.submit(_call, module, function, inputs, named, str(inside)).result()
        except BrokenProcessPool as error:
            raise RuntimeError(f"{function} {inputs} {named}: the process crashed") from error


def _call(module: str, function: str, inputs: tuple, named: dict, place: str):
    answer = getattr(of_the_tests(module), function)(*inputs, Path(place), **named)
    return [asdict(each) if is_dataclass(each) else each for each in answer] if isinstance(answer, list) else answer


def of_the_tests(module: str):
    for folder in ("engine", "files"):
        if str(ROOT / "tests" / folder) not in sys.path:
            sys.path.insert(0, str(ROOT / "tests" / folder))
    return importlib.import_module(module)


def mutated(total: int, seed: int, together: bool = False) -> dict:
    """At least `total` mutated files, shared out among all kinds, and every entry of base folders with odd values.

    A process for each kind, so that a crash is one kind's; or all in one, which is sooner over.
    """
    kinds = list(of_the_tests("mutations").KINDS)
    each, outcomes = -(-total // len(kinds)), []
    for some in [kinds] if together else [[kind] for kind in kinds]:
        try:
            outcomes += of_tests("mutations", "run", each, seed, kinds=some)
        except RuntimeError as error:
            outcomes.append({"kind": some[0], "tried": each, "refused": 0, "accepted": 0, "faults": [str(error)]})
        print("  " + "; ".join(f"{kind['kind']}: {kind['tried']}" for kind in outcomes[-len(some) :]), flush=True)
    outcomes += of_tests("base_folders", "swept", 50 if together else 1, seed)
    return {"outcomes": outcomes}


def crashed(count: int, seed: int) -> dict:
    return of_tests("crashes", "crashed_writes", count, seed)


def killed(count: int, seed: int) -> dict:
    return of_tests("crashes", "killed_trainings", count, seed)
