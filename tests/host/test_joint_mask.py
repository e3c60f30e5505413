"""The mask of regions in a joint attention lies where the attention computes, and in its precision."""

from __future__ import annotations

import json


def test_mask_follows_the_query_in_device_and_dtype(host, tmp_path):
    host.run("joint_mask.py", tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    tokens = 5 + 5 + 16
    assert found.pop("heads split")[-2:] == [tokens, tokens]
    assert found.pop("picture alone") == []
    assert "joins 27 tokens, where texts and picture have 26" in found.pop("strange")
    assert set(found) == {"cpu float32", "cpu bfloat16", "meta float16"}
    for asked, (device, dtype, shape, _) in found.items():
        assert asked == f"{device} {dtype.removeprefix('torch.')}"
        assert shape[-2:] == [tokens, tokens]
    # Something is kept apart: two texts from each other, and each half of the picture from one of them.
    apart = {numbers for *_, numbers in found.values()} - {None}
    assert len(apart) == 1 and apart.pop() >= 2 * 5 * 5 + 16 * 5
