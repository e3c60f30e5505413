"""Concepts one at a time: load, set the strength, save, and prompts that call them."""

from __future__ import annotations

from dataclasses import replace as replaced

from comfy_api.latest import io, ui
from torch import Tensor

from ..host.files import concepts as files
from ..host.files.loras import concepts_of
from ..host.messages import show_text
from ..host.text.words import encode_prompt, warnings_of_words
from ..modular_concepts.files.modelspec import thumbnail as small_picture
from ..modular_concepts.stack import Stack
from . import stacks
from .types import CONCEPT_STACK, LORA_STACK, blocks_input, concepts_input, explain_strength, strength_input
from .unused import unused

FORMATS = ("concept", "concept, compact", "LoRA for stock loaders", "LoRA in diffusers' keys")


def _tell(sentences: list[str]) -> None:
    if sentences:
        show_text("\n".join(sentences))


def _oddities(thumbnail: Tensor) -> list[str]:
    """What of a thumbnail (N, H, W, C) does not go into the file."""
    seen_through = thumbnail.shape[-1] > 3 and bool((thumbnail[0, ..., 3] < 1).any())
    clear = (
        ["the thumbnail is kept without its transparency, with the colours that lie under it"] if seen_through else []
    )
    return ([f"of {len(thumbnail)} thumbnails the first is used"] if len(thumbnail) > 1 else []) + clear


class ConceptLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConceptLoader",
            display_name="Load Concept",
            category="modular concepts",
            description="Takes a concept from models/concepts and sets how strongly it acts. LoRA files with "
            "kohya's or diffusers' keys work there too; keys that find no place are named. Connect it to Merge "
            "Concepts, Concept Prompt or the regional sampler.",
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
    def validate_inputs(cls, concept: str | None = None, strength: float | None = None) -> bool | str:
        return files.concept_problem(concept) or explain_strength(strength) or True

    @classmethod
    def fingerprint_inputs(cls, concept: str, strength: float, blocks: str = "") -> str:
        return f"{files.file_fingerprint(concept)} {strength} {blocks}"

    @classmethod
    def execute(cls, concept: str, strength: float, blocks: str = "") -> io.NodeOutput:
        loaded = files.load_concept_named(concept)
        stack = stacks.scaled(loaded, strength, blocks)
        _tell(stacks.unmet_blocks(loaded, blocks))
        return io.NodeOutput(stack, stacks.triggers(stack))


class LoRAToConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoRAToConcept",
            display_name="LoRA to Concept",
            category="modular concepts",
            description="Takes a LoRA from ComfyUI's training nodes or a LoRA stack of other packs as concepts, so "
            "that Merge Concepts sums them exactly, beside your own. Keys that find no place are named one by one.",
            search_aliases=["lora stack", "apply lora stack", "lora loader stack", "convert lora", "lora model"],
            inputs=[
                io.MultiType.Input(
                    "lora",
                    [LORA_STACK, io.LoraModel],
                    tooltip="A LORA_STACK (file names in models/loras with their strengths) or a LORA_MODEL",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The model that it is for: it knows the names of its own layers best. Needed for Stable "
                    "Diffusion 3 and for unusual models",
                ),
                io.Clip.Input("clip", optional=True, tooltip="Its text encoder, for layers of the text encoder"),
                io.String.Input(
                    "name", default="lora", tooltip="What to call a LORA_MODEL; files have their own names"
                ),
            ],
            outputs=[
                CONCEPT_STACK.Output("stack", display_name="CONCEPT_STACK", tooltip="One concept for each LoRA"),
                io.String.Output("unused", display_name="unused", tooltip="The keys that found no place in the model"),
            ],
        )

    @classmethod
    def execute(cls, lora, name: str = "lora", model=None, clip=None) -> io.NodeOutput:
        stack, left_out = concepts_of(lora, name, model, clip)
        words = [
            f"{concept.name} brings its words: {' '.join(concept.tokens)}" for concept, _ in stack if concept.tokens
        ]
        idle = unused(cls, dict(lora=lora, name=name))
        _tell([*idle, *filter(None, [left_out]), *words])
        return io.NodeOutput(stack, left_out)


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
    def validate_inputs(cls, strength: float | None = None) -> bool | str:
        return explain_strength(strength) or True

    @classmethod
    def execute(cls, concept, strength: float, blocks: str = "") -> io.NodeOutput:
        _tell(stacks.unmet_blocks(concept, blocks))
        return io.NodeOutput(stacks.scaled(concept, strength, blocks))


class ConceptSave(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConceptSave",
            display_name="Save Concept",
            category="modular concepts",
            description="Writes a concept to models/concepts, whole or not at all, with its recipe and origin in the "
            "metadata; or as a LoRA for other programs. A stack of several is saved as their exact sum, one LoRA.",
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
                    "this pack only. LoRA for stock loaders: to models/loras, learned words to models/embeddings. In "
                    "diffusers' keys: the same for diffusers and peft",
                ),
                io.Boolean.Input(
                    "replace",
                    default=False,
                    advanced=True,
                    tooltip="Write over a file of that name; off gives the new file a number instead",
                ),
                io.Image.Input(
                    "thumbnail",
                    optional=True,
                    tooltip="A sample picture; a small copy goes into the file, and model managers show it",
                ),
                io.String.Input(
                    "description",
                    default="",
                    multiline=True,
                    optional=True,
                    advanced=True,
                    tooltip="What model managers say of the file; trigger words and date are in it anyway",
                ),
                io.String.Input(
                    "author",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Who made it, for model managers",
                ),
            ],
            outputs=[
                io.String.Output(
                    "file", display_name="file", tooltip="Name of the file, as a loader in this program lists it"
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, filename: str | None = None) -> bool | str:
        """Before anything is trained for it.  None: not known yet."""
        return (files.name_problem(filename) if filename else "") or True

    @classmethod
    def execute(
        cls,
        concept,
        filename: str,
        format: str,
        replace: bool = False,
        thumbnail=None,
        description: str = "",
        author: str = "",
    ) -> io.NodeOutput:
        concepts, strengths = stacks.parts(stacks.as_stack(concept))
        shown = "" if thumbnail is None else small_picture(thumbnail[0])
        about = {"thumbnail": shown, "description": description, "author": author}
        saved = files.save(concepts, strengths, filename, files.Format(FORMATS.index(format)), replace, about)
        oddities = [] if thumbnail is None else _oddities(thumbnail)
        saved = replaced(saved, message="\n".join([saved.message, *oddities]))
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
        stack = stacks.as_stack(concepts)
        warnings = [*warnings_of_words(clip, [text], Stack.of(stack).concepts), *stacks.unsaid(stack, text)]
        _tell(warnings)
        return io.NodeOutput(encode_prompt(clip, text, stack))
