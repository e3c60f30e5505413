"""The benchmark of regional sampling runs: every way on a narrow network, one JSON object in the last line, a plot."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from finding import PACK
from PIL import Image


@pytest.fixture(scope="module")
def measured(host, tmp_path_factory):
    """(summary on stdout, runs in the file, the plot) of the quick benchmark."""
    folder = tmp_path_factory.mktemp("bench")
    out, plot = folder / "regions.json", folder / "regions.png"
    command = [sys.executable, PACK / "bench" / "regions.py", "--quick", "--threads", "1"]
    command += ["--clock", "processor", "--out", out, "--plot", plot, "--host", host.path, "--host-python", host.python]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)  # noqa: S603 - our own command
    assert done.returncode == 0, done.stderr
    assert not out.with_suffix(".safetensors").exists()
    return json.loads(done.stdout.splitlines()[-1]), json.loads(out.read_text())["runs"], Image.open(plot)


def test_every_way_runs_and_every_ratio_is_there(measured):
    summary, runs, plot = measured
    # Core's hooks are left out where memory is short.
    ways = [("plain", 0), ("merged", 3), ("gated", 3), ("merged", 8), ("gated", 8), ("core_masks", 3)]
    assert {(run["way"], run["regions"]) for run in runs} >= set(ways)
    assert all(len(run["processor_seconds"]) == 1 and run["peak_gb"] > 0 for run in runs)
    for name in ("merged3", "merged8", "gated3", "gated8", "core_masks3", "memory_merged", "memory_gated"):
        assert 0 < summary[name] < 100, name
    assert summary.get("core_hooks3", 0) > 0 or summary["left_out"]
    assert set(summary["bars"]) == {"merged3", "gated3", "merged8", "gated8", "memory_merged", "memory_gated"}
    assert summary["threads"] == 1 and summary["clock"] == "processor" and summary["host"] and summary["machine"]
    assert plot.width > 400
