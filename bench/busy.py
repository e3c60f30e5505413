"""A training step of the demo on a machine that has other work: threads that spin, that sleep, and a single thread.

    python -m bench.busy                 beside two processes that keep two cores busy
    python -m bench.busy --beside 0      beside whatever else runs

Each way is a process of its own, since OpenMP reads its environment once; they take turns.  Prints seconds a step
(medians over all turns) and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from statistics import median

WAYS = {
    "spinning": {"OMP_WAIT_POLICY": "ACTIVE"},
    "as torch comes": {},
    "as the commands set it": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
SAID = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY", "OMP_NUM_THREADS")
SPIN = "while True: pass"


def step_times(steps: int) -> list[float]:
    """Seconds of each training step of the demo's orthogonal concept, without the first two."""
    from dataclasses import replace

    from modular_concepts.toy.base import load_toy_base
    from modular_concepts.toy.presets import UNDESCRIBED
    from modular_concepts.toy.standard import BY_NAME, pictures_of
    from modular_concepts.training.loop import Listeners
    from modular_concepts.training.teach import Subject, train_concept

    concept, times = BY_NAME["tom"], []
    pictures, captions = pictures_of(concept)
    subject = Subject("tom", pictures, captions, concept.class_word)
    settings = replace(UNDESCRIBED, steps=steps + 2, method="orthogonal", slot=0)
    train_concept(load_toy_base(), subject, settings, Listeners(lambda *_: times.append(time.monotonic())))
    return [after - before for before, after in zip(times[1:], times[2:], strict=False)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--beside", type=int, default=2, help="busy processes beside it")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.measure:
        print(json.dumps(step_times(args.steps)))
        return 0
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    others = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(args.beside)]  # noqa: S603 - our own command
    try:
        for _ in range(args.turns):
            for way, chosen in WAYS.items():
                environment = {key: value for key, value in os.environ.items() if key not in SAID} | chosen
                command = [sys.executable, "-m", "bench.busy", "--measure", "--steps", str(args.steps)]
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603 - our own command
                found[way] += json.loads(done.stdout)
                print(f"{way:24} {median(found[way]):8.2f} s a step", file=sys.stderr, flush=True)
    finally:
        for other in others:
            other.kill()
    seconds = {way: median(times) for way, times in found.items()}
    print(json.dumps({"beside": args.beside, "load": os.getloadavg()[0], "seconds a step": seconds}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
