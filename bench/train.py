"""Training speed and memory against the host's own trainer, peft and the frozen model, in SD 1.5's layout.

    make bench-train                       everything; about an hour on two cores, and 14 GB of memory
    python bench/train.py --quick          a narrow network, one round: half a minute, and no figure that means much
    python bench/train.py --only 'core|peft'   only runs whose name the expression finds
    python bench/train.py --resume         keep the finished runs of an aborted measurement

Every run is a process of its own, so its peak memory is its own; rounds are interleaved (A B C A B C), and figures are
ratios of medians.  All use the same latents and contexts, rank, batch, precision and threads.  What is ours in the host
is compared with core in the host's interpreter, what is ours without a host with peft in this one.
On a machine that others use too, --threads 1 --clock processor tells what steps would take without them.
Progress goes to stderr; the last line of stdout is one JSON object, of which --out FILE keeps every run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "build" / "bench-train.json"
HEADLESS = ("frozen_diffusers", "peft", "ours_lora", "ours_orthogonal")
BARS = {"step_vs_core": 0.75, "memory_vs_core": 0.55, "step_vs_peft": 1.0, "overhead_vs_frozen": 1.12}
OURS_IN_HOST = {"": "ours", "_every_layer": "ours every", "_every_layer_as_lora": "ours every as lora"}
CLOCKS = {"wall": "seconds_per_step", "processor": "processor_seconds_per_step"}
DIFFERENCES = {
    "ours": "orthogonal adapters on all 160 Linear layers of the attention blocks, as published: lora_up trains",
    "ours every": "orthogonal adapters on every Linear and convolution with at least as many outputs as the rank; "
    "core trains besides these the last convolution (4 outputs) and all biases and norms",
    "ours every as lora": "plain LoRA, both factors, on the same layers",
    "core": "TrainLoraNode without gradient checkpointing, which is faster; with torch's attention, which is faster "
    "there and what the host takes on a GPU",
    "peft": "plain LoRA, both factors, on the same 160 Linear layers",
    "frozen": "the loaded model's forward and backward to its latents, no adapters",
}


def contestants(pixels: int, steps: int, **chosen) -> list[dict]:
    """One round's runs at one size, in the order in which they take turns."""
    headless = ("peft", "ours_lora") if pixels > 256 else HEADLESS
    names = ("frozen", "ours", "ours every", "ours every as lora", "core_bypass", "core", *headless)
    return [_task(name, pixels=pixels, steps=steps, **chosen) for name in names]


def growth(**chosen) -> list[dict]:
    """How our training grows, at 256 pixels: rank, batch, number of layers; and with gradient checkpointing at 512."""
    varied = [{"rank": rank} for rank in (4, 64, 128)] + [{"batch": batch} for batch in (2, 4)]
    varied += [{"layers": layers} for layers in ("cross_attention_kv", "attention")]
    tasks = [_task("ours", pixels=256, steps=2, **{**chosen, **change}) for change in varied]
    lean = [_task(name, pixels=512, steps=2, checkpointing=True, **chosen) for name in ("ours", "core_bypass")]
    return tasks + lean


def _task(name: str, **chosen) -> dict:
    trainer, _, layers = name.partition(" ")
    return {"trainer": trainer, **({"layers": layers} if layers else {}), **chosen}


def plan(args: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """(key, task), round by round."""
    if args.quick:
        small = dict(layout="narrow", rank=4)
        runs = [("quick", 0, task) for task in contestants(64, 2, **small)]
    else:
        runs = [("256", number, task) for number in range(args.rounds) for task in contestants(256, args.steps)]
        runs += [
            ("512", number, task) for number in range(args.large_rounds) for task in contestants(512, args.large_steps)
        ]
        runs += [("growth", 0, task) for task in growth()]
    for group, number, task in runs:
        what = ", ".join(f"{name} {value}" for name, value in task.items() if name not in ("trainer", "steps"))
        yield f"{task['trainer']} ({what}) {group} {number}", {"group": group, **task}


def run(task: Mapping, args: argparse.Namespace, checkpoint: Path) -> dict:
    """One trainer in a process of its own; what it measured, or {"failed": why}."""
    task = {name: value for name, value in task.items() if name != "group"}
    if task["trainer"] in HEADLESS:
        command = [sys.executable, HERE / "headless.py", json.dumps(task)]
    else:
        command = [args.host_python, HERE / "train_in_host.py", args.host, checkpoint, "run", json.dumps(task)]
    started = time.monotonic()
    done = _process(command, args.threads)
    if done.returncode:
        return {**task, "failed": (done.stderr.strip().splitlines() or ["no message"])[-1][:500]}
    return json.loads(done.stdout.strip().splitlines()[-1]) | {"whole_seconds": round(time.monotonic() - started, 1)}


def _process(command: Sequence[object], threads: int) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [str(part) for part in command]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)  # noqa: S603 - our own command


def figures(runs: Sequence[Mapping], clock: str) -> dict:
    """Medians of each trainer at each size, and the ratios; a ratio whose runs are missing is None."""
    sizes = {}
    for group in dict.fromkeys(one["group"] for one in runs if one["group"] != "growth"):
        table: dict[str, list[Mapping]] = {}
        for one in runs:
            if one["group"] == group and "failed" not in one:
                table.setdefault(_name(one), []).append(one)
        sizes[group] = {"trainers": {name: _medians(own) for name, own in table.items()}}
        sizes[group] |= _ratios(sizes[group]["trainers"], clock)
    ratios = {name for size in sizes.values() for name in size if name != "trainers"}
    worst = {name: _worst([size.get(name) for size in sizes.values()]) for name in sorted(ratios)}
    return {**{name: worst.get(name) for name in BARS}, **worst, "sizes": sizes}


def _name(one: Mapping) -> str:
    return f"ours {one['layers']}" if one["layers"].startswith("every") else one["trainer"]


def _medians(runs: Sequence[Mapping]) -> dict:
    seconds = [second for one in runs for second in one["seconds"]]
    processor = [second for one in runs for second in one["processor_seconds"]]
    return {
        "seconds_per_step": round(median(seconds), 3),
        "fastest_step": round(min(seconds), 3),
        "processor_seconds_per_step": round(median(processor), 3),
        "peak_gb": round(median(one["peak_gb"] for one in runs), 3),
        "adapters": runs[0]["adapters"],
        "trained_numbers": runs[0]["trained"],
        "steps_timed": len(seconds),
    }


def _ratios(table: Mapping[str, Mapping], clock: str) -> dict:
    """The worst of these over all sizes is what the bars are about; those by the other clock are beside them."""
    found = {}
    core = [table[name] for name in ("core", "core_bypass") if name in table]
    for own, unit in CLOCKS.items():
        suffix = "" if own == clock else f"_by_{own}"
        pairs = {"step_vs_peft": ("ours_lora", "peft"), "orthogonal_step_vs_peft": ("ours_orthogonal", "peft")}
        pairs |= {"overhead_vs_frozen": ("ours", "frozen")}
        pairs |= {"headless_overhead_vs_frozen": ("ours_orthogonal", "frozen_diffusers")}
        for name, (ours, other) in pairs.items():
            if ours in table and other in table:
                found[name + suffix] = round(table[ours][unit] / table[other][unit], 3)
        for of, ours in OURS_IN_HOST.items():
            if ours in table and core:
                found[f"step_vs_core{of}{suffix}"] = round(table[ours][unit] / min(one[unit] for one in core), 3)
    for of, ours in OURS_IN_HOST.items():
        if ours in table and core:
            found[f"memory_vs_core{of}"] = round(table[ours]["peak_gb"] / min(one["peak_gb"] for one in core), 3)
    if "ours_lora" in table and "peft" in table:
        found["memory_vs_peft"] = round(table["ours_lora"]["peak_gb"] / table["peft"]["peak_gb"], 3)
    return found


def _worst(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None


def summary(runs: Sequence[Mapping], args: argparse.Namespace, accelerator: object) -> dict:
    result = figures(runs, args.clock)
    growing = [one for one in runs if one["group"] == "growth" and "failed" not in one]
    plain = ("trainer", "pixels", "rank", "batch", "layers", "checkpointing", "adapters", "trained", "peak_gb")
    result["growth"] = [
        {name: one[name] for name in plain}
        | {
            "seconds_per_step": round(median(one["seconds"]), 3),
            "processor_seconds_per_step": round(median(one["processor_seconds"]), 3),
        }
        for one in growing
    ]
    result["bars"] = {
        name: {"at_most": bar, "found": result[name], "held": result[name] is not None and result[name] <= bar}
        for name, bar in BARS.items()
    }
    versions = {name: {one[name] for one in runs if name in one} for name in ("host", "peft")}
    result |= {name: ", ".join(sorted(found)) for name, found in versions.items()}
    result["torch"] = {
        face: ", ".join(
            sorted({one["torch"] for one in runs if "torch" in one and (one["trainer"] in HEADLESS) == own})
        )
        for face, own in (("host", False), ("headless", True))
    }
    failed = [{"trainer": one["trainer"], "failed": one["failed"]} for one in runs if "failed" in one]
    result |= {
        "failed": failed,
        "machine": machine(),
        "threads": args.threads,
        "clock": args.clock,
        "differences": DIFFERENCES,
    }
    result["accelerator"] = accelerator
    return result


def machine() -> str:
    """In words: processor, how many, memory, system."""
    about = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    names = [line.split(":", 1)[1].strip() for line in about.splitlines() if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return f"{name}, {os.cpu_count()} cores, {pages / 1e9:.0f} GB of memory, {platform.system()} {platform.release()}"


def on_accelerator(args: argparse.Namespace, checkpoint: Path) -> object:
    """Steps per second at 512 pixels, batch 4, bf16, where the host's torch finds a CUDA device."""
    asks = "import torch; print(torch.cuda.is_available())"
    if _process([args.host_python, "-c", asks], args.threads).stdout.strip() != "True":
        return "not measured: no CUDA device here"
    large = dict(pixels=512, batch=4, precision="bf16", device="cuda", steps=20)
    runs = [run(_task(name, **large), args, checkpoint) for name in ("ours", "ours every", "core_bypass", "core")]
    return {
        _name(one): one.get("failed")
        or {
            "steps_per_second": round(1 / median(one["seconds"]), 3),
            "device_peak_gb": one["device_peak_gb"],
            "device": one["device"],
        }
        for one in runs
    }


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a narrow network and one round, as a smoke test")
    parser.add_argument("--only", default="", help="only runs whose name it finds, an expression")
    parser.add_argument("--resume", action="store_true", help="keep what --out holds already")
    parser.add_argument("--rounds", type=int, default=3, help="at 256 pixels")
    parser.add_argument("--large-rounds", type=int, default=2, help="at 512 pixels")
    parser.add_argument("--steps", type=int, default=3, help="timed in each run at 256 pixels")
    parser.add_argument("--large-steps", type=int, default=2, help="at 512 pixels")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each process")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="what the ratios of times are made of")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--host", type=Path, default=os.environ.get("COMFYUI_PATH") or Path.home() / "comfy/ComfyUI")
    parser.add_argument("--host-python", type=Path, default=os.environ.get("COMFYUI_PYTHON"))
    args = parser.parse_args(arguments)
    args.host = Path(args.host)
    args.host_python = Path(args.host_python or args.host / ".venv" / "bin" / "python")
    if not (args.host / "main.py").is_file() or not args.host_python.is_file():
        parser.error(f"no ComfyUI in {args.host} with {args.host_python}; give --host and --host-python")
    return args


def main() -> None:
    args = parsed()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(args.out.read_text())["runs"] if args.resume and args.out.is_file() else {}
    runs = {key: one for key, one in kept.items() if "failed" not in one}
    checkpoint = args.out.with_suffix(".safetensors")
    pending = [(key, task) for key, task in plan(args) if key not in runs and re.search(args.only, key)]
    try:
        if any(task["trainer"] not in HEADLESS for _, task in pending):
            layout = "narrow" if args.quick else "full"
            writer = [args.host_python, HERE / "in_host.py", args.host, checkpoint, "write", layout]
            done = _process(writer, args.threads)
            if done.returncode:
                sys.exit(f"no checkpoint could be written: {done.stderr[-2000:]}")
        for key, task in pending:
            runs[key] = {"group": task["group"], **run(task, args, checkpoint)}
            args.out.write_text(json.dumps({"runs": runs}, indent=1))
            print(key, runs[key].get("failed") or _told(runs[key]), file=sys.stderr, flush=True)
        accelerator = on_accelerator(args, checkpoint) if pending and not (args.quick or args.only) else "not asked for"
    finally:
        checkpoint.unlink(missing_ok=True)
    result = summary(list(runs.values()), args, accelerator)
    args.out.write_text(json.dumps({"summary": result, "runs": runs}, indent=1))
    print(json.dumps(result))


def _told(one: Mapping) -> str:
    return f"{median(one['seconds']):.2f} s, {median(one['processor_seconds']):.2f} s of processor, {one['peak_gb']} GB"


if __name__ == "__main__":
    main()
