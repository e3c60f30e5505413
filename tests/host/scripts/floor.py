"""In the host: load the pack by the host's own loader, as hosts of other versions and of fewer interfaces would."""

from __future__ import annotations

import asyncio
import inspect
import json
import sys
from types import ModuleType

from in_host import FOLDER, PACK, start

warnings = start()

import comfy_api.latest
import comfyui_version
import server  # noqa: F401  (the host itself reads its version when this is first imported)

import nodes

MODULES = {name: sys.modules[name] for name in ("comfyui_version", "comfy_api", "comfy_api.latest")}


def version(text: str | None) -> dict[str, ModuleType | None]:
    """A host that calls itself so; None: one without a version."""
    module = ModuleType("comfyui_version")
    module.__version__ = text
    return {"comfyui_version": module if text else None}


def interface(without: str) -> dict[str, ModuleType | None]:
    """A comfy_api.latest as it is, but for one part of `io` or one argument of `io.Schema`."""
    real, latest, io = comfy_api.latest, ModuleType("comfy_api.latest"), ModuleType("io")
    io.__dict__.update({name: part for name, part in vars(real.io).items() if name != without})
    accepted = inspect.signature(real.io.Schema).parameters.keys() - {without}

    class Schema:
        def __init__(self, **settings):
            assert settings.keys() <= accepted

    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in sorted(accepted)]
    Schema.__signature__ = inspect.Signature(parameters)
    latest.ComfyExtension, latest.io, latest.ui = real.ComfyExtension, io, real.ui
    io.Schema = Schema
    return {"comfy_api.latest": latest}


CASES = {
    "0.8.0": version("0.8.0"),
    "0.17.9": version("0.17.9"),
    "v0.3.10-5-gabcdef": version("v0.3.10-5-gabcdef"),
    "no version and no comfy_api": {**version(None), "comfy_api": None, "comfy_api.latest": None},
    "no version and an older schema": {**version(None), **interface("search_aliases")},
    "a version that is no number": {**version("nightly"), **interface("search_aliases")},
    "a newer version without comfy_api": {**version("0.40.0"), "comfy_api": None, "comfy_api.latest": None},
    "a newer version with an older schema": {**version("0.40.0"), **interface("search_aliases")},
    "a newer version without a type": {**version("0.40.0"), **interface("Autogrow")},
    "no version and everything there": version(None),
    "as it is": {},
}


def loaded(modules: dict[str, ModuleType | None]) -> dict:
    """What the host's loader leaves: whether it loaded, what is registered, and the warnings."""
    before = set(nodes.NODE_CLASS_MAPPINGS)
    nodes.EXTENSION_WEB_DIRS.clear()
    warnings.clear()
    sys.modules.update(modules)
    try:
        succeeded = nodes.load_custom_node(str(PACK))
        succeeded = asyncio.run(succeeded) if inspect.iscoroutine(succeeded) else succeeded
    finally:
        sys.modules.update(MODULES)
    added = sorted(set(nodes.NODE_CLASS_MAPPINGS) - before)
    for name in added:
        del nodes.NODE_CLASS_MAPPINGS[name]
    return {"succeeded": succeeded, "nodes": added, "pages": list(nodes.EXTENSION_WEB_DIRS), "said": list(warnings)}


def main() -> None:
    about = {"version": comfyui_version.__version__, "cases": {name: loaded(case) for name, case in CASES.items()}}
    (FOLDER / "floor.json").write_text(json.dumps(about))


main()
