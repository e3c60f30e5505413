"""Regions as text, for scripts and other packs."""

from __future__ import annotations

from comfy_api.latest import io

from ..host.messages import show_text
from ..modular_concepts.regions.parsing import json_problem, regions_from_json, unnamed_masks
from .types import CONCEPT_REGIONS

EXAMPLE = '[{"prompt": "a <tom> on the beach", "box": [0, 0, 0.5, 1]}]'


class RegionsFromJSON(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RegionsFromJSON",
            display_name="Regions From JSON",
            category="modular concepts/regions",
            description="Regions written as a JSON list, so that a script or another pack can say how many there are "
            "and where. The help page lists what an entry can hold.",
            search_aliases=["regions json", "regional prompt", "bounding boxes", "layout", "api regions"],
            inputs=[
                io.String.Input(
                    "json",
                    multiline=True,
                    default=EXAMPLE,
                    placeholder=EXAMPLE,
                    tooltip="A list of objects with prompt and box (left, top, right, bottom), and whatever else a "
                    "Concept Region has",
                ),
                io.Mask.Input("masks", optional=True, tooltip='What entries name by number: "mask": 0 is the first'),
                CONCEPT_REGIONS.Input("regions", optional=True, tooltip="Regions before these"),
            ],
            outputs=[
                CONCEPT_REGIONS.Output(
                    "all_regions", display_name="CONCEPT_REGIONS", tooltip="Those before and these, in order"
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, json=None) -> bool | str:
        return (json is not None and json_problem(json)) or True

    @classmethod
    def execute(cls, json, masks=None, regions=()) -> io.NodeOutput:
        described = regions_from_json(json, masks)
        if masks is not None and (idle := unnamed_masks(json, masks)):
            show_text(f"no entry names mask {', '.join(map(str, idle))}, counted from 0, so that changes nothing")
        return io.NodeOutput((*regions, *described))
