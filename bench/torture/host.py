"""Promise 11: a long queue with poison in it, and many cancels, in the real ComfyUI; nothing lost, memory flat."""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from bench.torture.laws import ROOT

for place in (ROOT, ROOT / "tests" / "host"):
    sys.path.insert(0, str(place))

import torch
from finding import Host
from served import HostServer, Refused
from test_bad_input import BAD, NOISE, drawn, merged, regional, saving, taught, write_concepts

FAR_TOO_LONG = 100_000  # steps of a sampling or training that is going to be cancelled


@contextmanager
def served(path: Path, python: Path) -> Iterator[HostServer]:
    """A server of its own on folders of its own, with the concepts that the prompts name."""
    with tempfile.TemporaryDirectory() as folder:
        server = HostServer(Host(path, python), Path(folder))
        try:
            write_concepts(server)
            yield server
        finally:
            server.stop()


class Memory:
    """The server's resident memory in MiB, looked at twice a second in a thread of its own."""

    def __init__(self, process: int):
        self._status = Path(f"/proc/{process}/status")
        self._over = threading.Event()
        self.seen: list[float] = []
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            try:
                lines = self._status.read_text().splitlines()
            except OSError:
                return
            self.seen += [int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")]

    def told(self) -> dict:
        """Medians of the second and of the last fifth of the time; the first fifth is loading."""
        self._over.set()
        self._thread.join(5)
        fifth = max(1, len(self.seen) // 5)
        early, late = median(self.seen[fifth : 2 * fifth] or [0]), median(self.seen[-fifth:] or [0])
        return {
            "looks": len(self.seen),
            "early": round(early, 1),
            "late": round(late, 1),
            "peak": round(max(self.seen, default=0), 1),
        }


def good(number: int) -> dict:
    """Prompts of every kind that draw or save something, no two alike."""
    strength = round(0.01 + 0.002 * number, 4)
    kind = number % 4
    if kind == 0:
        return merged("good", "other", strength=strength)
    if kind == 1:
        return merged("block0", how="BlockLoRAMerge", strength=strength)
    if kind == 2:
        return regional(right=round(0.2 + 0.001 * (number % 700), 4))
    return saving(f"saved_{number % 10}")


def queue(path: Path, python: Path, count: int) -> dict:
    """`count` prompts, every tenth bad, all in the queue at once; then what became of each."""
    with served(path, python) as server:
        server.run(drawn())  # everything is loaded
        memory = Memory(server._process.pid)
        poison, waiting, seen = list(BAD), {}, {"finished": 0, "named": 0, "wrong": []}
        for number in range(count):
            what = poison[number // 10 % len(poison)] if number % 10 == 7 else ""
            prompt = BAD[what][0](server) if what else good(number)
            try:
                waiting[server.begin(prompt)] = what
            except Refused as refused:
                seen["named" if what and refused.faults[0][0] == BAD[what][1] else "wrong"] += (
                    1 if what else [f"refused: {refused}"]
                )
        for prompt_id, what in waiting.items():
            judged(server, prompt_id, what, seen)
        left = json.loads(server.get("/queue"))
        facts = {**seen, "memory": memory.told(), "left": sum(len(prompts) for prompts in left.values())}
        server.run(drawn())
        return {"queued": count, "bad": sum(number % 10 == 7 for number in range(count)), **facts}


def judged(server: HostServer, prompt_id: str, what: str, seen: dict) -> None:
    """Count one prompt: a good one that finished with what it was asked for, or a bad one whose node was named."""
    run = server.wait(prompt_id)
    if not what and run.succeeded and any(shown.get("images") for shown in run.outputs.values()):
        seen["finished"] += 1
    elif what and run.ending == "execution_error" and run.error["node_id"] == BAD[what][1]:
        seen["named"] += 1
    else:
        seen["wrong"].append(f"{what or 'a good prompt'}: {run.ending} {run.error.get('exception_message', '')}"[:200])


def cancels(path: Path, python: Path, count: int) -> dict:
    """Samplings and trainings cancelled at one step or another; after each the same picture must come again."""
    with served(path, python) as server:
        reference = server.pictures(server.run(drawn_again()))
        memory, seen = Memory(server._process.pid), {"cancelled": 0, "kept": 0, "same": 0, "wrong": []}
        for number in range(count):
            trains = bool(number % 2)
            prompt = long_training(server, number) if trains else long_sampling()
            node = "train" if trains else "draw"
            prompt_id = server.begin(prompt)
            server.wait(prompt_id, lambda run, node=node, n=number: steps_done(run, node) > n % 7 or bool(run.ending))
            server.interrupt()
            run = server.wait(prompt_id)
            seen["cancelled"] += run.ending == "execution_interrupted"
            if run.ending != "execution_interrupted":
                seen["wrong"].append(f"{node}: {run.ending} {run.error}"[:200])
            if trains:
                seen["kept"] += bool(list((server.models / "concepts").glob(f"stopped{number}-cancelled-step*")))
            picture = server.pictures(server.run(drawn_again()))
            seen["same"] += torch.equal(picture, reference)
        return {"cancels": count, "trainings": count // 2, **seen, "memory": memory.told()}


def steps_done(run, node: str) -> int:
    return max((value for value, _ in run.progress.get(node, [])), default=0)


def drawn_again() -> dict:
    """The same picture of a merge, but for a new prefix in its file's name: no cache can answer it whole."""
    prompt = merged("good", "other", strength=0.7)
    prompt["draw"]["inputs"]["seed"] = 5
    prompt["noise"] = {**NOISE, "inputs": {**NOISE["inputs"]}}
    prompt["draw"]["inputs"]["denoise"] = 1.0 - 1e-9 * (time.monotonic_ns() % 1000)  # as good as 1, and never the same
    return prompt


def long_sampling() -> dict:
    prompt = merged("good", "other", strength=0.6)
    prompt["draw"]["inputs"] |= {"steps": 10_000, "cfg": 4.0}
    return prompt


def long_training(server: HostServer, number: int) -> dict:
    return taught(
        server, name=f"stopped{number}", steps=FAR_TOO_LONG, checkpoint_every=1000, preview_every=1, learning_rate=1e-5
    )
