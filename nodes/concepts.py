"""Concepts one at a time: load, set the strength, save, and prompts that call them."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..host import concepts as files
from ..host.clip import encode_prompt
from ..host.messages import show_text
from . import stacks
from .types import CONCEPT_STACK, blocks_input, concepts_input, strength_input

FORMATS = ("concept", "concept, compact", "LoRA for stock loaders")


class ConceptLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConceptLoader",
            display_name="Load Concept",
            category="modular concepts",
            description="Takes a concept from models/concepts and sets how strongly it acts. Plain LoRA files in that "
            "folder work too. Connect it to Merge Concepts, Concept Prompt or the regional sampler.",
            search_aliases=["load lora", "lora loader", "lora strength", "character lora", "dreambooth", "concept"],
            inputs=[
                io.Combo.Input(
                    "concept",
                    options=files.concept_names(),
                    tooltip="A .safetensors file in models/concepts; press R in the browser to see new files",
                ),
                strength_input(
                    "How strongly the concept acts, layers and word: 0 not at all, its trigger then means its class "
                    "word; 1 as it was trained"
                ),
                blocks_input(),
            ],
            outputs=[
                CONCEPT_STACK.Output("stack", display_name="CONCEPT_STACK", tooltip="The concept with its strength"),
                io.String.Output(
                    "triggers", display_name="triggers", tooltip="The words that call it in a prompt, such as <tom>"
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, concept: str) -> bool | str:
        return files.concept_problem(concept) or True

    @classmethod
    def fingerprint_inputs(cls, concept: str, strength: float, blocks: str = "") -> str:
        return f"{files.file_fingerprint(concept)} {strength} {blocks}"

    @classmethod
    def execute(cls, concept: str, strength: float, blocks: str = "") -> io.NodeOutput:
        stack = stacks.scaled(files.load_concept_named(concept), strength, blocks)
        return io.NodeOutput(stack, stacks.triggers(stack))


class ConceptStrength(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConceptStrength",
            display_name="Concept Strength",
            category="modular concepts",
            description="A slider for a concept that comes straight from a trainer, or for a whole stack at once: the "
            "strength multiplies those that the concepts come with (a fresh concept comes with 1).",
            search_aliases=["lora strength", "lora weight", "slider", "lambda"],
            inputs=[
                concepts_input("concept", "A concept from a trainer, or a stack"),
                strength_input("How strongly it acts, layers and word: 0 not at all, 1 as it came"),
                blocks_input(),
            ],
            outputs=[
                CONCEPT_STACK.Output("stack", display_name="CONCEPT_STACK", tooltip="The same with this strength")
            ],
        )

    @classmethod
    def execute(cls, concept, strength: float, blocks: str = "") -> io.NodeOutput:
        return io.NodeOutput(stacks.scaled(concept, strength, blocks))


class ConceptSave(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConceptSave",
            display_name="Save Concept",
            category="modular concepts",
            description="Writes a concept to models/concepts, whole or not at all, with its recipe and origin in the "
            "metadata; or as a LoRA for the stock loaders. A stack of several is saved as their exact merge.",
            search_aliases=["save lora", "export lora", "save concept", "kohya", "textual inversion", "embedding"],
            is_output_node=True,
            inputs=[
                concepts_input("concept", "What to save; strengths other than 1 are saved as they are set"),
                io.String.Input(
                    "filename",
                    default="",
                    placeholder="the concept's name",
                    tooltip="File name without ending; empty takes the concept's own name. Subfolders are fine",
                ),
                io.Combo.Input(
                    "format",
                    options=list(FORMATS),
                    default=FORMATS[0],
                    tooltip="concept: any LoRA loader reads it too. compact: without what the recipe gives back, for "
                    "this pack only. LoRA for stock loaders: to models/loras, learned words to models/embeddings",
                ),
                io.Boolean.Input(
                    "replace",
                    default=False,
                    advanced=True,
                    tooltip="Write over a file of that name; off gives the new file a number instead",
                ),
            ],
            outputs=[
                io.String.Output(
                    "file", display_name="file", tooltip="Name of the file, as a loader in this program lists it"
                )
            ],
        )

    @classmethod
    def execute(cls, concept, filename: str, format: str, replace: bool = False) -> io.NodeOutput:
        concepts, strengths = stacks.parts(stacks.as_stack(concept))
        saved = files.save(concepts, strengths, filename, files.Format(FORMATS.index(format)), replace)
        show_text(saved.message)
        return io.NodeOutput(saved.name, ui=ui.PreviewText(saved.message))


class ConceptTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConceptTextEncode",
            display_name="Concept Prompt",
            category="modular concepts",
            description="A prompt with trigger words, as conditioning for any sampler. A CLIP from Merge Concepts "
            "knows its concepts' words already; connect concepts only for words that it does not know yet.",
            search_aliases=["prompt", "clip text encode", "trigger word", "textual inversion", "dreambooth"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder, plain or from Merge Concepts"),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="The prompt; a trigger word such as <tom> stands where the class word would. (words:1.2) "
                    "weighs words",
                ),
                concepts_input(
                    "concepts", "Concepts whose learned words the prompt may use; not merged", optional=True
                ),
            ],
            outputs=[io.Conditioning.Output(tooltip="For the positive or negative input of a sampler")],
        )

    @classmethod
    def execute(cls, clip, text: str, concepts=None) -> io.NodeOutput:
        return io.NodeOutput(encode_prompt(clip, text, stacks.as_stack(concepts)))
