"""Concepts of one projection of a fused layer act in the real host as on its whole weight."""

from __future__ import annotations

import json


def test_projections_of_a_fused_layer_are_merged_hooked_and_gated(host, tmp_path):
    host.run("sites.py", tmp_path)
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["effect"] > 1e-2 and facts["half"] > 1e-2
    for way in ("whole", "activations", "gated", "both"):
        assert facts[way] < 1e-5, way
    assert facts["restored"]
    assert "wrong, unet.joint_blocks.0.x_block.attn.qkv.q" in facts["wrong"]
