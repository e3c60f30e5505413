"""What can be said of the nodes without a host: ids are unique, each has a help page that says its inputs."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

PACK = Path(__file__).resolve().parents[2]
NAMED = re.compile(r'node_id="(\w+)"')
INPUT = re.compile(r"\b(?:\w+)\.Input\(\s*\"(\w+)\"")
# An input that is made of a setting's declaration, by its constant in the module that the file calls `declared`.
WIDGET = re.compile(r"\b(?:widget|_option|_choice|_number)\(\s*declared\.(\w+)(?:,\s*id=\"(\w+)\")?")
MODULE = re.compile(r"modular_concepts\.settings import (\w+) as declared")
SOURCES = {path: path.read_text(encoding="utf-8") for path in sorted((PACK / "nodes").glob("*.py"))}
IDS = [node for source in SOURCES.values() for node in NAMED.findall(source)]


def test_every_node_has_an_id_of_its_own():
    assert len(IDS) == len(set(IDS)) >= 11


def test_help_pages_are_those_of_the_nodes():
    assert sorted(path.stem for path in (PACK / "js" / "docs").glob("*.md")) == sorted(IDS)


@pytest.mark.parametrize("node", IDS)
def test_a_help_page_begins_with_a_title_and_names_the_inputs(node):
    page = (PACK / "js" / "docs" / f"{node}.md").read_text(encoding="utf-8")
    assert page.startswith("# ") and len(page) > 200
    for source in SOURCES.values():
        for piece in re.split(r"\nclass ", source)[1:]:
            if f'node_id="{node}"' in piece:
                names = [*INPUT.findall(piece), *declared_in(source, piece)]
                missing = [name for name in names if not re.search(rf"\b{name}\b", page)]
                assert not missing, f"{node}.md says nothing of {missing}"


def declared_in(source: str, piece: str) -> list[str]:
    """What the inputs are called that a part of a file makes of declarations."""
    for module in MODULE.findall(source):
        settings = importlib.import_module(f"modular_concepts.settings.{module}")
        return [id or getattr(settings, name).widget_name for name, id in WIDGET.findall(piece)]
    return []


def test_registration_loads_nothing_and_is_short():
    source = (PACK / "__init__.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    assert len(source.splitlines()) < 40
    assert not [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets}
    assert "WEB_DIRECTORY" in names
    assert any(isinstance(node, ast.AsyncFunctionDef) and node.name == "comfy_entrypoint" for node in tree.body)


@pytest.mark.parametrize("source", SOURCES.values(), ids=[path.name for path in SOURCES])
def test_nodes_touch_the_host_only_where_they_may(source):
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            imported.add(node.module)
    allowed = {
        "__future__",
        "comfy_api.latest",
        "comfy.samplers",
        "folder_paths",
        "math",
        "collections",
        "collections.abc",
        "torch",
    }
    assert imported - allowed <= {"dataclasses", "enum", "typing", "pathlib", "functools"}
