"""Writes that are broken off and trainings that are killed, so many times as are asked for: is anything lost?

`crashed_writes` and `killed_trainings` return {"tried": n, "lost": n, "faults": [a sentence for each]}.  A broken-off
write must leave each file as it was or as it was to be, and room for the next write; a killed training that is resumed
must end with the bits of one that was not.  The same seed tries the same moments.
"""

from __future__ import annotations

import builtins
import errno
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import forkserver
from pathlib import Path

import torch
import torch._dynamo  # which the first step would import: here it is forked with everything else
from safetensors.torch import load, load_file, save_file
from tiny_problem import EVERYTHING, RESUME_SETTINGS, learned, problem_with_everything, tiny_basis, tiny_problem

from modular_concepts.adapters.low_rank import LowRank
from modular_concepts.concept import Concept, Recipe
from modular_concepts.errors import AdapterError
from modular_concepts.files.concept import save_concept
from modular_concepts.files.embeddings import export_embedding
from modular_concepts.files.kohya import export_kohya
from modular_concepts.files.moments import save_moments
from modular_concepts.merging.moments import Moment
from modular_concepts.storage.atomic import all_or_none, replacing
from modular_concepts.training.checkpoint import newest_checkpoint
from modular_concepts.training.loop import Keeping, Listeners, train

WAYS = ("kill", "full", "broken", "limit")
REASONS = {"full": errno.ENOSPC, "broken": errno.EIO}


# --- a process that is broken off ----------------------------------------------------------------------------


@dataclass
class Breaking:
    """At the `at`th thing that is asked of the disk: killed, or told that it is full or broken.  0 only counts."""

    way: str = "count"
    at: int = 0
    done: int = 0
    broke: str = ""

    def event(self, name: str, half: Callable[[], None] = lambda: None) -> None:
        self.done += 1
        if self.done == self.at:
            self.broke = name
            half()
            if self.way == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(REASONS[self.way], os.strerror(REASONS[self.way]))


class BrokenFile:
    """An open file, each write of which may end in the middle."""

    def __init__(self, file, breaking: Breaking):
        self.file, self.breaking = file, breaking

    def write(self, data) -> int:
        def half() -> None:
            self.file.write(bytes(data)[: len(data) // 2])
            self.file.flush()

        self.breaking.event("write", half)
        return self.file.write(data)

    def __getattr__(self, name: str):
        return getattr(self.file, name)

    def __enter__(self) -> BrokenFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


@contextmanager
def broken(breaking: Breaking) -> Iterator[None]:
    """Within the block whatever opens for writing, syncs, renames, links or removes goes through `breaking`."""
    patched = [(os, name) for name in ("fsync", "replace", "rename", "link", "unlink", "mkdir")]
    before = [(place, name, getattr(place, name)) for place, name in [*patched, (builtins, "open")]]
    real_path_open = Path.open

    def counted(name: str, function):
        def call(*inputs, **options):
            breaking.event(name)
            return function(*inputs, **options)

        return call

    def opened(path, mode="r", *inputs, **options):
        if not set(mode) & set("wxa+"):
            return real_open(path, mode, *inputs, **options)
        breaking.event("open")
        return BrokenFile(real_open(path, mode, *inputs, **options), breaking)

    real_open = builtins.open
    for place, name in patched:
        setattr(place, name, counted(name, getattr(place, name)))
    builtins.open = opened
    Path.open = lambda self, mode="r", *inputs, **options: opened(self, mode, *inputs, **options)
    try:
        yield
    finally:
        for place, name, function in before:
            setattr(place, name, function)
        Path.open = real_path_open


# --- writes --------------------------------------------------------------------------------------------------


def _concept(size: int) -> Concept:
    recipe = Recipe(
        method="lora", rank=4, alpha=4.0, base_hash="ab" * 32, architecture="toy", triggers=("<x>",), class_word="dog"
    )
    generator = torch.Generator().manual_seed(size)
    up, down = (torch.randn(shape, generator=generator) for shape in ((40 * size, 4), (4, 40)))
    layer = LowRank(up, down, 4.0, "lora", None, 40 * size)
    return Concept("x", {"unet.mid.attn1.to_q": layer}, {"<x>": torch.randn(2, 8, generator=generator)}, recipe)


def _write_concept(folder: Path, version: int) -> None:
    save_concept(_concept(version), folder / "x.safetensors")


def _write_moments(folder: Path, version: int) -> None:
    factor = torch.randn(4, 40, generator=torch.Generator().manual_seed(version))
    save_moments({"unet.mid.attn1.to_q": Moment(factor, 0.5)}, folder / "x.moments.safetensors")


def _write_text(folder: Path, version: int) -> None:
    with replacing(folder / "report.md") as file:
        for line in range(5):
            file.write(f"{version} {line}\n".encode() * 50)


def _write_checkpoints(folder: Path, version: int) -> None:
    """A training up to step `version`, of which the newest checkpoint alone stays."""
    settings = replace(RESUME_SETTINGS, steps=3, keep_checkpoints=1)
    there = sorted(folder.glob("step-*"))
    if not there or there[-1].name < f"step-{version:08d}":
        resume = folder if there else None
        train(
            tiny_problem(),
            settings,
            Listeners(lambda at: at.step >= version),
            Keeping(folder, resume=resume),
            basis=tiny_basis(),
        )


def _write_export(folder: Path, version: int) -> None:
    """Two files that belong together."""
    with all_or_none():
        export_embedding(_concept(version), "<x>", folder / "word.safetensors")
        export_kohya(_concept(version), folder / "layers.safetensors")


WRITERS = {
    "concept": _write_concept,
    "moments": _write_moments,
    "text": _write_text,
    "export": _write_export,
    "checkpoint": _write_checkpoints,
}


@dataclass(frozen=True)
class _Write:
    """writer: of WRITERS.  way: of WAYS.  over_old: whether there is a file already that it replaces."""

    writer: str
    way: str
    over_old: bool


def crashed_writes(count: int, seed: int, folder: Path) -> dict:
    """Break `count` writes off, each at a moment drawn from `seed`, over files that are there already and over none."""
    generator, faults, lost = random.Random(seed), [], 0  # noqa: S311 - a sample, no secret
    for number in range(count):
        writer = list(WRITERS)[number % len(WRITERS)]
        trial = _Write(writer, WAYS[number // len(WRITERS) % len(WAYS)], generator.random() < 0.75)
        with _folder(folder / f"write-{number}") as place:
            missing, other = _tried(trial, place, generator)
        lost += bool(missing)
        faults += [f"{trial}, trial {number}: {fault}" for fault in missing + other]
    return {"tried": count, "lost": lost, "faults": faults}


def _tried(trial: _Write, place: Path, generator: random.Random) -> tuple[list[str], list[str]]:
    """Sentences of what was lost, and of what else went wrong."""
    torn, whole, between = place / "torn", place / "whole", {}
    if trial.writer == "checkpoint":  # on its way to the second step a training writes the first, and removes it
        (place / "between").mkdir()
        _in_child(_write, trial.writer, 1, place / "between")
        between = _files(place / "between")
    torn.mkdir()
    if trial.over_old:
        _in_child(_write, trial.writer, 1, torn)
    old = _files(torn)
    shutil.copytree(torn, whole)
    events = _in_child(_write, trial.writer, 2, whole)["events"]
    new, at = _files(whole), generator.randint(1, events)
    limit = generator.randint(1, max(map(len, new.values()))) if trial.way == "limit" else 0
    ended = _in_child(_write, trial.writer, 2, torn, Breaking(trial.way, 0 if limit else at), limit)
    missing, other = _missing(torn, trial, old | between, new), []
    if trial.way == "kill" and ended["code"] != -signal.SIGKILL:
        other.append(f"it was not killed at {at} of {events}, but ended with {ended}")
    if "raw" in ended:
        other.append(f"a raw {ended['raw']} at {at} of {events}, limit {limit}")
    hidden = [path.name for path in torn.iterdir() if path.name.startswith(".")]
    if trial.way != "kill" and hidden and ended["broke"] != "unlink":
        other.append(f"{hidden} stayed at {at} of {events} ({ended['broke']}), limit {limit}")
    again = _in_child(_write, trial.writer, 2, torn)
    there = {name: data for name, data in _files(torn).items() if name not in between}
    if again.get("said") or again.get("raw") or not _alike(there, new):
        missing.append(f"the next write failed: {again}, {sorted(_files(torn))} and not {sorted(new)}")
    return missing, other


def _missing(torn: Path, trial: _Write, old: Mapping[str, bytes], new: Mapping[str, bytes]) -> list[str]:
    """Each file is the old one or the new one, and what was there still is."""
    now = _files(torn)
    cut = [
        name
        for name, data in now.items()
        if not any(name in before and _alike({name: data}, {name: before[name]}) for before in (old, new))
    ]
    if trial.writer == "export" and trial.way != "kill" and now not in (old, new):
        cut.append(f"one of {sorted(now)}")
    gone = set() if trial.writer == "checkpoint" and (now or not trial.over_old) else set(old) - set(now)
    return [f"{name} is neither the old nor the new one" for name in cut] + [f"{name} is gone" for name in gone]


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def _alike(some: Mapping[str, bytes], others: Mapping[str, bytes]) -> bool:
    """The same files; of checkpoints the same tensors, for each training has a name of its own."""
    if set(some) != set(others):
        return False
    return all(
        _same_tensors(load(some[name]), load(others[name])) if name.startswith("step-") else some[name] == others[name]
        for name in some
    )


def _same_tensors(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def _write(writer: str, version: int, folder: Path, breaking: Breaking | None = None, limit: int = 0) -> dict:
    """limit: no file may grow beyond so many bytes, by order of the system."""
    breaking, said = breaking or Breaking(), {}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with broken(breaking):
            WRITERS[writer](folder, version)
    except AdapterError as error:
        said["said"] = str(error)
    except BaseException as error:
        said["raw"] = f"{type(error).__name__}: {error}"
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return said | {"events": breaking.done, "broke": breaking.broke}


# --- trainings -----------------------------------------------------------------------------------------------


def killed_trainings(count: int, seed: int, folder: Path) -> dict:
    """Kill `count` trainings one to three times each, by the clock or inside a checkpoint; resume each to its end."""
    generator, faults = random.Random(seed), []  # noqa: S311 - a sample, no secret
    straight = {}
    for everything in (False, True):
        with _folder(folder / f"straight-{everything}") as place:
            began = time.monotonic()
            events = _in_child(_train, place, everything)["events"]
            straight[everything] = (_ended(place), events, time.monotonic() - began)
    for number in range(count):
        everything = bool(number % 2)
        whole, events, seconds = straight[everything]
        with _folder(folder / f"training-{number}") as place:
            kills = [_killed(place, everything, generator, events, seconds) for _ in range(generator.randint(1, 3))]
            ended = _in_child(_train, place, everything)
            same = ended["code"] == 0 and all(map(_same_tensors, _ended(place), whole))
        if not same:
            faults.append(f"training {number}, killed {kills}, was resumed to another end: {ended}")
    return {"tried": count, "lost": len(faults), "faults": faults}


def _killed(place: Path, everything: bool, generator: random.Random, events: int, seconds: float) -> str:
    """How."""
    if generator.random() < 0.5:
        at = generator.randint(1, events)
        return f"at {at}: {_in_child(_train, place, everything, Breaking('kill', at))['code']}"
    wait = generator.uniform(0, seconds)
    return f"after {wait:.3f} s: {_in_child(_train, place, everything, wait=wait)['code']}"


def _train(folder: Path, everything: bool, breaking: Breaking | None = None) -> dict:
    breaking = breaking or Breaking()
    with broken(breaking):
        result = train(
            problem_with_everything() if everything else tiny_problem(),
            EVERYTHING if everything else RESUME_SETTINGS,
            keeping=Keeping(folder, resume=folder if any(folder.glob("step-*")) else None),
            basis=tiny_basis(),
        )
    save_file(learned(result), folder / "final.safetensors")
    return {"events": breaking.done}


def _ended(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / "final.safetensors"), load_file(newest_checkpoint(folder))]


# --- processes -----------------------------------------------------------------------------------------------


@contextmanager
def _folder(path: Path) -> Iterator[Path]:
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _in_child(function: Callable[..., dict], *inputs, wait: float | None = None) -> dict:
    """What `function` returned, with the exit code, from a process of its own on one thread; killed after `wait` s."""
    context = _forking()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, function, inputs), daemon=True)
    process.start()
    theirs.close()
    answer = {}
    with suppress(EOFError):
        ours.recv()  # From here on it computes; what came before is the machine's own.
        if wait is not None:
            process.join(wait)
            process.kill()
        answer = ours.recv()
    process.join(60)
    return answer | {"code": process.exitcode}


@cache
def _forking():
    """Processes forked from one that has imported everything and computed nothing, so that they start at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["crashes"])
    before = dict(os.environ)
    os.environ |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(before)
    return context


def _answer(pipe, function: Callable[..., dict], inputs: tuple) -> None:
    torch.set_num_threads(1)
    pipe.send(None)
    pipe.send(function(*inputs))
