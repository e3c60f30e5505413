"""Start the host's modules in this process, on the CPU without a server, and load the pack beside them."""

from __future__ import annotations

import importlib
import logging
import sys
import types
from pathlib import Path
from types import ModuleType

HOST, PACK, FOLDER = (Path(argument) for argument in sys.argv[1:4])


def start() -> list[str]:
    """Import path and options of the host; returns the list that collects its warnings."""
    sys.argv = [str(HOST / "main.py"), "--cpu"]
    sys.path.insert(0, str(HOST))
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_management  # noqa: F401  (logging is set up here)
    import utils.extra_config  # noqa: F401  (as main.py does: later `utils` could be another module of 0.18.1)

    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    return warnings


def pack_module(name: str) -> ModuleType:
    """A module of the pack under a package name of its own, as the host imports custom nodes."""
    if "modular_concepts_pack" not in sys.modules:
        package = types.ModuleType("modular_concepts_pack")
        package.__path__ = [str(PACK)]
        sys.modules["modular_concepts_pack"] = package
    return importlib.import_module(f"modular_concepts_pack.{name}")
