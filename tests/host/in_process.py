"""The host's modules in this process, on the CPU and without a server, and the pack beside them.

After `start` the host's modules are imported by their names (`import comfy.sd`), the pack's as a package of its own, as
the host imports custom nodes: `from modular_concepts_pack.host.merging import weights`.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

PACK = Path(__file__).resolve().parents[2]
THERE = ("comfy", "comfy_extras", "folder_paths", "modular_concepts_pack", "nodes")


def start(path: Path) -> None:
    """Import path and options of the host in `path`; torch is imported later, by the tests that need it."""
    sys.path.insert(0, str(path))
    arguments, sys.argv = sys.argv, [str(path / "main.py"), "--cpu"]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args  # noqa: F401  (reads the arguments)
        import utils.extra_config  # noqa: F401  (as main.py does: later `utils` could be another module of 0.18.1)
    finally:
        sys.argv = arguments
    package = types.ModuleType("modular_concepts_pack")
    package.__path__ = [str(PACK)]
    sys.modules["modular_concepts_pack"] = package


class Without:
    """Skips a test module that imports the host, where there is none.  An entry for `sys.meta_path`."""

    def __init__(self, reason: str):
        self.reason = reason

    def find_spec(self, name: str, path=None, target=None) -> None:
        if name.partition(".")[0] in THERE:
            pytest.skip(self.reason, allow_module_level=True)
