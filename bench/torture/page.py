"""docs/trust.md: the twelve rows, then hosts and Pythons.  A row without new evidence stays as it was written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date
from pathlib import Path

from bench.torture.rows import PROMISES, Row, rows_of
from modular_concepts.storage.atomic import replacing

HEAD = """# Trust

What a user may rely on, as twelve promises, and what trying them in full gave. `make torture` tries them again and
writes this page anew, row by row (an hour on two cores, with ComfyUI beside it); `make test` keeps the bounded part of
each in every run. A promise is *kept* when nothing of what was tried went wrong, and *BROKEN* otherwise, with what
went wrong. Where a row says how near a law came to its bound, the bounds are those of the tests: the error allowed, and
the largest that there was.

| # | promise | tried | how often | result | when, where |
|---|---|---|---|---|---|
"""
HOSTS = """
## Hosts and Pythons

| what | tried | result | when |
|---|---|---|---|
"""
ROW = re.compile(r"^\| (\d+) \|")
USUAL = ("linux", "darwin", "win32")
NOT_YET = "| {} | {} | not yet | - | - | - |"


def written(path: Path, evidence: Mapping[str, dict]) -> dict[int, Row]:
    """Write the page; the rows that have evidence."""
    before = _lines(path)
    rows, letters = rows_of(evidence), lettered(evidence)
    body = [
        line_of(rows[number], letters) if number in rows else before.get(str(number), NOT_YET.format(number, name))
        for number, name in PROMISES.items()
    ]
    versions = versions_of(evidence) or [line for key, line in before.items() if not key.isdigit()]
    text = HEAD + "\n".join(body) + "\n" + _machines(letters) + HOSTS + "\n".join(versions) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text.encode())
    return rows


def _lines(path: Path) -> dict[str, str]:
    """Number, or first cell -> line, of the page as it is."""
    if not path.is_file():
        return {}
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return {line.split("|")[1].strip(): line for line in lines if line.split("|")[1].strip() not in ("#", "what")}


def lettered(evidence: Mapping[str, dict]) -> dict[str, str]:
    """Machine in words -> its letter."""
    return {machine: chr(65 + index) for index, machine in enumerate(sorted({e["machine"] for e in evidence.values()}))}


def _machines(letters: Mapping[str, str]) -> str:
    return "\n" + "\n".join(f"Machine {letter}: {machine}." for machine, letter in letters.items()) + "\n"


def line_of(row: Row, letters: Mapping[str, str]) -> str:
    verdict = "kept" if row.kept else "**BROKEN**: " + "; ".join(cell(fault) for fault in row.faults[:6])
    days = sorted({seen["when"] for seen in row.evidence})
    where = " and ".join(sorted({letters[seen["machine"]] for seen in row.evidence}))
    when = " to ".join(plain(day) for day in sorted({days[0], days[-1]})) + f", machine {where}"
    parts = (PROMISES[row.promise], "; ".join(row.tried), ", ".join(row.times), f"{verdict}. {'; '.join(row.result)}")
    return f"| {row.promise} | {' | '.join(cell(part) for part in parts)} | {when} |"


def cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def plain(day: str) -> str:
    found = date.fromisoformat(day)
    return f"{found.day} {found:%B %Y}"


def versions_of(evidence: Mapping[str, dict]) -> list[str]:
    """A line for each host and each Python that something was tried on."""
    lines = []
    for name, seen in evidence.items():
        if name.startswith("host-") and "fault" not in seen:
            tallies = seen["laws"].values()
            failed = sum(len(tally["failed"]) for tally in tallies)
            held = seen["tests"] - seen["failures"]
            lines.append(
                f"| ComfyUI {seen['version']} | {seen['tests']} tests in the real host | {held} passed, "
                f"{seen['failures']} failed ({failed} of them laws of the promises) | {plain(seen['when'])} |"
            )
    if (seen := evidence.get("versions")) and "fault" not in seen:
        clean = "nothing newer" if not seen["too_new"] else "; ".join(seen["too_new"])
        lines.append(
            f"| Python 3.10's grammar and library | {seen['files']} files of the pack parsed as Python 3.10's, and "
            f"searched for parts of the library that are newer | {cell(clean)} | {plain(seen['when'])} |"
        )
        lines += [python_line(python, seen["when"]) for python in seen["pythons"]]
    return lines


def python_line(python: dict, day: str) -> str:
    if not python["there"]:
        return f"| Python {python['version']} | not there to be tried | - | {plain(day)} |"
    failed = [*python["failed"], *python["engine"].get("failed", [])[:1]]
    run = python.get("tests")
    tried = "every file compiled, every module of the engine imported" + (", tests of the engine run" if run else "")
    result = f"{python['read']} files compiled, {python['engine']['imported']} modules imported"
    result += f", {run['passed']} tests passed, {run['failed']} failed" if run else ""
    result += f"; {cell(failed[0])}" if failed else ""
    place = f" on {python['platform']}" if python["platform"] not in USUAL else ""
    return f"| Python {python['version']}{place} | {tried} | {result} | {plain(day)} |"
