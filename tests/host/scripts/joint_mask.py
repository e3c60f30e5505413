"""In the host: the mask of regions in a joint attention, asked for in several precisions and on another device."""

from __future__ import annotations

import json
from types import SimpleNamespace

from in_host import FOLDER, pack_module, start

start()

import torch

joint, listening = pack_module("host.regions.joint_attention"), pack_module("host.regions.cross_attention")
geometry, places = (pack_module("modular_concepts.regions.geometry"), pack_module("modular_concepts.regions.shares"))

TEXT, SIDE, WIDTH = 5, 8, 16
context = torch.randn(2, TEXT, WIDTH, generator=torch.Generator().manual_seed(0))
regions = places.Places([geometry.Region("left", box=(0.0, 0.0, 0.5, 1.0))], scale=8)
heard = joint.JointListening(regions, [context[:1]], [context[1:]])
options = {"cond_or_uncond": [0, 1], listening.MOMENT: joint.Moment((SIDE, SIDE))}
network = SimpleNamespace(patch_size=2)
longer, options, _ = heard.prepared(network, context, options)
tokens = longer.shape[1] + (SIDE // 2) ** 2
found = {}
for device, dtype in (("cpu", "float32"), ("cpu", "bfloat16"), ("meta", "float16"), ("cpu", "float32")):
    query = torch.zeros(2, tokens, WIDTH, device=device, dtype=getattr(torch, dtype))
    given = options[joint.OVERRIDE](lambda *_, mask: mask, query, query, query)
    apart = None if device == "meta" else int(torch.isinf(given).sum())
    found[f"{device} {dtype}"] = [str(given.device), str(given.dtype), list(given.shape), apart]
override = options[joint.OVERRIDE]
split = torch.zeros(2, 4, tokens, WIDTH // 4)
found["heads split"] = list(override(lambda *_, mask, **_more: mask, split, split, split, skip_reshape=True).shape)
picture = torch.zeros(2, (SIDE // 2) ** 2, WIDTH)
found["picture alone"] = override(lambda *_, **more: sorted(more), picture, picture, picture)
strange = torch.zeros(2, tokens + 1, WIDTH)
try:
    override(lambda *_, **_more: None, strange, strange, strange)
except pack_module("modular_concepts.errors").AdapterError as error:
    found["strange"] = str(error)
(FOLDER / "found.json").write_text(json.dumps(found))
