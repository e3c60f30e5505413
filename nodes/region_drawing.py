"""Regions drawn with the mouse."""

from __future__ import annotations

from comfy_api.latest import io

from ..modular_concepts.errors import AdapterError
from ..modular_concepts.regions.parsing import json_problem, regions_from_json
from ..modular_concepts.settings.drawing import CANVAS
from .types import CONCEPT_REGIONS
from .widgets import widget


class DrawRegions(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DrawRegions",
            display_name="Draw Regions",
            category="modular concepts/regions",
            description="Regions drawn with the mouse: drag a box where somebody should be and write who it is. The "
            "drawing is kept in the workflow as text that scripts can change.",
            search_aliases=["bounding box editor", "regional prompt", "paint regions", "canvas", "layout", "boxes"],
            inputs=[
                widget(CANVAS, id="width", tooltip="The picture's width in pixels, for its shape on this node"),
                widget(CANVAS, id="height", tooltip="Its height in pixels"),
                CONCEPT_REGIONS.Input("regions", optional=True, tooltip="Regions before these"),
                io.String.Input(
                    "json",
                    multiline=True,
                    default="[]",
                    socketless=True,
                    tooltip="What is drawn, in the form that Regions From JSON reads, boxes in fractions",
                ),
            ],
            outputs=[
                CONCEPT_REGIONS.Output(
                    "all_regions", display_name="CONCEPT_REGIONS", tooltip="Those before and these, in order"
                ),
                io.Int.Output("picture_width", display_name="width", tooltip="For an empty latent of that width"),
                io.Int.Output("picture_height", display_name="height", tooltip="For an empty latent of that height"),
            ],
        )

    @classmethod
    def validate_inputs(cls, json=None) -> bool | str:
        return (json is not None and json_problem(json)) or True

    @classmethod
    def execute(cls, width, height, json, regions=()) -> io.NodeOutput:
        drawn = (*regions, *regions_from_json(json))
        if not drawn:
            raise AdapterError("no region is drawn; drag a box on the Draw Regions node and write who is in it")
        return io.NodeOutput(drawn, width, height)
