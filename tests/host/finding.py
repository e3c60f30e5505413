"""Where the host is and which interpreter is its own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PACK = Path(__file__).resolve().parents[2]
HOW = (
    "set COMFYUI_PATH to a ComfyUI folder (and COMFYUI_PYTHON to its interpreter when that is not in the "
    "folder's .venv or venv), or install one: pip install comfy-cli && comfy install"
)


class NoSuchHost(ValueError):
    """A host or an interpreter was named and is not there."""


@dataclass(frozen=True)
class Host:
    path: Path
    python: Path

    @property
    def runs_here(self) -> bool:
        """Whether this very process is the host's interpreter; both environments may link to one Python."""
        return Path(sys.executable).parent.samefile(self.python.parent)

    def run(self, script: str, folder: Path, timeout: float = 900) -> str:
        """Run tests/host/scripts/SCRIPT in a process of its own on the files in `folder`; its output."""
        command = [self.python, Path(__file__).parent / "scripts" / script, self.path, PACK, folder]
        done = subprocess.run(  # noqa: S603 - our own command
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
    """The host, or why there is none.  Raises NoSuchHost where one was named and is not there: no reason to skip."""
    named = os.environ.get("COMFYUI_PATH")
    enclosing = [parent.parent for parent in PACK.parents if parent.name == "custom_nodes"]
    folders = [Path(named)] if named else [*enclosing, Path.home() / "comfy" / "ComfyUI"]
    path = next((folder for folder in folders if (folder / "main.py").is_file()), None)
    if path is None:
        if named:
            raise NoSuchHost(f"COMFYUI_PATH is {named}, but there is no ComfyUI in it (no main.py)")
        return f"no ComfyUI found; {HOW}"
    named = os.environ.get("COMFYUI_PYTHON")
    inside = [path / venv / part for venv in (".venv", "venv") for part in ("bin/python", "Scripts/python.exe")]
    pythons = [Path(named)] if named else inside
    python = next((candidate for candidate in pythons if candidate.is_file()), None)
    if python is None:
        if named:
            raise NoSuchHost(f"COMFYUI_PYTHON is {named}, but there is no such file")
        return f"ComfyUI in {path} has no .venv or venv of its own; {HOW}"
    return Host(path.resolve(), python.absolute())  # a resolved link would leave the virtual environment
