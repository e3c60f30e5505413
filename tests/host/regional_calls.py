"""In the host: the regional nodes as a workflow calls them, with any sampler, from widgets, JSON, boxes and masks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from modular_concepts_pack.host.regions import sampling as regional_sampling
from modular_concepts_pack.host.toy_base import load_toy_base
from modular_concepts_pack.modular_concepts.files.concept import load_concept as load
from modular_concepts_pack.modular_concepts.regions.geometry import Region
from modular_concepts_pack.nodes import concepts as texts
from modular_concepts_pack.nodes import regions as node
from modular_concepts_pack.nodes import stacking
from modular_concepts_pack.nodes.automatic import FindRegions as finder
from modular_concepts_pack.nodes.region_drawing import DrawRegions as drawing
from modular_concepts_pack.nodes.region_json import RegionsFromJSON as from_json

import nodes

PROMPTS = "a man and a dog in the snow", "a car"
LEFT, RIGHT = "a <tom> and a dog in the snow", "a man and a <rex> in the snow"


@torch.inference_mode()
def called(folder: Path, replaced: pytest.MonkeyPatch) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, facts); the concepts tom and rex lie in `folder`."""
    model, clip, _ = load_toy_base()
    concepts = {f"concept{index}": load(folder / f"{name}.safetensors") for index, name in enumerate(("tom", "rex"))}
    stack = stacking.ConceptStack.execute(concepts)[0]
    (noise,) = nodes.EmptyLatentImage().generate(64, 32)
    found, facts = {}, {"refused": {}, "stack": [[concept.name, strength] for concept, strength in stack]}

    def region(prompt, left, right, units="fractions", **more):
        bottom = 1.0 if units == "fractions" else 32.0
        return node.ConceptRegion.execute(prompt, units, left, 0.0, right, bottom, 0.0, 1.0, **more)[0]

    chain = region(RIGHT, 0.5, 1.0, concepts="rex", regions=region(LEFT, 0.0, 0.5))
    entries = [{"prompt": LEFT, "box": [0, 0, 0.5, 1]}, {"prompt": RIGHT, "box": [0.5, 0, 1, 1], "concepts": ["rex"]}]
    written = from_json.execute(json.dumps(entries))[0]
    facts["same"] = written == chain
    facts["drawn"] = list(drawing.execute(64, 32, json.dumps(entries[1:]), chain[:1]).args) == [chain, 64, 32]
    facts["json problem"] = str(from_json.validate_inputs(json='[{"prompt": 3, "box": [0, 0, 1, 1]}]'))
    facts["json fine"] = from_json.validate_inputs(json=json.dumps(entries))
    facts["window problem"] = str(
        node.ConceptRegion.validate_inputs("a", "fractions", 0.0, 0.0, 1.0, 1.0, start=0.6, end=0.4)
    )
    box = {"x": 32, "y": 0, "width": 32, "height": 32}
    (boxed,) = region(RIGHT, 0.0, 1.0, concepts="rex", bounding_box=[box], start=0.1, end=0.9, priority=3)
    facts["boxed"] = [boxed.box, boxed.pixels, boxed.concepts, boxed.start, boxed.end, boxed.priority]
    (nobody,) = region(LEFT, 0.0, 1.0, concepts="-")
    facts["nobody"] = list(nobody.concepts)

    def sampled(regions, mode, **more):
        return node.RegionalConceptSampler.execute(
            model, clip, *PROMPTS, regions, noise, "euler", "normal", 3, 3.0, 5, 1.0, concepts=stack, mode=mode, **more
        )[0]["samples"]

    for mode in node.MODES:
        found[mode] = sampled(chain, mode)
        own = node.RegionalConcepts.execute(model, clip, chain, *PROMPTS, mode, "average", stack)
        parts = nodes.KSampler().sample(own[0], 5, 3, 3.0, "euler", "normal", own[1], own[2], noise)
        found[f"{mode} in parts"] = parts[0]["samples"]
    found["pixels"] = sampled((*region(LEFT, 0.0, 32.0, "pixels"), boxed_like(boxed)), "gated")
    whole = region(LEFT, 0.0, 1.0, regions=chain, priority=-1)
    found["below"], found["shared"] = sampled(whole, "gated", overlap="priority"), sampled(whole, "gated")
    preview = node.RegionPreview.execute(chain, 64, 32, "average")
    found["preview"] = preview[0]
    facts["shown"] = list(preview.ui.as_dict() if hasattr(preview.ui, "as_dict") else preview.ui)

    lost = region(LEFT, 0.0, 1.0, "automatic", regions=region(RIGHT, 0.0, 1.0, "automatic"))
    settings = "a <tom> and a <rex> in the snow", "a car", noise, "euler", "normal", 5, 3.0, 5, 1.0
    placed, found["masks"] = finder.execute(model, clip, stack, lost, *settings, "average").args
    facts["placed"] = [not one.unplaced for one in placed]
    found["automatic"] = sampled(lost, "gated")
    facts["automatic problem"] = node.ConceptRegion.validate_inputs("a", "automatic", 0.0, 0.0, 99.0, 1.0)

    facts["said"] = {}
    for title, prompt, own in (
        ("known", f"{LEFT}, a <rex>", stack),
        ("unknown", "a <bob> and a <rex>", stack),
        ("bare", LEFT, None),
    ):
        spoken = facts["said"][title] = []
        replaced.setattr(regional_sampling, "show_text", spoken.append)
        regional = region(prompt, 0.0, 1.0)
        node.RegionalConcepts.execute(model, clip, regional, *PROMPTS, "gated", "average", own)
    facts["said"]["prompt"] = spoken = []
    replaced.setattr(texts, "show_text", spoken.append)
    texts.ConceptTextEncode.execute(clip, LEFT, stack)
    texts.ConceptTextEncode.execute(clip, "a <bob>", stack)

    for title, attempt in {
        "drawn": lambda: drawing.execute(64, 32, "[]"),
        "lost": lambda: node.RegionalConcepts.execute(model, clip, lost, *PROMPTS, "gated", "average", stack),
        "unknown": lambda: sampled(region(LEFT, 0.0, 1.0, concepts="nobody"), "gated"),
        "outside": lambda: node.RegionPreview.execute(region(LEFT, 0.0, 99.0, "pixels"), 64, 32, "average"),
        "none": lambda: node.RegionPreview.execute((), 64, 32, "average"),
        "mode": lambda: sampled(chain, "melted"),
        "boxes": lambda: region(LEFT, 0.0, 1.0, bounding_box=[box, box]),
    }.items():
        try:
            attempt()
            facts["refused"][title] = ""
        except ValueError as error:
            facts["refused"][title] = f"{type(error).__name__}: {error}"
    return found, facts


def boxed_like(region):
    """The same place for the whole of the sampling."""
    return Region(region.prompt, region.box, pixels=True, concepts=region.concepts)
