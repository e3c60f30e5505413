"""How the code is built: no function too long or with too many parameters, no name that says nothing.

What is not so yet stands in house.json, which may only shrink: who mends one takes it out.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACK = sorted(path for part in ("modular_concepts", "host", "nodes") for path in (ROOT / part).rglob("*.py"))
ALLOWED = json.loads((Path(__file__).parent / "house.json").read_text(encoding="utf-8"))
NAMELESS = ("own", "found", "said", "known", "kept", "given", "told", "asked")
LONGEST, MOST_PARAMETERS = 60, 7
# The host calls these with what the widgets hold, by name, and the last one with what its weight adapters take.
BY_THE_HOST = (
    "define_schema",
    "execute",
    "validate_inputs",
    "fingerprint_inputs",
    "check_lazy_status",
    "calculate_weight",
)

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(path: Path) -> Iterator[tuple[str, Function]]:
    """(file:name, function) of all functions in a file, at any depth."""
    place = path.relative_to(ROOT).as_posix()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, Function):
            yield f"{place}:{node.name}", node


def parameters(function: Function) -> int:
    every = function.args
    names = [argument.arg for argument in (*every.posonlyargs, *every.args, *every.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def test_no_function_is_longer_than_a_screen():
    long = {
        name: function.end_lineno - function.lineno + 1
        for path in PACK
        for name, function in functions(path)
        if function.end_lineno - function.lineno + 1 > LONGEST and function.name not in BY_THE_HOST
    }
    assert long == ALLOWED["long"]


def test_no_function_takes_more_than_a_hand_can_hold():
    many = {
        name: parameters(function)
        for path in PACK
        for name, function in functions(path)
        if parameters(function) > MOST_PARAMETERS and function.name not in BY_THE_HOST
    }
    assert many == ALLOWED["parameters"]


def test_locals_are_called_what_they_are():
    counts: Counter[str] = Counter()
    for path in PACK:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in NAMELESS:
                counts[path.relative_to(ROOT).as_posix()] += 1
    more = {name: count for name, count in counts.items() if count > ALLOWED["nameless"].get(name, 0)}
    assert not more, "call it what it is: a row, an adapter, a weight"
    fewer = {name: count for name, count in ALLOWED["nameless"].items() if count > counts[name]}
    assert not fewer, "take these out of house.json, which may only shrink"


# Each room may import those behind it.
HOST_ROOMS = (
    "regions",
    "training",
    "merging",
    "files",
    "model",
    "text",
    "layers",
    "families",
    "toy_base",
    "called",
    "messages",
)


def test_the_rooms_of_the_host_import_one_way():
    upwards = []
    for path in sorted((ROOT / "host").rglob("*.py")):
        place = path.relative_to(ROOT).with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                target = (*place[: len(place) - node.level], *(node.module or "").split("."))
                rooms = place[1], target[1] if target[0] == "host" and len(target) > 1 else ""
                if all(room in HOST_ROOMS for room in rooms) and HOST_ROOMS.index(rooms[0]) > HOST_ROOMS.index(
                    rooms[1]
                ):
                    upwards.append(f"{'.'.join(place)} -> {'.'.join(target)}")
    assert upwards == []


def test_every_stay_of_the_walks_is_there():
    """file:function, as docs/architecture.md draws the walks of a strength, a mask and a picture."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    stays = re.findall(r"^([\w/]+\.py):([\w.]+)", page, re.MULTILINE)
    assert len(stays) > 40
    for path, name in stays:
        *classes, function = name.split(".")
        within: ast.AST = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        for part in classes:
            within = next(
                node for node in ast.iter_child_nodes(within) if isinstance(node, ast.ClassDef) and node.name == part
            )
        names = [node.name for node in ast.iter_child_nodes(within) if isinstance(node, Function)]
        assert function in names, f"{path} has no {name}"


def test_one_version():
    import tomllib

    import modular_concepts

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == modular_concepts.__version__
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["long", "parameters", "nameless"])
def test_the_list_of_exceptions_is_in_order(kind):
    assert list(ALLOWED[kind]) == sorted(ALLOWED[kind])
