"""Several concepts in one model: sums and blocks."""

from __future__ import annotations

from comfy_api.latest import io

from ..host.patching import merged
from . import stacks
from .types import CONCEPT_STACK, many_concepts_input

OUTPUTS = (
    ("model", io.Model, "The model with the concepts in it; what you loaded stays as it is"),
    ("clip", io.Clip, "The text encoder with the concepts in it; it knows their trigger words"),
    ("stack", CONCEPT_STACK, "The concepts and strengths that are in the model, for reports and for saving"),
)


def _outputs() -> list:
    return [kind.Output(name, display_name=kind.io_type, tooltip=tooltip) for name, kind, tooltip in OUTPUTS]


class ConceptMerge(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConceptMerge",
            display_name="Merge Concepts",
            category="modular concepts",
            description="Adds any number of concepts to a model at once, exactly: W = W0 + the sum of strength x "
            "concept, one patch for each layer, in milliseconds. Concepts trained in different slots of one basis do "
            "not disturb each other.",
            search_aliases=["lora merge", "merge loras", "lora stack", "multi lora", "combine loras", "power lora"],
            inputs=[
                io.Model.Input("model", tooltip="The base that the concepts were trained on"),
                io.Clip.Input("clip", tooltip="Its text encoder"),
                many_concepts_input("A concept or a stack; each one's strength sits on its own Load Concept node"),
                io.Combo.Input(
                    "method",
                    options=["sum", "mean"],
                    default="sum",
                    tooltip="sum: every concept at its own strength. mean: the sum divided by the number of concepts",
                ),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(cls, model, clip, concepts: dict, method: str) -> io.NodeOutput:
        stack = stacks.joined(concepts)
        return io.NodeOutput(*merged(model, clip, stack, method), stack)


class BlockLoRAMerge(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BlockLoRAMerge",
            display_name="Merge Block Concepts",
            category="modular concepts",
            description="Puts concepts side by side that were trained in different blocks of output rows, so that no "
            "two of them change the same weight. Refuses blocks that overlap or were cut differently.",
            search_aliases=["block lora", "lora merge", "merge loras", "masked lora", "block merge"],
            inputs=[
                io.Model.Input("model", tooltip="The base that the concepts were trained on"),
                io.Clip.Input("clip", tooltip="Its text encoder"),
                many_concepts_input("A concept from the Block trainer or a stack of such, each in a block of its own"),
                io.Combo.Input(
                    "strengths",
                    options=["as set", "sum to one"],
                    default="as set",
                    tooltip="as set: each concept at its own strength, 1 is as trained. sum to one: scaled so that all "
                    "strengths together make 1, as the paper has it literally; k concepts then act at 1/k each",
                ),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(cls, model, clip, concepts: dict, strengths: str) -> io.NodeOutput:
        stack = stacks.joined(concepts)
        literal = strengths == "sum to one"
        return io.NodeOutput(*merged(model, clip, stack, "block", literal), stack)
