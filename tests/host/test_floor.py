"""A host that is too old reads in one sentence which ComfyUI is needed and which is there; nothing is registered.

In a process of its own: the host's loader imports the pack anew for each case, among modules that are replaced.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

PACK = Path(__file__).resolve().parents[2]
THERE = {
    "0.8.0": "this is ComfyUI 0.8.0",
    "0.17.9": "this is ComfyUI 0.17.9",
    "v0.3.10-5-gabcdef": "this is ComfyUI v0.3.10-5-gabcdef",
    "no version and no comfy_api": "does not tell its version, has no comfy_api.latest",
    "no version and an older schema": "does not tell its version, has no search_aliases in comfy_api.latest.io.Schema",
    "a version that is no number": "does not tell its version, has no search_aliases",
    "a newer version without comfy_api": "calls itself 0.40.0, has no comfy_api.latest",
    "a newer version with an older schema": "calls itself 0.40.0, has no search_aliases in comfy_api.latest.io.Schema",
    "a newer version without a type": "calls itself 0.40.0, has no comfy_api.latest.io.Autogrow",
}


@pytest.fixture(scope="module")
def about(host, tmp_path_factory):
    folder = tmp_path_factory.mktemp("floor")
    host.run("floor.py", folder)
    return json.loads((folder / "floor.json").read_text())


@pytest.mark.parametrize("case", THERE)
def test_an_older_host_reads_what_is_needed_and_what_is_there(about, case):
    found = about["cases"][case]
    assert not found["succeeded"] and found["nodes"] == []
    last = found["said"][-1]
    sentence = last[last.index("Modular Concepts needs") :]
    assert sentence.startswith("Modular Concepts needs ComfyUI 0.18.1 or newer, and ") and THERE[case] in sentence
    assert sentence.endswith("; update ComfyUI and start it again") and "\n" not in sentence
    assert found["pages"] == [], "scripts of the page without nodes"


def test_this_host_registers_every_node_and_the_pages(about):
    for case in ("as it is", "no version and everything there"):
        found = about["cases"][case]
        assert found["said"] == [] and found["succeeded"]
        assert len(found["nodes"]) == 32 and len(found["pages"]) == 1


def test_what_is_asked_of_the_interface_is_what_the_nodes_take():
    from host.floor import INTERFACE, SCHEMA

    taken, said = set(), set()
    for path in (PACK / "nodes").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("io", "ui"):
                taken.add(f"{node.value.id}.{node.attr}")
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "io.Schema":
                said |= {keyword.arg for keyword in node.keywords}
    assert taken | {"ComfyExtension"} == set(INTERFACE) and said == set(SCHEMA)


@pytest.mark.parametrize("version", ["0.18.1", "0.18.1.2", "0.18.2", "0.19.0", "0.100.0", "v1.0", "1"])
def test_newer_versions_pass(version, monkeypatch):
    from host import floor

    monkeypatch.setitem(sys.modules, "comfyui_version", SimpleNamespace(__version__=version))
    floor.check_host()


@pytest.mark.parametrize("version", ["0.18.0", "0.9.99", "0.18", "0", "v0.18.0rc3"])
def test_older_versions_do_not(version, monkeypatch):
    from host import floor

    monkeypatch.setitem(sys.modules, "comfyui_version", SimpleNamespace(__version__=version))
    with pytest.raises(ImportError, match=re.escape(version)):
        floor.check_host()


def test_an_older_python_reads_it_too(monkeypatch):
    from host import floor

    for path in (PACK / "__init__.py", PACK / "host" / "__init__.py", PACK / "host" / "floor.py"):
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))
    monkeypatch.setattr(sys, "version_info", (3, 9, 18, "final", 0))
    with pytest.raises(ImportError, match=r"needs Python 3\.10 or newer, and this ComfyUI runs on Python 3\.9\.18"):
        floor.check_host()


def test_without_a_host_the_pack_can_be_imported(tmp_path):
    """Tools that read packs, and these tests, import it where there is no ComfyUI."""
    command = [sys.executable, "-c", "import importlib; importlib.import_module('pack')"]
    (tmp_path / "pack").symlink_to(PACK, target_is_directory=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)  # noqa: S603 - our own command
    assert done.returncode == 0, done.stderr
