"""What concepts do to each other, as a picture and in numbers."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..host.merging.fusion import kept_moments
from ..host.messages import show_text
from ..modular_concepts.crosstalk.heatmap import draw_report
from ..modular_concepts.crosstalk.report import explained
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
            "part of the model: 0 not at all, 1 the most there can be. Read from their weights, and where moments of "
            "Fuse Concepts lie beside the files, also from what each one's layers read.",
            search_aliases=["lora conflict", "lora analysis", "interference", "orthogonality", "compare loras"],
            is_output_node=True,
            inputs=[
                many_concepts_input("A concept or a stack; strengths do not matter here"),
                io.Boolean.Input(
                    "signs",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Count also the weights that two concepts pull in opposite directions; takes longer",
                ),
            ],
            outputs=[
                io.Image.Output("heat_map", display_name="IMAGE", tooltip="Heat map of the pairs and of the layers"),
                io.String.Output("text", display_name="text", tooltip="The same in words and numbers"),
                io.String.Output("json", display_name="json", tooltip="All figures, layer by layer, for scripts"),
            ],
        )

    @classmethod
    def execute(cls, concepts: dict, signs: bool = False) -> io.NodeOutput:
        concepts_alone, _ = stacks.parts(stacks.joined(concepts))
        explanation = explained(concepts_alone, [kept_moments(concept) for concept in concepts_alone], signs)
        picture, text = draw_report(explanation.names, explanation.table), explanation.text()
        show_text(text)
        shown = {**ui.PreviewImage(picture, cls=cls).as_dict(), **ui.PreviewText(text).as_dict()}
        return io.NodeOutput(picture, text, explanation.to_json(), ui=shown)
