"""Try the twelve promises in full and write docs/trust.md.

    python -m bench.torture                    everything (an hour on two cores)
    python -m bench.torture --quick            a little of everything in under three minutes, into bench_output alone
    python -m bench.torture --only 3 6 queue   these promises, or trials by name; what others saw before stays
    python -m bench.torture --list             the trials by name

What each trial saw is in OUT/TRIAL.json as soon as it is over, and the page is written anew after each, so that a run
that is killed keeps what it has.  The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

from bench.torture import files, formats, sneaky, untouched, versions
from bench.torture.evidence import QUICK, Scale, Trial, carried_out, cores, gathered
from bench.torture.laws import HOST_LAWS, LAWS, ROOT, laws_in_host, laws_with
from bench.torture.page import written
from bench.torture.rows import PROMISES

OUT = ROOT / "bench_output" / "torture"


def trials(scale: Scale, hosts: dict[str, tuple[Path, Path]], pythons: list[Path]) -> Iterator[Trial]:
    """The cheapest first.  hosts: version -> folder and interpreter.  pythons: others than this one, with torch."""
    yield Trial("sneaky", (12,), sneaky.tried)
    yield Trial("versions", (), partial(versions.tried, pythons))
    yield Trial("formats", (2,), partial(formats.tried, scale.golden, scale.one_in))
    yield Trial("mutations", (1,), partial(files.mutated, scale.mutations, 0, scale.one_in > 1))
    yield Trial("crashes", (2,), partial(files.crashed, scale.crashed, 0))
    yield Trial("kills", (8,), partial(files.killed, scale.killed, 0))
    for seed in range(scale.seeds):
        yield Trial(f"laws-{seed}", tuple(LAWS), partial(laws_with, seed, scale.one_in))
    yield Trial("untouched", (4,), partial(untouched.tried, scale.cycles, scale.one_in))
    for version, (path, python) in hosts.items():
        about = partial(with_version, version)
        yield Trial(f"queue-{version}", (11,), partial(about, in_host("queue"), path, python, scale.queued))
        yield Trial(f"cancels-{version}", (11,), partial(about, in_host("cancels"), path, python, scale.cancels))
        if scale.host_tests:
            tests = partial(about, laws_in_host, path, python, scale.host_files)
            yield Trial(f"host-{version}", tuple(HOST_LAWS), tests)


def with_version(version: str, run: Callable[..., dict], *inputs: object) -> dict:
    return {"version": version, **run(*inputs)}


def in_host(name: str) -> Callable[..., dict]:
    """A trial of bench.torture.host, which loads the tests' own server only when it is run."""

    def run(*inputs: object) -> dict:
        from bench.torture import host

        return getattr(host, name)(*inputs)

    return run


def hosts_beside() -> dict[str, tuple[Path, Path]]:
    """Version -> (folder, interpreter): the host that the tests would use, and others in folders beside it."""
    sys.path.insert(0, str(ROOT / "tests" / "host"))
    from finding import find_host

    first = find_host()
    if isinstance(first, str):
        print(f"Without a host: {first}", file=sys.stderr)
        return {}
    beside = [path for path in sorted(first.path.parent.glob("ComfyUI*")) if (path / "main.py").is_file()]
    found = {version_of(path): (path, first.python) for path in [*beside, first.path]}
    return dict(sorted(found.items()))


def version_of(path: Path) -> str:
    source = (path / "comfyui_version.py").read_text(encoding="utf-8")
    return source.partition('__version__ = "')[2].partition('"')[0]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a little of everything; writes OUT/quick/trust.md alone")
    parser.add_argument("--only", nargs="*", default=[], help="promises by number, or trials by name")
    parser.add_argument("--list", action="store_true", help="name the trials and do nothing")
    parser.add_argument("--jobs", type=int, default=min(2, cores()), help="trials at a time (default %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="the folder of what each trial saw")
    parser.add_argument(
        "--python", type=Path, nargs="*", default=[], help="other interpreters that have torch and pytest"
    )
    parser.add_argument(
        "--host-files", nargs="*", help="of the tests in the host only these, such as host/test_floor.py"
    )
    for name in ("seeds", "mutations", "golden", "cycles", "crashed", "killed", "queued", "cancels"):
        parser.add_argument(f"--{name}", type=int, help=f"instead of {getattr(Scale(), name)}")
    return parser.parse_args()


def asked_for(trial: Trial, only: list[str]) -> bool:
    return not only or any(
        int(word) in trial.rows if word.isdigit() else trial.name == word or trial.name.startswith(word + "-")
        for word in only
    )


def main() -> int:
    asked = options()
    scale = QUICK if asked.quick else Scale()
    changed = {field.name: getattr(asked, field.name, None) for field in dataclasses.fields(Scale)}
    scale = dataclasses.replace(scale, **{name: value for name, value in changed.items() if value is not None})
    out = asked.out / "quick" if asked.quick else asked.out
    page = out / "trust.md" if asked.quick else ROOT / "docs" / "trust.md"
    hosts = hosts_beside()
    if asked.quick:
        hosts = dict(list(hosts.items())[-1:])
    chosen = [trial for trial in trials(scale, hosts, asked.python) if asked_for(trial, asked.only)]
    if asked.list:
        print("\n".join(f"{trial.name}: promises {', '.join(map(str, trial.rows)) or 'none'}" for trial in chosen))
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ThreadPoolExecutor(asked.jobs) as pool:
        for done in as_completed([pool.submit(carried_out, trial, out) for trial in chosen]):
            seen = done.result()
            print(f"{seen['trial']}: {seen['seconds']:.0f} s", seen.get("fault", ""), flush=True)
            written(page, gathered(out))
    kept = {number: row.kept for number, row in written(page, gathered(out)).items()}
    print(json.dumps({"kept": sum(kept.values()), "tried": len(kept), "rows": kept, "page": page.name}))
    return 0 if all(kept.values()) and len(kept) == len(PROMISES) else 1


if __name__ == "__main__":
    sys.exit(main())
