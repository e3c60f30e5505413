"""Nothing sneaky: the pack runs no code out of data, starts no program, and importing it leaves no trace."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACK = sorted(
    path
    for path in [
        ROOT / "__init__.py",
        *(ROOT / "modular_concepts").rglob("*.py"),
        *ROOT.glob("nodes/**/*.py"),
        *ROOT.glob("host/**/*.py"),
    ]
    if "__pycache__" not in path.parts
)
SCRIPTS = sorted((ROOT / "js").rglob("*.js"))
ENGINE = [path for path in PACK if path.is_relative_to(ROOT / "modular_concepts")]

BUILTINS = {"eval", "exec", "compile", "__import__"}
MODULES = {
    *("builtins", "pickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"),
    *("torch.load", "torch.serialization", "torch.hub", "torch.jit.load", "torch.package"),
    *("subprocess", "ctypes", "pty", "os.system", "os.popen", "os.fork", "torch.utils.cpp_extension"),
    *(f"os.{name}" for name in dir(os) if name.startswith(("exec", "spawn", "posix_spawn"))),
    *("socket", "http", "urllib.request", "ftplib", "smtplib", "requests", "httpx", "urllib3", "aiohttp"),
}
IN_SCRIPTS = re.compile(
    r"\beval\b|\bFunction\s*\(|(inner|outer)HTML|insertAdjacentHTML|document\.write|srcdoc|set(Timeout|Interval)\(\s*[\"'`]"
    r"|\bfetch\s*\(|XMLHttpRequest|WebSocket|sendBeacon|\bimport\s*\(|https?:"
)
HOST = {"comfy", "comfy_api", "comfy_execution", "folder_paths", "nodes", "server", "execution"}
HEAVY = {"diffusers", "transformers", "matplotlib", "PIL"}


def imported(tree: ast.AST) -> dict[str, str]:
    """Local name -> dotted name of every absolute import, at any depth."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name] = alias.name
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def dotted(node: ast.AST, names: dict[str, str]) -> str:
    """What an expression names through the imports; "" for what is local."""
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value, names)
        return owner and f"{owner}.{node.attr}"
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id if node.id in BUILTINS else "")
    return ""


def forbidden(name: str) -> bool:
    parts = name.split(".")
    return name in BUILTINS or any(".".join(parts[:length]) in MODULES for length in range(1, len(parts) + 1))


def reads_pickles(node: ast.AST) -> bool:
    return isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False"


def sneaky(source: str) -> list[str]:
    """Every forbidden thing that the source imports, calls or merely names; also arrays read with pickles."""
    tree = ast.parse(source)
    names = imported(tree)
    used = {*names.values(), *(dotted(node, names) for node in ast.walk(tree))}
    pickles = [ast.unparse(node) for node in ast.walk(tree) if reads_pickles(node)]
    return sorted(filter(forbidden, used)) + pickles


@pytest.mark.parametrize("path", PACK, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_pack_runs_no_data_and_no_programs(path):
    assert sneaky(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "run = exec",
        "import builtins",
        "def f():\n    import pickle",
        "from pickle import loads as read",
        "import torch as t\nt.load('x')",
        "from torch import load",
        "import torch.hub",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import os\nos.system('ls')",
        "from os import execv",
        "import subprocess",
        "import socket",
        "from urllib.request import urlopen",
    ],
)
def test_the_scan_sees_what_is_hidden(source):
    assert sneaky(source)


def test_the_scan_lets_honest_code_pass():
    assert not sneaky(
        "import re, os, torch\nfrom safetensors.torch import load\nmodel.eval()\nre.compile('x')\n"
        "code = requests = 1\nos.replace('a', 'b')\nself.load('x')\nnp.load('x', allow_pickle=False)\n"
    )


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_of_the_page_make_no_code_or_markup_of_data_and_call_nobody(path):
    assert not IN_SCRIPTS.findall(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source", ["new Function('x')", "a.innerHTML = b", "eval(x)", "setTimeout('x', 1)", "fetch(u)"]
)
def test_the_scan_of_scripts_sees_it(source):
    assert IN_SCRIPTS.search(source)


@pytest.mark.parametrize("path", ENGINE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_engine_knows_no_host_and_imports_itself_relatively(path):
    """By its full name the engine could not be imported inside a host, where the pack has another name."""
    roots = {name.split(".")[0] for name in imported(ast.parse(path.read_text(encoding="utf-8"))).values()}
    assert not roots & (HOST | {"modular_concepts"})


IMPORT_EVERYTHING = """
import json, os, sys

written, calls = [], []

def watch(event, arguments):
    if event.startswith(("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork")):
        calls.append(event)
        raise RuntimeError(event)
    if event == "open":
        path, mode, flags = arguments
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC)
        if writes and "__pycache__" not in str(path):
            written.append(str(path))
    elif event in ("os.mkdir", "os.rename", "os.remove") and "__pycache__" not in str(arguments[0]):
        written.append(f"{event} {arguments[0]}")

import torch, numpy, safetensors.torch, einops  # theirs is not ours to answer for

before = torch.get_rng_state()
sys.addaudithook(watch)

import importlib, pkgutil
import modular_concepts

names = [m.name for m in pkgutil.walk_packages(modular_concepts.__path__, "modular_concepts.")]
for name in names:
    importlib.import_module(name)

print(json.dumps({
    "modules": names,
    "calls": calls,
    "written": written,
    "cuda": torch.cuda.is_initialized(),
    "random": torch.equal(before, torch.get_rng_state()),
    "loaded": sorted({name.split(".")[0] for name in sys.modules}),
}))
"""


def in_a_new_process(script: str, folder: Path) -> dict:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(folder), "TMPDIR": str(folder)}
    command = [sys.executable, "-B", "-c", script]  # -B: a .pyc is not the engine's doing
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)  # noqa: S603 - our own command
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_the_engine_leaves_no_trace(tmp_path):
    """Every module, sockets and programs blocked: no file, no CUDA, no draw from the global generator."""
    seen = in_a_new_process(IMPORT_EVERYTHING, tmp_path)
    assert {"modular_concepts.errors", "modular_concepts.training.loop"} <= set(seen["modules"])
    assert seen["calls"] == [] and seen["written"] == [] and list(tmp_path.iterdir()) == []
    assert not seen["cuda"] and seen["random"]
    assert not set(seen["loaded"]) & (HEAVY | HOST)


def test_the_host_can_register_the_pack_without_loading_it(tmp_path):
    """As the host does it: the root file by its path, under whatever name the folder has."""
    script = f"""
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("a folder-name", {str(ROOT / "__init__.py")!r},
                                              submodule_search_locations=[{str(ROOT)!r}])
module = sys.modules["a folder-name"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(json.dumps({{"registers": hasattr(module, "NODE_CLASS_MAPPINGS") or hasattr(module, "comfy_entrypoint"),
                   "loaded": sorted(sys.modules)}}))
"""
    seen = in_a_new_process(script, tmp_path)
    assert seen["registers"]
    assert not {"torch", "modular_concepts"} & set(seen["loaded"])
