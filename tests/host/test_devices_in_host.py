"""Concepts from files and models that the host keeps on the CPU meet on another device: no tensor is misplaced.

Every path runs on a stand-in for a GPU, which refuses what a GPU refuses (`engine/stand_in_device.py`).  In a process
of its own: a torch that has once learned of such a device, and a host that was told it computes there, keep both.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def found(host, tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices")
    (folder / "plan.json").write_text(json.dumps({"families": ["toy", "sd3"], "places": ["elsewhere"]}))
    host.run("devices.py", folder)
    return load_file(folder / "found.safetensors"), json.loads((folder / "faults.json").read_text())


def test_no_path_meets_two_devices_in_one_operation(found):
    tensors, faults = found
    assert faults == {}
    ways = {title.split("|")[2] for title in tensors if "|toy|" in title}
    wanted = {"hooks", "fusion", "layer-wise words", "regions, found", "regions, two, gated", "training, resumed"}
    wanted |= {"offloaded as weights", "offloaded as activations", "sum as weights", "training, words"}
    assert wanted <= ways
    of_sd3 = {title.split("|")[2] for title in tensors if "|sd3|" in title}
    assert {"regions, two, gated", "offloaded as weights", "offloaded as activations", "training, orthogonal"} <= of_sd3
    assert all(torch.isfinite(tensor).all() and tensor.abs().max() > 0 for tensor in tensors.values())
