"""Merging speed against a chain of the host's LoRA loaders, peft and the machine's own limits, in SD 1.5's layout.

    make bench-merge                       everything; from a quarter of an hour on, and 6 GB of memory
    python bench/merge.py --quick          a narrow network, one turn: a minute, and no figure that means much
    python bench/merge.py --counts 1 15    these numbers of concepts only

Without a host, in this process: our merge into weights, the arithmetic of core's chain, peft (adapters joined and
fused, and fused one by one), and the floor: arithmetic at the measured rate of a large product, or reading and writing
the weights at the measured rate of a copy, whichever takes longer.  In the host's interpreter: from patched MODEL to
first step, and from a changed strength to the next step, beside core's loaders.  Turns are interleaved; figures are
ratios of medians, times ours / theirs, on the clock and (under "processor") in processor time, which others on the
machine do not lengthen.  Progress goes to stderr; the last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "build" / "bench-merge.json"
MANY = 15  # more concepts than that are merged once, which takes long enough
BARS = {
    "sum15_vs_floor": 1.6,
    "sum15_vs_core_host": 1 / 3,
    "block15_vs_core": 0.1,
    "block15_vs_core_host": 0.25,
    "lambda_vs_core": 0.5,
}


def engine(args: argparse.Namespace) -> dict:
    """Count of concepts -> seconds of each way, in this process."""
    import torch
    from layouts import LAYOUTS, empty_unet
    from merge_work import Machine

    torch.set_num_threads(args.threads)
    unet = empty_unet(LAYOUTS["narrow" if args.quick else "full"])
    shapes = {name: part.weight.shape for name, part in unet.named_modules() if isinstance(part, torch.nn.Linear)}
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: (torch.randn(shape, generator=generator) * shape[1] ** -0.5).to(args.device)
        for name, shape in shapes.items()
    }
    machine, found = Machine(args.device), {}
    for count in args.counts:
        found[count] = counted(args, machine, weights, count)
        print(count, json.dumps(found[count]), file=sys.stderr, flush=True)
    return {
        "counts": found,
        "layers": len(weights),
        "numbers": sum(weight.numel() for weight in weights.values()),
        **machine.rates(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
    }


def counted(args: argparse.Namespace, machine, weights: dict, count: int) -> dict:
    """Medians for one number of concepts, each way in turn; the weights are the base's again before each."""
    from merge_work import Peft, core_chain, made_work, medians, peak_extra, timed

    from modular_concepts.adapters import low_rank as adapters
    from modular_concepts.merging import add_concepts

    work = made_work(adapters, weights, count, args.rank)
    base = {name: weight.clone() for name, weight in list(weights.items())[::12]}
    ways: dict[str, Callable[[], object]] = {
        "sum": lambda: add_concepts(weights, work.sums, work.strengths),
        "block": lambda: add_concepts(weights, work.blocks, work.strengths, "block"),
    }
    if count <= args.rivals_up_to:
        peft, whole_blocks = Peft(work), [_over_all_rows(concept) for concept in work.blocks]
        ways |= {"core_sum": lambda: core_chain(work, work.sums), "core_block": lambda: core_chain(work, whole_blocks)}
        ways |= {"peft_cat": peft.cat, "peft_fuse": peft.fuse}
    turns = {name: [] for name in ways}
    check(work, base, count)
    extra = peak_extra(ways["sum"]) if args.device == "cpu" else None
    for _ in range(args.turns if count <= MANY else 1):
        machine.measure()
        for name, way in ways.items():
            turns[name].append(timed(way))
            if name.startswith("peft"):
                peft.undo()
    spent = {name: medians(own) for name, own in turns.items()}
    spent |= {"floor_sum": machine.floor(work, work.sums), "floor_block": machine.floor(work, work.blocks)}
    factors = sum(adapter.lora_up.nbytes + adapter.lora_down.nbytes for adapter in _adapters(work.sums))
    largest = max(weight.nbytes for weight in weights.values())
    found = {unit: {name: getattr(own, unit) for name, own in spent.items()} for unit in ("seconds", "processor")}
    return {**found, "peak_extra_mb": extra, "largest_and_factors_mb": (largest + factors) / 1e6}


def check(work, base: dict, count: int) -> None:
    """What is timed is right: our sum and core's arithmetic give one weight, and it moved."""
    from merge_work import STRENGTH

    from modular_concepts.merging import merge_concepts

    merged = merge_concepts(work.sums, work.strengths)
    for name, kept in base.items():
        ours, chain = merged[name].add_to(kept.clone()), kept.clone()
        for concept in work.sums:
            chain += STRENGTH * (concept.layers[name].lora_up @ concept.layers[name].lora_down)
        moved, apart = (float((ours - other).norm() / ours.norm()) for other in (kept, chain))
        if apart > 1e-5 or moved < 1e-2:
            raise SystemExit(f"{name} with {count} concepts: apart by {apart}, moved by {moved}")


def _over_all_rows(concept):
    """A block as core's loader sees it: zero rows around it."""
    from types import SimpleNamespace

    layers = {
        name: adapter.replace(kind="lora", rows=None, lora_up=adapter.full_up())
        for name, adapter in concept.layers.items()
    }
    return SimpleNamespace(name=concept.name, layers=layers)


def _adapters(concepts: Sequence) -> list:
    """Every distinct adapter once."""
    return list({id(adapter): adapter for concept in concepts for adapter in concept.layers.values()}.values())


def in_host(args: argparse.Namespace) -> dict:
    asked = {
        "layout": "narrow" if args.quick else "full",
        "counts": args.host_counts,
        "rank": args.rank,
        "repeats": args.turns,
        "activations": not args.no_activations,
    }
    command = [args.host_python, HERE / "merge_in_host.py", args.host, "-", "run", json.dumps(asked)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(  # noqa: S603 - our own command
        [str(part) for part in command], stdout=subprocess.PIPE, text=True, env=environment, check=False
    )
    if done.returncode:
        return {"failed": f"the host's part ended with {done.returncode}; see above"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def summary(engine_part: dict, host_part: dict) -> dict:
    """The ratios that the bars are about, and those beside them; None where a part is missing."""
    counts = engine_part.get("counts", {})

    def ratio(unit: str, ours: str, theirs: str) -> float | None:
        spent = counts.get(MANY, {}).get(unit, {})
        return round(spent[ours] / spent[theirs], 4) if ours in spent and theirs in spent else None

    def hosted(unit: str, how: str, figure: str) -> float | None:
        found = host_part.get(how, {}).get(str(MANY))
        return round(found["ratios"][unit][figure], 4) if found else None

    def ratios(unit: str) -> dict[str, float | None]:
        return {
            "sum15_vs_floor": ratio(unit, "sum", "floor_sum"),
            "sum15_vs_core_host": hosted(unit, "sum", "first_step"),
            "block15_vs_core": ratio(unit, "block", "core_block"),
            "block15_vs_core_host": hosted(unit, "block", "first_step"),
            "lambda_vs_core": hosted(unit, "sum", "changed"),
            "sum15_vs_core": ratio(unit, "sum", "core_sum"),
            "sum15_vs_peft_cat": ratio(unit, "sum", "peft_cat"),
            "sum15_vs_peft_fuse": ratio(unit, "sum", "peft_fuse"),
            "block15_vs_floor": ratio(unit, "block", "floor_block"),
            "block_lambda_vs_core": hosted(unit, "block", "changed"),
            "nodes15_vs_core_host": hosted(unit, "sum", "nodes"),
        }

    result = {**ratios("seconds"), "processor": ratios("processor")}
    result["bars"] = {
        name: {
            "at_most": round(bar, 4),
            "found": result[name],
            "held": result[name] is not None and result[name] <= bar,
        }
        for name, bar in BARS.items()
    }
    each = {count: one["seconds"]["sum"] / int(count) for count, one in counts.items()}
    result["seconds_per_concept"] = {count: round(seconds, 4) for count, seconds in each.items()}
    if len(each) > 1 and MANY in each:
        # 1 or less: no more time for each concept, however many there are.
        result["growth"] = round(each[max(each)] / each[MANY], 4)
    extra = [one["peak_extra_mb"] / one["largest_and_factors_mb"] for one in counts.values() if one["peak_extra_mb"]]
    if extra:
        # At most one layer's weight and the factors.
        result["peak_extra_vs_allowed"] = round(max(extra), 4)
    beside = host_part.get("activations", {}).get(str(MANY))
    if beside:
        core = host_part["sum"][str(MANY)]["seconds"]["core"]["changed"]
        result["activations"] = {
            "lambda_vs_core": round(beside["changed"]["seconds"] / core, 4),
            "step_vs_plain_step": round(beside["step"]["seconds"] / beside["plain_step"]["seconds"], 4),
        }
    return result


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a narrow network and one turn, as a smoke test")
    parser.add_argument(
        "--counts", type=int, nargs="*", default=[1, 3, 15, 50, 100], help="of concepts, without a host"
    )
    parser.add_argument("--host-counts", type=int, nargs="*", default=[1, 3, 15, 50], help="of concepts, in the host")
    parser.add_argument("--rivals-up-to", type=int, default=50, help="concepts; beyond, only ours and the floor")
    parser.add_argument("--no-activations", action="store_true", help="leave out what activations cost, in the host")
    parser.add_argument("--rank", type=int, default=20)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each process")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for the part without a host")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--host", type=Path, default=os.environ.get("COMFYUI_PATH") or Path.home() / "comfy/ComfyUI")
    parser.add_argument("--host-python", type=Path, default=os.environ.get("COMFYUI_PYTHON"))
    args = parser.parse_args(arguments)
    if args.quick:
        args.counts, args.host_counts, args.turns = [1, 15], [15], 1
    args.host = Path(args.host)
    args.host_python = Path(args.host_python or args.host / ".venv" / "bin" / "python")
    if args.host_counts and not ((args.host / "main.py").is_file() and args.host_python.is_file()):
        parser.error(
            f"no ComfyUI in {args.host} with {args.host_python}; give --host and --host-python, or --host-counts"
        )
    return args


def main() -> None:
    args = parsed()
    sys.path.insert(0, str(HERE.parent))
    host_part = in_host(args) if args.host_counts else {}
    engine_part = engine(args) if args.counts else {}
    from train import machine

    result = summary(engine_part, host_part)
    result |= {"machine": machine(), "threads": args.threads, "rank": args.rank}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"summary": result, "engine": engine_part, "host": host_part}, indent=1))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
