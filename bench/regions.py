"""Regional sampling against plain sampling, core's masks and core's LoRA hooks, in SD 1.5's layout at 512 pixels.

    make bench-regions                     everything; from half an hour on, and 12 GB of memory
    python bench/regions.py --quick        a narrow network, one round: half a minute, and no figure that means much
    python bench/regions.py --threads 1 --clock processor   on a machine that others use too

One process, the host's own, draws with every way in turn; figures are medians of steps, relative to plain sampling of
the same size with one positive and one negative prompt.  Progress goes to stderr; the last line of stdout is one JSON
object, and the curve goes to --plot.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "build" / "bench-regions.json"
PLOT = HERE.parent / "build" / "regions-speed.png"
CLOCKS = {"wall": "seconds", "processor": "processor_seconds"}
BARS = {"merged3": 1.12, "gated3": 1.3, "merged8": 1.25, "gated8": 1.6, "memory_merged": 1.2, "memory_gated": 1.2}
TITLES = {
    "merged": "ours, merged: concepts in the weights",
    "gated": "ours, gated: each concept in its region alone",
    "core_masks": "ComfyUI: masked prompts",
    "core_hooks": "ComfyUI: masked prompts, a LoRA hook each",
}
DIFFERENCES = {
    "plain": "one prompt, one negative prompt, no concept",
    "merged, gated": "N regions with prompts of their own, one negative prompt, one pass",
    "core_masks": "all concepts in the weights; ConditioningSetMask for each region, the global prompt as default",
    "core_hooks": "PairConditioningSetPropertiesAndCombine: LoRA hook and mask for each region, on both prompts",
}


def figures(runs: Sequence[Mapping], clock: str) -> dict:
    """Each way and number of regions relative to plain sampling; and the most memory, likewise."""

    def steps(way: str, count: int, unit: str) -> list[float]:
        return [one for run in runs if (run["way"], run["regions"]) == (way, count) for one in run[unit]]

    def most(way: str, count: int) -> float:  # in its cleanest turn: later ones start with what others left behind
        return min(run["peak_gb"] for run in runs if (run["way"], run["regions"]) == (way, count))

    found: dict = {"curve": {}, "curve_by_other_clock": {}, "memory": {}, "seconds_per_step": {}}
    other = next(name for name in CLOCKS if name != clock)
    for way, count in dict.fromkeys((run["way"], run["regions"]) for run in runs if run["way"] != "plain"):
        for curve, unit in (("curve", CLOCKS[clock]), ("curve_by_other_clock", CLOCKS[other])):
            ratio = median(steps(way, count, unit)) / median(steps("plain", 0, unit))
            found[curve].setdefault(way, {})[str(count)] = round(ratio, 3)
        found["memory"].setdefault(way, {})[str(count)] = round(most(way, count) / most("plain", 0), 3)
        found["seconds_per_step"].setdefault(way, {})[str(count)] = round(median(steps(way, count, CLOCKS[clock])), 3)
    found["seconds_per_step"]["plain"] = round(median(steps("plain", 0, CLOCKS[clock])), 3)
    found["plain_peak_gb"] = most("plain", 0)
    named = {f"{way}{count}": ratio for way, curve in found["curve"].items() for count, ratio in curve.items()}
    worst = {f"memory_{way}": max(own.values()) for way, own in found["memory"].items()}
    return {**named, **worst, **found}


def summary(measured: Mapping, args: argparse.Namespace) -> dict:
    from train import machine

    result = figures(measured["runs"], args.clock)
    result["bars"] = {
        name: {"at_most": bar, "found": result[name], "held": result[name] <= bar}
        for name, bar in BARS.items()
        if name in result
    }
    about = {"host": measured["host"], "torch": measured["torch"], "machine": machine(), "device": args.device}
    about |= {"threads": args.threads, "clock": args.clock, "pixels": args.pixels, "rank": args.rank}
    about |= {"left_out": measured["left_out"]}
    return {**result, **about, "steps_timed": args.steps, "rounds": args.rounds, "differences": DIFFERENCES}


def plot(path: Path, result: Mapping) -> None:
    """Time of a step over the number of regions, plain sampling = 1."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.4, 4.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for way, colour, shift in zip(TITLES, ("#2a78b5", "#2f9e5a", "#c98a1b", "#b8433f"), (6, -14, 3, 3), strict=True):
        curve = {0: 1.0} | {int(count): ratio for count, ratio in result["curve"].get(way, {}).items()}
        counts = sorted(curve)
        axes.plot(counts, [curve[count] for count in counts], marker="o", label=TITLES[way], color=colour)
        end = (counts[-1], curve[counts[-1]])
        axes.annotate(f"{end[1]:.2f} x", end, (6, shift), textcoords="offset points", color=colour)
    axes.set(
        xlabel="regions",
        ylabel="time of a step, plain sampling = 1",
        title=f"One {result['pixels']}-pixel step with N regions, SD 1.5's layout, {result['device']}",
    )
    axes.set_xlim(0, axes.get_xlim()[1] + 0.5)
    axes.set_ylim(0)
    axes.legend(fontsize=9, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a narrow network and one round, as a smoke test")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 3, 5, 8], help="of regions, for ours")
    parser.add_argument("--core-counts", type=int, nargs="*", default=[1, 2, 3, 5, 8], help="of regions, for core")
    parser.add_argument("--rounds", type=int, default=3, help="of ours and plain")
    parser.add_argument("--core-rounds", type=int, default=1, help="of core's ways, which take many passes")
    parser.add_argument("--steps", type=int, default=1, help="timed in each picture")
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--rank", type=int, default=20)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="what the ratios of times are made of")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--plot", type=Path, default=PLOT)
    parser.add_argument("--host", type=Path, default=os.environ.get("COMFYUI_PATH") or Path.home() / "comfy/ComfyUI")
    parser.add_argument("--host-python", type=Path, default=os.environ.get("COMFYUI_PYTHON"))
    args = parser.parse_args(arguments)
    if args.quick:
        args.counts, args.core_counts, args.rounds, args.pixels, args.rank = [3, 8], [3], 1, 128, 4
    args.host = Path(args.host)
    args.host_python = Path(args.host_python or args.host / ".venv" / "bin" / "python")
    if not (args.host / "main.py").is_file() or not args.host_python.is_file():
        parser.error(f"no ComfyUI in {args.host} with {args.host_python}; give --host and --host-python")
    return args


def main() -> None:
    args = parsed()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out.with_suffix(".safetensors")
    names = ("pixels", "counts", "core_counts", "rounds", "core_rounds", "steps", "rank", "device")
    asked = {name: getattr(args, name) for name in names}
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}

    def in_host(script: str, *arguments: str) -> str:
        command = [str(part) for part in (args.host_python, HERE / script, args.host, checkpoint, *arguments)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)  # noqa: S603 - our own command
        if done.returncode:
            sys.exit(f"{script} ended with {done.returncode}; see above")
        return done.stdout

    try:
        in_host("in_host.py", "write", "narrow" if args.quick else "full")
        measured = json.loads(in_host("regions_in_host.py", "run", json.dumps(asked)).strip().splitlines()[-1])
    finally:
        checkpoint.unlink(missing_ok=True)
    result = summary(measured, args)
    plot(args.plot, result)
    args.out.write_text(json.dumps({"summary": result, "runs": measured["runs"], "moved": measured["moved"]}, indent=1))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
