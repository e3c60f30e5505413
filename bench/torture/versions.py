"""Which Pythons read and run the pack, and what no older one could: newer syntax, newer parts of the library."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.torture.laws import ROOT, tested

FLOOR = (3, 10)
PROMISED = ((3, 10), (3, 11), (3, 12), (3, 13), (3, 14))
# Parts of the standard library that came after 3.10, as they are written in code.
NEWER = re.compile(
    r"\btomllib\b|\bExceptionGroup\b|\bStrEnum\b|\bReprEnum\b|\bdatetime\.UTC\b|import UTC\b|\bTaskGroup\b"
    r"|\basyncio\.(timeout|Runner|Barrier)\b|\btyping\.(Self|Never|LiteralString|Unpack|Required|NotRequired|override)\b"
    r"|from typing import [^\n]*\b(Self|Never|LiteralString|Unpack|Required|NotRequired|override|assert_never)\b"
    r"|\bbatched\b|\.add_note\(|\bcontextlib\.chdir\b|import chdir\b|\bmath\.(cbrt|exp2|sumprod|fma)\b|\bPath\.walk\b"
    r"|\.walk_up\b|\bhashlib\.file_digest\b|\boperator\.call\b|\bsys\.(exception|monitoring)\b|\bcopy\.replace\b"
    r"|\bwarnings\.deprecated\b|\.full_match\(|\bannotationlib\b|\bcompression\.zstd\b|\bconcurrent\.interpreters\b"
    r"|\bshutil\.rmtree\([^)]*onexc|\bstarmap_async\b|\bmodule_globals\b"
)
# Tests of the engine and of its files that need no package beyond the pack's own.
TESTS = ("engine/test_merge.py", "engine/test_tokens.py", "engine/test_region_parsing.py", "files/test_concept_file.py")
OUTCOMES = ("passed", "failed", "skipped")
READ = """
import ast, json, pathlib, sys
failed = []
files = [pathlib.Path(name) for name in json.load(sys.stdin)]
for path in files:
    try:
        compile(path.read_text(encoding="utf-8"), str(path), "exec", dont_inherit=True)
    except SyntaxError as error:
        failed.append(f"{path.name}: {error}")
version, read = sys.version.split()[0], len(files) - len(failed)
print(json.dumps({"version": version, "platform": sys.platform, "read": read, "failed": failed}))
"""
ENGINE = """
import importlib, json, pkgutil, sys
sys.path.insert(0, sys.argv[1])
import modular_concepts
failed, names = [], [m.name for m in pkgutil.walk_packages(modular_concepts.__path__, "modular_concepts.")]
for name in names:
    try:
        importlib.import_module(name)
    except Exception as error:
        failed.append(f"{name}: {type(error).__name__}: {error}")
print(json.dumps({"imported": len(names) - len(failed), "failed": failed[:5]}))
"""


def pack() -> list[Path]:
    """Everything of ours that runs where the pack runs."""
    folders = ("modular_concepts", "nodes", "host", "scripts")
    return [ROOT / "__init__.py", *(path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))]


def tried(others: Sequence[Path] = ()) -> dict:
    """The floor's grammar and library by what is written, and every Python that there is by reading or running it.

    others: interpreters that have torch and pytest; those run tests of the engine too.
    """
    too_new = []
    for path in pack():
        source = path.read_text(encoding="utf-8")
        try:
            ast.parse(source, feature_version=FLOOR)
        except SyntaxError as error:
            too_new.append(f"{path.relative_to(ROOT)}: {error}")
        too_new += [f"{path.relative_to(ROOT)}: {found[0]}" for found in NEWER.finditer(source)]
    ruff = shutil.which("ruff", path=str(ROOT / ".venv" / "bin")) or "ruff"
    command = [ruff, "check", "--target-version", "py310", "--select", "F,UP,E9", *map(str, pack())]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603 - our own command
    return {
        "files": len(pack()),
        "too_new": too_new,
        "ruff": checked.returncode == 0,
        "pythons": [with_python(*python) for python in pythons(others)],
    }


def pythons(others: Sequence[Path]) -> Iterator[tuple[str, Path | None]]:
    """3.10 to 3.14, each where it is: this one, one of `others`, on the path, one of pyenv's, or nowhere."""
    named = {version_of(path): path for path in [*others, Path(sys.executable)]}
    for major, minor in PROMISED:
        name = f"{major}.{minor}"
        if name in named:
            yield name, named[name]
            continue
        beside = sorted((Path.home() / ".pyenv" / "versions").glob(f"{name}.*/bin/python"))
        path = beside[-1] if beside else shutil.which(f"python{name}")
        yield name, Path(path) if path else None


def version_of(path: Path) -> str:
    command = [path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603 - our own command


def with_python(version: str, path: Path | None) -> dict:
    """What one Python makes of the pack: whether it can read every file, and import the engine where it has torch."""
    if path is None:
        return {"version": version, "there": False}
    files = json.dumps([str(file) for file in pack()])
    read = subprocess.run([path, "-c", READ], input=files, capture_output=True, text=True, check=False)  # noqa: S603 - our own command
    if read.returncode:
        return {"version": version, "there": False, "why": read.stderr.strip()[-200:]}
    seen = {"there": True, **json.loads(read.stdout)}
    with tempfile.TemporaryDirectory() as folder:
        command = [path, "-B", "-c", ENGINE, str(ROOT)]
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)  # noqa: S603 - our own command
    seen["engine"] = json.loads(ran.stdout) if ran.returncode == 0 else {"imported": 0, "failed": [ran.stderr[-200:]]}
    if not seen["engine"]["failed"]:
        records = tested(TESTS, python=path)
        seen["tests"] = {outcome: sum(record["outcome"] == outcome for record in records) for outcome in OUTCOMES}
    return seen
