"""In the host's interpreter: some steps of the GPU measurement; each result is a line of JSON on stdout as it comes.

    python gpu_steps.py HOST - run '{"device": "cuda", "dynamic": false, "steps": [["check", {...}], ...]}'

`gpu.py` runs these with the arguments of its plan.  A line is {"key": ..., "value": ...}.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time

from in_host import ARGUMENT, start
from missing_packages import stand_in_for

ASKED = json.loads(ARGUMENT)
DEVICE = ASKED["device"]
# The host imports it for video, which nothing here has to do with.
stand_in_for("av")
start(on_cpu=DEVICE == "cpu", dynamic=ASKED["dynamic"])

import comfy.model_management
import gpu_checks
import host_models
import merge_in_host
import regions_in_host
import torch
import train_in_host
from merge_work import Machine, made_work
from probe import Task


def tell(key: str, value) -> None:
    print(json.dumps({"key": key, "value": value}), flush=True)


def clear() -> None:
    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.soft_empty_cache()


def failure(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def check(cases: list[dict]) -> None:
    torch.backends.cudnn.allow_tf32 = False  # else convolutions in float32 keep ten bits
    for asked in cases:
        case = gpu_checks.Case(**asked)
        began = time.monotonic()
        with torch.inference_mode():
            found = gpu_checks.check(case)
        found["seconds"] = {"found": round(time.monotonic() - began, 1), "holds": True}
        tell(f"{case.family} {case.size}, {case.dtype}, {case.memory} memory", found)
        clear()


def train(stored: str, tasks: list[dict], size: str = "full") -> None:
    """Each task in turn in this process, on one loaded model of each family; memory is what a GPU counts."""
    models: dict[str, tuple] = {}
    for asked in tasks:
        title, task = asked.pop("title"), Task(**asked)

        def load(task: Task = task) -> tuple:
            kind = f"{task.family} plain" if task.trainer == "frozen" else task.family
            if kind not in models:
                models.clear()
                clear()
                models[kind] = host_models.load(task.family, size, getattr(torch, stored))
            return models[kind]

        try:
            found = train_in_host.RUN[task.trainer](task, load)
            found = {name: found[name] for name in _TOLD if name in found}
        except Exception as error:  # noqa: BLE001  (one trainer's fault is a finding, not the end)
            found = {"failed": failure(error)}
        tell(title, found)
        clear()


_TOLD = ("seconds", "device_peak_gb", "device_before_gb", "peak_gb", "adapters", "trained", "losses")


def resume(family: str = "sd15", size: str = "tiny", steps: int = 6, pixels: int = 128) -> None:
    """A training in one piece and one that goes on from a checkpoint, under deterministic algorithms."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    task = Task("ours", family=family, pixels=pixels, steps=steps - 1, rank=4)
    with torch.inference_mode():
        base = train_in_host.base_of(*host_models.load(family, size, torch.float32))
        latents, contexts = train_in_host.contexts_of(task, base.device)
        whole, _ = train_in_host.trained(task, base, latents, contexts)
        with tempfile.TemporaryDirectory() as folder:
            stop = lambda progress: progress.step == steps // 2  # noqa: E731
            train_in_host.trained(task, base, latents, contexts, stop, checkpoints=folder)
            again, _ = train_in_host.trained(task, base, latents, contexts, resume=folder)
    apart = max(
        float((again.layers[name].lora_up - own.lora_up).norm() / own.lora_up.norm())
        for name, own in whole.layers.items()
    )
    torch.use_deterministic_algorithms(False)
    tell("resume", {"apart": apart, "holds": apart <= 1e-6, "losses": whole.losses})


def merge(
    family: str,
    size: str,
    stored: str,
    counts: list[int],
    core_counts: list[int],
    repeats: int,
    rank: int = 20,
    blocks: list[int] | None = None,
) -> None:
    """blocks: how many concepts are merged as blocks too; all counts."""
    with torch.inference_mode():
        loaded = host_models.load(family, size, getattr(torch, stored))[:2]
        bench = merge_in_host.Bench(loaded, counts, rank, repeats, False, core_counts)
        machine = Machine(DEVICE)
        for count in counts:
            work = made_work(bench.adapters, bench.weights, count, bench.rank)
            machine.measure()
            for how, concepts in (("sum", work.sums), ("block", work.blocks)):
                if how == "block" and blocks is not None and count not in blocks:
                    continue
                floor = machine.floor(work, concepts).seconds
                tell(f"{family} {how} {count}", {"floor_seconds": floor, **bench.pair(how, concepts)["seconds"]})
            del work
            clear()
        tell(f"{family} machine", machine.rates())


def regions(family: str, size: str, stored: str, ways: dict, compiled: list[str] = (), **asked) -> None:
    """compiled: ways that are drawn on a compiled model too, at the end."""
    asked = regions_in_host.asked_of(json.dumps(asked | {"device": DEVICE}))
    with torch.inference_mode():
        loaded = host_models.load(family, size, getattr(torch, stored))
        bench = regions_in_host.Bench(asked, loaded)
        bench.measure("plain", 0)
        for round_number in range(asked.rounds):
            for way, counts in {"plain": [0], **ways}.items():
                if round_number and way.startswith("core"):
                    continue
                for count in counts:
                    _measured(bench, f"{family} {way} {count} round {round_number}", way, count)
        if compiled:
            _compiled(bench, family, compiled)
    clear()


def _measured(bench, title: str, way: str, count: int) -> None:
    comfy.model_management.soft_empty_cache()
    try:
        found = bench.measure(way, count)
        tell(title, {name: found[name] for name in _TOLD if name in found})
    except Exception as error:  # noqa: BLE001
        tell(title, {"failed": failure(error)})
        clear()


def _compiled(bench, family: str, ways: list[str]) -> None:
    """Regions on a model that torch.compile has; its own first call, which compiles, is not timed."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    plain = bench.model
    bench.model = plain.clone()
    set_torch_compile_wrapper(bench.model, backend="inductor" if DEVICE == "cuda" else "eager")
    for way in ways:
        count = 0 if way == "plain" else 2
        eager = bench.drawn.get((way, count))
        for title in (f"{family} compiled {way} {count}, first", f"{family} compiled {way} {count}"):
            _measured(bench, title, way, count)
            if DEVICE == "cpu":
                break
        if eager is not None and (way, count) in bench.drawn:
            tell(f"{family} compiled {way} {count}, apart", gpu_checks.relative(bench.drawn[way, count], eager))
    bench.model = plain


def machine() -> None:
    import comfyui_version

    tell("host", comfyui_version.__version__)
    if DEVICE == "cuda":
        found = torch.cuda.get_device_properties(0)
        tell("card", {"name": found.name, "gb": round(found.total_memory / 1e9, 1), "torch": torch.__version__})


STEPS = {"machine": machine, "check": check, "train": train, "resume": resume, "merge": merge, "regions": regions}

if __name__ == "__main__":
    for step, arguments in ASKED["steps"]:
        STEPS[step](**arguments)
