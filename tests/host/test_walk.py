"""A strength's way from the slider to the weight is short, and drawn in docs/architecture.md as it is."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import comfy.model_management
import torch
from made_concepts import made_concept
from modular_concepts_pack.host.toy_base import load_toy_base
from modular_concepts_pack.nodes import concepts, merging

from modular_concepts.files.concept import save_concept

PACK = Path(__file__).resolve().parents[2]
PAGE = (PACK / "docs" / "architecture.md").read_text(encoding="utf-8")
MOST_STAYS = 15
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
def walked() -> list[str]:
    """The stays of a strength, from the loader's slider to the weights of a merge of two."""
    model, clip, _ = load_toy_base(embeddings=[])
    with Walk() as walk:
        first = concepts.ConceptLoader.execute("tom.safetensors", STRENGTH)[0]
        second = concepts.ConceptLoader.execute("rex.safetensors", 1.0)[0]
        merged, merged_clip, _ = merging.ConceptMerge.execute(model, clip, {"a": first, "b": second}, "sum").args
        comfy.model_management.load_models_gpu([merged, merged_clip.patcher])
    return walk.stays


def listed(title: str) -> list[str]:
    """file:function, one for each stay, of the first block of code behind a heading of the page."""
    block = PAGE.split(f"### {title}\n")[1].split("```")[1]
    return re.findall(r"[\w/]+\.py:[\w.]+", block)


def test_a_strength_comes_to_its_weight_as_the_page_says(folder):
    for slot, name in enumerate(("tom", "rex")):
        save_concept(made_concept(name, slot=slot), folder / "concepts" / f"{name}.safetensors")
    stays = walked()
    way, beside = listed("A strength"), listed("Who looks at it on the way")
    assert len(way) <= MOST_STAYS
    assert [stay for stay in stays if stay in way] == way
    assert {stay for stay in stays if stay not in way} == set(beside)
