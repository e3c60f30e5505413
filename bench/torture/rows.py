"""The twelve rows of docs/trust.md, each put into words from what the trials saw."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from bench.torture.files import GROWTH, SLOWEST
from bench.torture.recording import LARGEST

PROMISES = {
    1: "Hostile files cannot hurt",
    2: "The format is stable",
    3: "Merged = bypass = the formula in float64",
    4: "The base model is never touched",
    5: "Orthogonal means orthogonal",
    6: "Merge algebra",
    7: "Stock tools agree",
    8: "Resuming is exact",
    9: "Training learns only what it should",
    10: "Regions are consistent",
    11: "The host runs it",
    12: "Nothing sneaky",
}
LAWS = {
    3: "Every kind of adapter and every merge method on Linear, 1x1 and 3x3 layers of drawn sizes, strengths -1 to 2, "
    "one to three batch dimensions, fp32, fp16 and bf16, against float64 arithmetic written out by hand",
    4: "",
    5: "Bases, slots and rows of concepts, the frozen factor before and after training, what one concept's slot does "
    "to another's",
    6: "Order of concepts, strength 0 and 1, one concept alone, 1 to 100 concepts, merges of merges, merges written to "
    "files for other programs and read back",
    7: "Our files in diffusers with peft, files of other programs in ours, every key that has no place",
    9: "Planted targets found again by every method, gradients against float64 references and by gradcheck, rows and "
    "columns outside of a concept's own",
    10: "One region over everything, one prompt in any masks, shares of each position, order, what is drawn at random, "
    "what changes outside of a region's mask, merged and gated",
}


@dataclass
class Row:
    """tried, times and result are what the page says; kept: None where there is no evidence yet."""

    promise: int
    tried: list[str] = field(default_factory=list)
    times: list[str] = field(default_factory=list)
    result: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    evidence: list[dict] = field(default_factory=list)

    def saw(self, seen: dict, tried: str, times: str, result: str, faults: Iterable[str] = ()) -> None:
        self.evidence.append(seen)
        self.tried.append(tried)
        self.times.append(times)
        self.result.append(result)
        self.faults += faults

    @property
    def kept(self) -> bool | None:
        return None if not self.evidence else not self.faults


def rows_of(evidence: Mapping[str, dict]) -> dict[int, Row]:
    """The promises of which there is evidence, in words."""
    rows = {promise: Row(promise) for promise in PROMISES}
    sound = {name: seen for name, seen in evidence.items() if "fault" not in seen}
    for name, seen in evidence.items():
        for promise in seen.get("rows", ()) if "fault" in seen else ():
            rows[promise].saw(seen, name, "once", "the trial itself failed", [f"{name}: {seen['fault']}"])
    add_files(rows, sound)
    add_formats(rows, sound)
    add_laws(rows, [seen for name, seen in sound.items() if name.startswith("laws-")])
    add_untouched(rows, sound)
    for name, seen in sound.items():
        if name.startswith("host-"):
            add_host_tests(rows, seen)
        elif name.startswith("queue-"):
            add_queue(rows, seen)
        elif name.startswith("cancels-"):
            add_cancels(rows, seen)
    add_killed(rows, sound)
    add_sneaky(rows, sound)
    return {promise: row for promise, row in rows.items() if row.kept is not None}


def add_files(rows: dict[int, Row], sound: Mapping[str, dict]) -> None:
    if not (seen := sound.get("mutations")):
        return
    outcomes = seen["outcomes"]
    tried, refused = (sum(kind[part] for kind in outcomes) for part in ("tried", "refused"))
    slowest = max(outcomes, key=lambda kind: kind.get("slowest", 0.0))
    largest = max(outcomes, key=lambda kind: kind.get("growth", 0))
    faults = [f"{kind['kind']}: {fault}"[:200] for kind in outcomes for fault in kind["faults"]]
    faults += [f"{kind['kind']}: {kind['slowest']:.2f} s" for kind in outcomes if kind.get("slowest", 0) > SLOWEST]
    faults += [
        f"{kind['kind']}: +{kind['growth'] / 2**20:.0f} MiB" for kind in outcomes if kind.get("growth", 0) > GROWTH
    ]
    rows[1].saw(
        seen,
        "Seeded mutations of the bytes, the header, the JSON and the tensors of " + listed(k["kind"] for k in outcomes),
        f"{tried:,} files",
        f"{refused:,} refused in one sentence, {tried - refused:,} accepted and then used (merged, exported, "
        f"inspected, drawn, resumed); slowest reading {slowest.get('slowest', 0.0):.2f} s ({slowest['kind']}), most "
        f"memory +{largest.get('growth', 0) / 2**20:.0f} MiB ({largest['kind']})",
        faults,
    )


def add_formats(rows: dict[int, Row], sound: Mapping[str, dict]) -> None:
    if seen := sound.get("formats"):
        rows[2].saw(
            seen,
            "Golden files of version 1, read and written; concepts of every kind and precision drawn from seeds, "
            "saved, loaded and saved again, compact too",
            f"{seen['golden']} golden tests, {seen['saved']:,} concepts",
            f"{seen['saved'] - len(seen['differing']):,} byte-identical",
            [*seen["failed"], *seen["differing"]],
        )
    if seen := sound.get("crashes"):
        rows[2].saw(
            seen,
            "writes of concepts, moments, texts and checkpoints broken off at a drawn moment: killed, disk full, "
            "disk broken, file size limited",
            f"{seen['tried']} writes",
            f"{seen['lost']} lost; each file is the old or the new one",
            seen["faults"],
        )


def add_laws(rows: dict[int, Row], runs: list[dict]) -> None:
    for promise, what in LAWS.items():
        tallies = [seen["laws"][str(promise)] for seen in runs]
        if not tallies or not any(tally["held"] + len(tally["failed"]) for tally in tallies):
            continue
        held = sum(tally["held"] for tally in tallies)
        failed = [fault for tally in tallies for fault in tally["failed"]]
        weak = sum(len(tally["weak"]) for tally in tallies)
        rows[promise].saw(
            runs[-1],
            what or "The engine's own tests of it: training, cancels, faults, merges, drawing, regions",
            f"{held + len(failed) + weak:,} tests over {len(runs)} seeds",
            f"{held:,} hold{proving(weak)}{nearest(tallies)}",
            failed,
        )


def proving(weak: int) -> str:
    return f", {weak} had too small an effect to prove anything" if weak else ""


def nearest(tallies: list[dict]) -> str:
    """The largest error under each bound that numbers are compared with most."""
    bounds: dict[str, list] = {}
    for tally in tallies:
        for bound, (count, largest) in tally["compared"].items():
            before, most = bounds.get(bound, (0, 0.0))
            bounds[bound] = [before + count, max(most, largest)]
    bounds = {bound: seen for bound, seen in bounds.items() if float(bound) <= LARGEST}
    common = sorted(bounds, key=lambda bound: -bounds[bound][0])[:3]
    told = [f"{bounds[bound][1]:.1e} of {float(bound):.0e}" for bound in sorted(common, key=float)]
    total = sum(count for count, _ in bounds.values())
    return f"; {total:,} comparisons, the largest error " + ", ".join(told) + " allowed" if told else ""


def add_untouched(rows: dict[int, Row], sound: Mapping[str, dict]) -> None:
    if seen := sound.get("untouched"):
        rows[4].saw(
            seen,
            "sha256 of all weights, hooks, processors and replaced forwards after each training by every method, "
            "cancel, fault, merge, drawing and region, in " + listed(seen["looked"]),
            f"{sum(seen['looked'].values()):,} looks",
            f"{len(seen['changed'])} changes",
            [*seen["changed"], *seen["refused"]],
        )


def add_host_tests(rows: dict[int, Row], seen: dict) -> None:
    for promise, tally in seen["laws"].items():
        total = tally["held"] + len(tally["failed"])
        if total:
            rows[int(promise)].saw(
                seen,
                f"the tests of it in ComfyUI {seen['version']}",
                f"{total} test{'s' * (total != 1)}",
                f"{tally['held']} hold{'s' * (tally['held'] == 1)}",
                tally["failed"],
            )


def add_queue(rows: dict[int, Row], seen: dict) -> None:
    good = seen["queued"] - seen["bad"]
    faults = [*seen["wrong"]]
    faults += [f"{good - seen['finished']} good prompts did not finish"] if seen["finished"] != good else []
    faults += [f"{seen['bad'] - seen['named']} bad prompts did not name their node"] * (seen["named"] != seen["bad"])
    faults += [f"{seen['left']} prompts stayed in the queue"] if seen["left"] else []
    faults += grown(seen["memory"])
    rows[11].saw(
        seen,
        f"a queue with every tenth prompt bad, in ComfyUI {seen['version']}",
        f"{seen['queued']} prompts",
        f"{seen['finished']} of {good} good ones finished, {seen['named']} of {seen['bad']} bad ones named their node; "
        + memory(seen["memory"]),
        faults,
    )


def grown(told: dict) -> list[str]:
    growth = told["late"] - told["early"]
    return [f"memory grew by {growth:.0f} MiB"] if growth > GROWTH / 2**20 else []


def memory(told: dict) -> str:
    """How the server's memory went, from its second fifth on."""
    return f"memory {told['early']:.0f} MiB early, {told['late']:.0f} MiB late, peak {told['peak']:.0f} MiB"


def add_cancels(rows: dict[int, Row], seen: dict) -> None:
    count = seen["cancels"]
    faults = [*seen["wrong"]]
    faults += [f"{count - seen['same']} pictures came otherwise"] if seen["same"] != count else []
    faults += grown(seen["memory"])
    faults += [f"{seen['trainings'] - seen['kept']} kept nothing"] if seen["kept"] != seen["trainings"] else []
    rows[11].saw(
        seen,
        f"samplings and trainings cancelled at one step or another in ComfyUI {seen['version']}",
        f"{count} cancels",
        f"{seen['cancelled']} ended as cancels, {seen['kept']} of {seen['trainings']} trainings kept a concept, the "
        f"same picture came bit for bit after {seen['same']}; " + memory(seen["memory"]),
        faults,
    )


def add_killed(rows: dict[int, Row], sound: Mapping[str, dict]) -> None:
    if seen := sound.get("kills"):
        rows[8].saw(
            seen,
            "Trainings killed up to three times each, by the clock or in the middle of a checkpoint, with every option "
            "on in half of them, and resumed in a new process",
            f"{seen['tried']} trainings",
            f"{seen['tried'] - seen['lost']} end with the same weights, optimizer, generators and losses, bit for bit",
            seen["faults"],
        )


def add_sneaky(rows: dict[int, Row], sound: Mapping[str, dict]) -> None:
    if seen := sound.get("sneaky"):
        faults = [*seen["failed"], *([] if seen["ruff"] else ["ruff's security rules"])]
        rows[12].saw(
            seen,
            "Every Python file and script of the page scanned for running data, starting programs, calling out and "
            "pickles; ruff's security rules; an import with sockets and programs blocked",
            f"{seen['python']} Python files, {seen['scripts']} scripts",
            f"{seen['held']} checks hold, {len(seen['excused'])} lines are excused from a security rule by name",
            faults,
        )


def listed(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last
