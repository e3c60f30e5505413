"""Run pytest in the host's own interpreter, with the host's environment as it is.

    python tests/host/run.py                                     all tests in the host
    python tests/host/run.py tests/host/test_patching.py -k zero

pytest, and whatever else of requirements/lock.txt the host lacks, goes into build/host-pytest, which is made anew when
the lock or the host changes; PYTHONPATH leads there.  Files run side by side where cores and memory allow.
Without a host pytest runs in this interpreter, where the tests skip themselves and say so.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from finding import PACK, Host, NoSuchHost, find_host

FOLDER = PACK / "build" / "host-pytest"
LOCK = PACK / "requirements" / "lock.txt"
# Of the lock, what no test in the host needs: these look at source code.
NOT_NEEDED = {"grimp", "import-linter", "ruff", "ty"}
MOST = 4  # processes
EACH = 5 * 2**30  # bytes that a process with its server may hold
INSTALLED = (
    "import importlib.metadata as m, re; "
    "print(*(re.sub('[-_.]+', '-', d.metadata['Name']).lower() for d in m.distributions()))"
)


def main(arguments: list[str]) -> int:
    try:
        host = find_host()
    except NoSuchHost as error:
        print(f"ERROR: {error}", file=sys.stderr)  # noqa: T201 - a runner's own words
        return 4  # as pytest does of wrong usage
    python, environment = sys.executable, {**os.environ, "OMP_NUM_THREADS": "1"}
    if isinstance(host, Host):
        python = str(host.python)
        environment["PYTHONPATH"] = str(prepared(host))
    if not any(argument.startswith("tests") for argument in arguments):
        arguments = [str(Path("tests") / "host"), *arguments]
    command = [python, "-m", "pytest", "-n", str(processes()), "--dist", "loadfile", *arguments]
    return subprocess.call(command, cwd=PACK, env=environment)  # noqa: S603 - our own command


def prepared(host: Host) -> Path:
    """The folder with what the tests need and the host lacks, made if it is not there yet."""
    stamp = FOLDER / "made-for.txt"
    wanted = f"{host.python}\n{LOCK.read_text(encoding='utf-8')}"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return FOLDER
    print(f"Installing what the host's tests need into {FOLDER.relative_to(PACK)} (once)", file=sys.stderr)  # noqa: T201 - a runner's own words
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    (FOLDER / "lock.txt").write_text("\n".join(lacking(host)), encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(host.python), "install"]
    pip += ["--quiet", "--quiet", "--no-deps", "--no-compile", "--target", str(FOLDER), "-r", str(FOLDER / "lock.txt")]
    subprocess.run(pip, check=True)  # noqa: S603 - our own command
    stamp.write_text(wanted, encoding="utf-8")
    return FOLDER


def lacking(host: Host) -> list[str]:
    """Lines of the lock that name a package which the host has not."""
    asked = subprocess.run([str(host.python), "-c", INSTALLED], capture_output=True, text=True, check=True)  # noqa: S603 - our own command
    there = set(asked.stdout.split()) | NOT_NEEDED
    pins = (line for line in LOCK.read_text(encoding="utf-8").splitlines() if "==" in line)
    return [line for line in pins if re.sub("[-_.]+", "-", line.partition("==")[0]).lower() not in there]


def processes() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST, cores, free_memory() // EACH))


def free_memory() -> int:
    """Bytes; what two processes need where the system does not tell."""
    try:
        told = re.search(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        told = None
    return int(told[1]) * 1024 if told else 2 * EACH


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
