"""What a GPU must prove and what it costs there: correctness, training, merging, regions, the toy base; one command.

    make gpu                             on a Linux machine with one NVIDIA GPU: at most eight minutes
    make gpu-dry                         every part in small on the CPU: two minutes, and no figure that means much
    python bench/gpu.py --only check     only parts whose name the expression finds

Needs Python with torch (for CUDA), safetensors, numpy and einops, and for all but the engine's own part a ComfyUI:
--host, COMFYUI_PATH, .host/ComfyUI beside this repository's files, or ~/comfy/ComfyUI.  It starts no server and reads
no model.  Sources suffice: `python bench/gpu_carry.py COMFYUI .host` puts them into a folder that can be carried to a
machine without a network, and packages of such a folder's `site` are found.

Every part is a process of its own with a time of its own.  What it finds is written to --out at once, so that a run
that is killed keeps what it has.  The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TINY = {"sd15": "tiny", "sd2": "tiny", "sdxl": "tiny", "sd3": "tiny", "toy": "tiny"}
FULL = {"sd15": "full", "sdxl": "full"}
WAYS = {"merged": [1, 2, 3, 5, 8], "gated": [1, 2, 3, 5, 8], "core_masks": [1, 3, 8], "core_hooks": [1, 3]}


@dataclass(frozen=True)
class Part:
    """One process.  name: what --only looks at; script: who does it; asked: of it; seconds: at most, on a GPU."""

    name: str
    seconds: float
    asked: Mapping
    script: str = "gpu_steps.py"


def cases(families: Mapping[str, str], dtypes: list[str], memory: str) -> list[dict]:
    """The toy base is in float32 alone."""
    return [
        {"family": family, "size": size, "dtype": dtype, "memory": memory}
        for dtype in dtypes
        for family, size in families.items()
        if family != "toy" or dtype == "float32"
    ]


def trainings(dry: bool) -> list[dict]:
    if dry:
        small = dict(pixels=64, rank=4, steps=1)  # bf16 steps take minutes on a processor without it
        made = [dict(trainer=trainer, **small) for trainer in ("ours", "frozen")]
        return [dict(title=f"sd15 {one['trainer']}", **one) for one in made]
    plain, lora = {}, {"layers": "all_linear as lora"}
    ours = {"orthogonal": plain, "orthogonal, checkpointing": {"checkpointing": True}, "LoRA": lora}
    made = []
    for family, pixels, batch in (("sd15", 512, 1), ("sd15", 512, 4), ("sdxl", 1024, 1)):
        shape = dict(family=family, pixels=pixels, batch=batch, steps=6, precision="bf16")
        title = f"{family} {pixels} px, batch {batch}"
        made += [dict(title=f"{title}: ours {name}", trainer="ours", **shape, **more) for name, more in ours.items()]
        made += [dict(title=f"{title}: {name}", trainer=name, **shape) for name in ("core_bypass", "core", "frozen")]
        if batch == 1:
            half = {**shape, "precision": "fp16"}
            made += [dict(title=f"{title}: ours orthogonal, fp16 with loss scale", trainer="ours", **half)]
    # A model is loaded once for all that can share it.
    return sorted(made, key=lambda one: (one["family"], one["trainer"] == "frozen"))


def plan(dry: bool) -> list[Part]:
    """In order of what matters most."""
    return dry_plan() if dry else gpu_plan()


def gpu_plan() -> list[Part]:
    """SDXL has ten times as many layers as the other tiny models, so it is checked in full size alone."""
    cuda = {"device": "cuda"}
    small = {family: size for family, size in TINY.items() if family != "sdxl"}
    checks = [
        ("machine", {}),
        ("check", {"cases": cases(small, ["float16"], "normal") + cases(FULL, ["float16"], "normal")}),
        ("check", {"cases": cases(small, ["float16"], "low") + cases(FULL, ["float16"], "low")}),
        ("resume", {}),
        ("check", {"cases": cases(small, ["float32", "bfloat16", "float8_e4m3fn"], "normal")}),
        ("check", {"cases": cases(FULL, ["bfloat16", "float32"], "normal")}),
    ]
    dynamic = [("check", {"cases": cases(small | FULL, ["float16"], "dynamic")})]
    merges = [
        ("merge", _merge("sd15", "full", "float16", [1, 3, 15, 50], [1, 3, 15], 2) | {"blocks": [15]}),
        ("merge", _merge("sdxl", "full", "float16", [1, 15, 50], [1], 1) | {"blocks": [15]}),
    ]
    fewer = {"merged": [1, 3, 8], "gated": [1, 3, 8], "core_masks": [1, 3, 8], "core_hooks": [3]}
    compiled = {"compiled": ["plain", "merged", "gated"]}
    regions = [
        ("regions", _regions("sdxl", "full", "float16", 1024, fewer, 20) | {"rounds": 1}),
        ("regions", _regions("sd15", "full", "float16", 512, WAYS, 20) | {"rounds": 1} | compiled),
    ]
    return [
        Part("engine", 40, cuda, "gpu_engine.py"),
        _in_host("checks", 130, checks, cuda),
        _in_host("dynamic memory", 60, dynamic, cuda, dynamic=True),
        _in_host("training", 110, [("train", {"stored": "float16", "tasks": trainings(False)})], cuda),
        _in_host("regions", 110, regions, cuda),
        _in_host("merging", 90, merges, cuda),
        Part("toy", 60, cuda | {"seconds": 30}, "gpu_toy.py"),
    ]


def dry_plan() -> list[Part]:
    """On a CPU, in one process of the host, since its start costs most; a machine that others use takes longer."""
    cpu, ways = {"device": "cpu"}, {"merged": [2], "gated": [2]}
    steps = [
        ("machine", {}),
        ("check", {"cases": cases({"sd15": "tiny"}, ["bfloat16"], "normal")}),
        ("check", {"cases": cases({"toy": "tiny"}, ["float32"], "low")}),
        ("train", {"stored": "float32", "size": "tiny", "tasks": trainings(True)}),
        ("resume", {"steps": 2, "pixels": 64}),
        ("merge", _merge("sd15", "tiny", "float32", [1, 2], [1], 1) | {"rank": 4}),
        ("regions", _regions("sd15", "tiny", "float32", 64, ways, 4) | {"compiled": ["gated"]}),
    ]  # fmt: skip
    return [
        Part("engine", 1500, cpu | {"steps": 60, "counts": [1]}, "gpu_engine.py"),
        _in_host("host", 1500, steps, cpu),
        Part("toy", 1500, cpu | {"seconds": 1}, "gpu_toy.py"),
    ]


def _in_host(name: str, seconds: float, steps: list[tuple[str, dict]], device: Mapping, dynamic: bool = False) -> Part:
    return Part(name, seconds, {**device, "dynamic": dynamic, "steps": steps})


def _merge(family: str, size: str, stored: str, counts: list[int], core_counts: list[int], repeats: int) -> dict:
    return dict(family=family, size=size, stored=stored, counts=counts, core_counts=core_counts, repeats=repeats)


def _regions(family: str, size: str, stored: str, pixels: int, ways: Mapping[str, list[int]], rank: int) -> dict:
    most = max(count for counts in ways.values() for count in counts)
    often = dict(rounds=2, steps=4) if size == "full" else dict(rounds=1, steps=1)
    about = dict(pixels=pixels, counts=[most], core_counts=[], rank=rank, **often)
    return dict(family=family, size=size, stored=stored, ways=dict(ways), **about)


class Report:
    """What was found so far, on disk after every line."""

    def __init__(self, path: Path, about: Mapping):
        self.path, self.began = path, time.monotonic()
        self.content = {**about, "parts": {}}

    def add(self, part: str, key: str, value) -> None:
        self.content["parts"].setdefault(part, {})[key] = value
        self.write()

    def write(self) -> None:
        self.content["seconds"] = round(time.monotonic() - self.began, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n")
        temporary.replace(self.path)

    def broken(self) -> list[str]:
        """Every check that does not hold, and every part that did not end well."""
        found = []
        for part, results in self.content["parts"].items():
            for key, value in results.items():
                if key == "ended" and value != "whole":
                    found.append(f"{part}: {value}")
                if isinstance(value, Mapping):
                    own = {"": value} if "holds" in value else value
                    found += [
                        f"{part}: {key}: {name or 'it'} is {one.get('found', one)}"
                        for name, one in own.items()
                        if isinstance(one, Mapping) and one.get("holds") is False
                    ]
                    if "failed" in value:
                        found.append(f"{part}: {key}: {value['failed']}")
        return found


def lines_of(process: subprocess.Popen) -> Iterator[str]:
    yield from process.stdout or ()


def run(part: Part, args: argparse.Namespace, report: Report, seconds: float) -> None:
    in_host = [args.python, HERE / part.script, args.host, "-", "run"]
    command = in_host if part.script == "gpu_steps.py" else [sys.executable, HERE / part.script]
    command = [*command, json.dumps(part.asked)]
    environment = environment_of(args.host)
    log = args.out.with_name(f"{args.out.stem}-{part.name.replace(' ', '-')}.log")
    began = time.monotonic()
    with log.open("w") as errors:
        process = subprocess.Popen(  # noqa: S603 - our own command
            [str(word) for word in command], stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
        late = threading.Timer(seconds, process.kill)
        late.start()
        try:
            for line in lines_of(process):
                if line.startswith('{"key": '):
                    result = json.loads(line)
                    report.add(part.name, result["key"], result["value"])
                    print(f"  {result['key']}: {short(result['value'])}", flush=True)
            process.wait()
        finally:
            late.cancel()
            process.kill()
    took = time.monotonic() - began
    if process.returncode:
        why = f"stopped after {took:.0f} s" if took >= seconds - 1 else f"ended with {process.returncode}"
        report.add(part.name, "ended", f"{why}; {last_words(log)}")
    else:
        report.add(part.name, "ended", "whole")
        log.unlink()
    print(f"{part.name}: {took:.0f} s, {report.content['parts'][part.name]['ended']}", flush=True)


def environment_of(host: Path | None) -> dict[str, str]:
    site = (host.parent if host is not None else ROOT / ".host") / "site"
    if not site.is_dir() and site.with_suffix(".zip").is_file():
        with zipfile.ZipFile(site.with_suffix(".zip")) as packed:
            packed.extractall(site)
    path = [str(site)] if site.is_dir() else []
    # Threads that wait without spinning, for a machine that others use too.
    fixed = {
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    return {**os.environ, **fixed, "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")])}


def last_words(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "without a word"


def short(value) -> str:
    """One line for whoever watches."""
    if isinstance(value, Mapping) and any(isinstance(one, Mapping) and "holds" in one for one in value.values()):
        bad = [f"{name} is {one['found']}" for name, one in value.items() if one.get("holds") is False]
        return "; ".join(bad) or f"{len(value)} checks hold"
    return json.dumps(value)[:160]


def find_host(named: Path | None) -> Path | None:
    given = named or os.environ.get("COMFYUI_PATH")
    folders = [Path(given)] if given else [ROOT / ".host" / "ComfyUI", Path.home() / "comfy" / "ComfyUI"]
    return next((folder.resolve() for folder in folders if (folder / "comfy").is_dir()), None)


def python_of(host: Path | None) -> str:
    """The host's own interpreter; this one where the host is only sources."""
    own = [host / venv / "bin" / "python" for venv in (".venv", "venv")] if host is not None else []
    return str(next((path for path in own if path.is_file()), sys.executable))


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="in small, on the CPU")
    parser.add_argument("--seconds", type=float, help="when to stop, whatever is left to do; 470, a dry run's 1500")
    parser.add_argument("--only", default="", help="only parts whose name it finds, an expression")
    parser.add_argument("--host", type=Path, help="a ComfyUI, sources suffice")
    parser.add_argument("--python", default=None, help="the interpreter that runs it; the host's own, else this one")
    parser.add_argument("--out", type=Path, default=None, help="docs/gpu.json; build/gpu-dry.json of a dry run")
    args = parser.parse_args(arguments)
    args.host = find_host(args.host)
    args.python = args.python or os.environ.get("COMFYUI_PYTHON") or python_of(args.host)
    args.seconds = args.seconds or (1500 if args.dry else 470)
    args.out = args.out or (ROOT / "build" / "gpu-dry.json" if args.dry else ROOT / "docs" / "gpu.json")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    return args


def main() -> None:
    args = parsed()
    about = {
        "host": "ComfyUI" if args.host else "none was found, so the engine's own part alone",
        "system": f"{platform.system()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "date": time.strftime("%Y-%m-%d"),
        "dry": args.dry,
    }
    report, ends = Report(args.out, about), time.monotonic() + args.seconds
    report.write()
    print(f"{about['host']}; {about['system']}", flush=True)
    for part in plan(args.dry):
        if not re.search(args.only, part.name) or (args.host is None and part.script == "gpu_steps.py"):
            continue
        left = ends - time.monotonic()
        if left < 10:
            report.add(part.name, "ended", "not begun: the time was up")
            continue
        run(part, args, report, min(part.seconds, left))
    broken = report.broken()
    report.content["broken"] = broken
    report.write()
    print("\n".join(broken) or "everything holds", flush=True)
    print(json.dumps(report.content))
    if broken and args.dry:
        sys.exit(1)


if __name__ == "__main__":
    main()
