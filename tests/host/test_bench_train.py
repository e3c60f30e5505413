"""The training benchmark runs: every trainer on a narrow network, the same layers, one JSON object in the last line."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from finding import PACK


@pytest.fixture(scope="module")
def measured(host, tmp_path_factory):
    """(summary on stdout, runs in the file) of the quick benchmark."""
    out = tmp_path_factory.mktemp("bench") / "train.json"
    command = [sys.executable, PACK / "bench" / "train.py", "--quick", "--threads", "1", "--out", out]
    command += ["--host", host.path, "--host-python", host.python]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)  # noqa: S603 - our own command
    assert done.returncode == 0, done.stderr
    assert not out.with_suffix(".safetensors").exists()
    return json.loads(done.stdout.splitlines()[-1]), json.loads(out.read_text())["runs"]


def test_every_trainer_runs_and_every_ratio_is_there(measured):
    summary, runs = measured
    assert summary["failed"] == [] and len(runs) == 10
    for name in ("step_vs_core", "memory_vs_core", "step_vs_peft", "overhead_vs_frozen", "step_vs_core_every_layer"):
        assert 0 < summary[name] < 100
    assert summary["torch"]["host"] and summary["torch"]["headless"] and summary["host"] and summary["machine"]
    for one in runs.values():
        assert one["threads"] == 1 and len(one["seconds"]) == 2 and one["peak_gb"] > 0
        assert len(one["losses"]) == 3 and all(math.isfinite(loss) for loss in one["losses"])


def test_what_is_compared_trains_the_same_layers(measured):
    trainers = measured[0]["sizes"]["quick"]["trainers"]
    ours, every, plain, core, bypass, peft, lora = (
        trainers[name]
        for name in ("ours", "ours every", "ours every as lora", "core", "core_bypass", "peft", "ours_lora")
    )
    assert ours["adapters"] == peft["adapters"] == lora["adapters"] == 40
    assert every["adapters"] == plain["adapters"] == core["adapters"] == bypass["adapters"] == 69
    assert lora["trained_numbers"] == peft["trained_numbers"] > ours["trained_numbers"]
    # The rest are core's biases, norms and one alpha for each layer.
    assert 0.8 * core["trained_numbers"] < plain["trained_numbers"] < core["trained_numbers"]
