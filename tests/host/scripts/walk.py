"""In the host: which functions of ours are handed a strength, from the slider to the weight that takes it."""

from __future__ import annotations

import asyncio
import json
import sys
from types import FrameType
from typing import Any

from in_host import FOLDER, PACK, pack_module, start

start()

import comfy.model_management
import folder_paths
import torch

torch.set_num_threads(1)
folder_paths.models_dir = str(FOLDER)

STRENGTH = 0.7310585786  # like no other number there
RECORDS = ("MergedSum", "LayerStack", "Inside", "MergedWeight", "Merge")


def carries(value: Any, depth: int = 0) -> bool:
    """Whether the strength is in a value.  A merged layer has it inside a factor, where it cannot be seen."""
    if isinstance(value, float):
        return abs(value - STRENGTH) < 1e-9
    if type(value).__name__ == "MergedLayer":
        return True
    if type(value).__name__ in RECORDS:
        value = vars(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return depth < 6 and any(carries(part, depth + 1) for part in parts)


class Walk:
    """file:function of each function of ours that is handed the strength, at its first call, in order."""

    def __init__(self):
        self.stays: list[str] = []

    def __enter__(self) -> Walk:
        sys.setprofile(self.look)
        return self

    def __exit__(self, *_error: object) -> None:
        sys.setprofile(None)

    def look(self, frame: FrameType, event: str, _value: object) -> None:
        code = frame.f_code
        name = code.co_qualname if sys.version_info >= (3, 11) else code.co_name
        if event != "call" or not code.co_filename.startswith(str(PACK)) or name.endswith(">"):
            return
        stay = f"{code.co_filename[len(str(PACK)) + 1 :]}:{name}"
        handed = [frame.f_locals.get(name) for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]]
        if stay not in self.stays and any(map(carries, handed)):
            self.stays.append(stay)


@torch.inference_mode()
def main() -> None:
    asyncio.run(pack_module("nodes").ModularConcepts().on_load())
    concepts, merging = pack_module("nodes.concepts"), pack_module("nodes.merging")
    model, clip, _ = pack_module("host.toy_base").load_toy_base(embeddings=[])
    with Walk() as walk:
        first = concepts.ConceptLoader.execute("tom.safetensors", STRENGTH)[0]
        second = concepts.ConceptLoader.execute("rex.safetensors", 1.0)[0]
        merged, merged_clip, _ = merging.ConceptMerge.execute(model, clip, {"a": first, "b": second}, "sum").args
        comfy.model_management.load_models_gpu([merged, merged_clip.patcher])
    (FOLDER / "walk.json").write_text(json.dumps(walk.stays))


main()
