"""The measurement for a GPU runs in small on the CPU, part by part, so that it works where a GPU is at hand."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from finding import PACK


@pytest.fixture(scope="module")
def report(host, tmp_path_factory):
    """The JSON object of a dry run, which is in the last line and in the file."""
    out = tmp_path_factory.mktemp("bench") / "gpu.json"
    command = [sys.executable, PACK / "bench" / "gpu.py", "--dry", "--host", host.path, "--python", host.python]
    done = subprocess.run(  # noqa: S603 - our own command
        [str(part) for part in [*command, "--out", out]], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed == json.loads(out.read_text())
    assert not list(out.parent.glob("*.log"))
    return printed


def test_every_part_ends_whole_and_everything_holds(report):
    assert report["broken"] == [] and report["dry"] and report["host"] == "ComfyUI"
    assert {part: found["ended"] for part, found in report["parts"].items()} == dict.fromkeys(
        ("engine", "host", "toy"), "whole"
    )


def test_correctness_is_checked_and_moves_something(report):
    found = report["parts"]["host"]["sd15 tiny, bfloat16, normal memory"]
    assert 0 < found["weights = formula"]["found"] <= 1e-2 and found["weights: effect"]["found"] >= 1e-2
    assert 0 < found["activations = formula"]["found"] <= 1e-2 and found["picture moved"]["found"] >= 1e-3
    assert {f"untouched after a fault, {way}" for way in ("weights", "activations", "gated")} < set(found)
    assert found["gated region moved"]["found"] >= 1e-3


def test_each_kind_of_figure_is_there(report):
    found = report["parts"]["host"]
    assert found["resume"]["apart"] <= 1e-6
    assert len(found["sd15 ours"]["losses"]) == 2 and found["sd15 ours"]["adapters"] == 40
    assert found["sd15 sum 1"]["core"]["changed"] > 0 and found["sd15 block 2"]["ours"]["changed"] > 0
    for way in ("plain 0", "merged 2", "gated 2"):
        assert found[f"sd15 {way} round 0"]["seconds"]
    assert found["sd15 compiled gated 2, apart"] < 1e-3
    assert report["parts"]["toy"]["training"]["steps"] >= 1


def test_a_killed_run_keeps_what_it_has(host, tmp_path):
    """And one whose time is up says which parts were not begun."""
    out = tmp_path / "gpu.json"
    command = [sys.executable, PACK / "bench" / "gpu.py", "--dry", "--seconds", "1", "--out", out]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)  # noqa: S603 - our own command
    assert done.returncode == 1
    parts = json.loads(out.read_text())["parts"]
    assert parts["toy"]["ended"].startswith("not begun") and "not begun" in done.stdout
