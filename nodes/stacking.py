"""Several concepts as one stack, without a merge."""

from __future__ import annotations

from comfy_api.latest import io

from . import stacks
from .types import CONCEPT_STACK, many_concepts_input


class ConceptStack(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConceptStack",
            display_name="Stack Concepts",
            category="modular concepts",
            description="Several concepts, from trainers or loaders, as one stack for a single input. Nothing is "
            "merged: the regional sampler's gated mode wants its concepts like this.",
            search_aliases=["lora stack", "combine concepts", "join concepts", "multi lora"],
            inputs=[many_concepts_input("A concept or a stack; strengths pass through")],
            outputs=[
                CONCEPT_STACK.Output("stack", display_name="CONCEPT_STACK", tooltip="All of them, in the inputs' order")
            ],
        )

    @classmethod
    def execute(cls, concepts: dict) -> io.NodeOutput:
        return io.NodeOutput(stacks.joined(concepts))
