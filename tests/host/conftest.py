"""Where the host is, and how a script runs in the host's own interpreter."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from server import HostServer

PACK = Path(__file__).resolve().parents[2]
HOW = (
    "set COMFYUI_PATH to a ComfyUI folder (and COMFYUI_PYTHON to its interpreter when that is not in the "
    "folder's .venv or venv), or install one: pip install comfy-cli && comfy install"
)
_without_host: list[str] = []


@dataclass(frozen=True)
class Host:
    path: Path
    python: Path

    def run(self, script: str, folder: Path, timeout: float = 900) -> str:
        """Run tests/host/scripts/SCRIPT in the host on the CPU, on the files in `folder`; its output."""
        command = [self.python, Path(__file__).parent / "scripts" / script, self.path, PACK, folder]
        done = subprocess.run(  # noqa: S603
            [str(part) for part in command],
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=folder,
            check=False,
        )
        assert done.returncode == 0, f"{script} failed in {self.path}:\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr


def find_host() -> Host | str:
    """The host, or why there is none.  A host that was named and is not there is an error, not a skip."""
    named = os.environ.get("COMFYUI_PATH")
    enclosing = [parent.parent for parent in PACK.parents if parent.name == "custom_nodes"]
    folders = [Path(named)] if named else [*enclosing, Path.home() / "comfy" / "ComfyUI"]
    path = next((folder for folder in folders if (folder / "main.py").is_file()), None)
    if path is None:
        if named:
            raise pytest.UsageError(f"COMFYUI_PATH is {named}, but there is no ComfyUI in it (no main.py)")
        return f"no ComfyUI found; {HOW}"
    named = os.environ.get("COMFYUI_PYTHON")
    inside = [path / venv / part for venv in (".venv", "venv") for part in ("bin/python", "Scripts/python.exe")]
    pythons = [Path(named)] if named else inside
    python = next((candidate for candidate in pythons if candidate.is_file()), None)
    if python is None:
        if named:
            raise pytest.UsageError(f"COMFYUI_PYTHON is {named}, but there is no such file")
        return f"ComfyUI in {path} has no .venv or venv of its own; {HOW}"
    return Host(path.resolve(), python.absolute())  # a resolved link would leave the virtual environment


@pytest.fixture(scope="session")
def host() -> Host:
    found = find_host()
    if isinstance(found, str):
        _without_host.append(found)
        pytest.skip(f"HOST TESTS SKIPPED: {found}")
    return found


@pytest.fixture(scope="session")
def server(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostServer]:
    """One server for all tests that leave it answering; its folders hold nothing but a copy of the pack."""
    running = HostServer(host, tmp_path_factory.mktemp("server"))
    yield running
    running.stop()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _without_host:
        terminalreporter.section("HOST TESTS SKIPPED", red=True, bold=True)
        terminalreporter.write_line(_without_host[0])
