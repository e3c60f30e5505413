"""What concepts do to each other, as a picture and in numbers."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..host.messages import show_text
from ..modular_concepts.explain import explained
from ..modular_concepts.heatmap import draw_report
from . import stacks
from .types import many_concepts_input


class CrosstalkReport(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CrosstalkReport",
            display_name="Crosstalk Report",
            category="modular concepts",
            description="How much concepts step on each other when they are merged, for every pair and every "
            "part of the model: 0 not at all, 1 the most there can be. Read from their weights alone.",
            search_aliases=["lora conflict", "lora analysis", "interference", "orthogonality", "compare loras"],
            is_output_node=True,
            inputs=[many_concepts_input("A concept or a stack; strengths do not matter here")],
            outputs=[
                io.Image.Output("heat_map", display_name="IMAGE", tooltip="Heat map of the pairs and of the layers"),
                io.String.Output("text", display_name="text", tooltip="The same in words and numbers"),
                io.String.Output("json", display_name="json", tooltip="All figures, layer by layer, for scripts"),
            ],
        )

    @classmethod
    def execute(cls, concepts: dict) -> io.NodeOutput:
        found = explained(stacks.parts(stacks.joined(concepts))[0])
        picture, text = draw_report(found.names, found.table), found.text()
        show_text(text)
        shown = {**ui.PreviewImage(picture, cls=cls).as_dict(), **ui.PreviewText(text).as_dict()}
        return io.NodeOutput(picture, text, found.to_json(), ui=shown)
