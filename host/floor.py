"""Whether this ComfyUI is new enough.  Asked before anything of the pack is loaded, so it imports nothing of it.

Its syntax is that of Python 3.8: an older one must be able to read it to say so.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from importlib.util import find_spec

NEEDED = "0.18.1"
PYTHON = (3, 10)
# What the nodes take of the host's comfy_api.latest, and what a schema must be able to say.
_IO = (
    "Autogrow", "Boolean", "BoundingBox", "Clip", "Combo", "ComfyNode", "Conditioning", "ControlAfterGenerate",
    "Custom", "Float", "Hooks", "Image", "Input", "Int", "Latent", "LoraModel", "LossMap", "Mask", "Model",
    "MultiType", "NodeOutput", "NumberDisplay", "Output", "Schema", "String", "Vae",
)  # fmt: skip
INTERFACE = ("ComfyExtension", *(f"io.{name}" for name in _IO), "ui.PreviewImage", "ui.PreviewText")
SCHEMA = ("category", "description", "display_name", "inputs", "is_input_list", "is_output_node", "node_id")
SCHEMA += ("outputs", "search_aliases")


def check_host() -> None:
    """Raise ImportError, one sentence, where the host or its Python is older than the nodes need.

    Outside of any host there is nothing to check.  Whatever version a host has, and be it none, it must offer what the
    nodes are made of.
    """
    if sys.version_info < PYTHON:
        raise ImportError(
            "Modular Concepts needs Python {}.{} or newer, and this ComfyUI runs on Python {}.{}.{}; "
            "give ComfyUI a newer Python".format(*PYTHON, *sys.version_info[:3])
        )
    version = host_version()
    if version and numbers(version) < numbers(NEEDED):
        raise ImportError(_sentence(f"this is ComfyUI {version}"))
    if find_spec("folder_paths"):  # inside a host, which has loaded its interface before any pack
        _check_interface(version)


def _check_interface(version: str | None) -> None:
    this = f"this one, which calls itself {version}," if version else "this one, which does not tell its version,"
    lacking = lacking_interface()
    if lacking:
        raise ImportError(_sentence(f"{this} has no {lacking}"))


def host_version() -> str | None:
    """The host's version, such as 0.33.0; None where there is no host, or one that does not tell it."""
    try:
        version = importlib.import_module("comfyui_version").__version__
    except (ImportError, AttributeError):
        return None
    return version if isinstance(version, str) and numbers(version) else None


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: v0.18.1rc1 -> (0, 18, 1); () where it begins with none."""
    leading = re.match(r"v?(\d+(?:\.\d+)*)", version)
    return tuple(int(part) for part in leading[1].split(".")) if leading else ()


def lacking_interface() -> str | None:
    """The first thing that the nodes need and the host's comfy_api does not have, by name."""
    try:
        latest = importlib.import_module("comfy_api.latest")
    except ImportError:
        return "comfy_api.latest"
    for name in INTERFACE:
        offered = latest
        for part in name.split("."):
            offered = getattr(offered, part, None)
        if offered is None:
            return f"comfy_api.latest.{name}"
    sayings = inspect.signature(latest.io.Schema).parameters
    return next((f"{name} in comfy_api.latest.io.Schema" for name in SCHEMA if name not in sayings), None)


def _sentence(this: str) -> str:
    return f"Modular Concepts needs ComfyUI {NEEDED} or newer, and {this}; update ComfyUI and start it again"
