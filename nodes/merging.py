"""Several concepts in one model: sums, blocks, fusion, and what makes concepts fit together."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..host.merging.fusion import Drawing, fuse
from ..host.merging.hook import make_hook
from ..host.merging.notices import APPLY, merge_by
from ..host.merging.weights import concept_inside
from ..host.messages import show_text
from ..host.model import HostModel
from ..host.training.train import lora_of
from ..modular_concepts.merging import MergeOptions
from ..modular_concepts.merging.blocks import BLOCK
from ..modular_concepts.merging.fusion import FUSION
from ..modular_concepts.merging.method import TEXTS
from ..modular_concepts.merging.methods import METHODS, Merge
from ..modular_concepts.merging.orthogonalize import orthogonal_concepts
from ..modular_concepts.recording import PROMPTS
from ..modular_concepts.settings import merging as declared
from ..modular_concepts.settings.setting import Setting
from . import stacks
from .types import CONCEPT, CONCEPT_STACK, apply_input, many_concepts_input
from .widgets import widget

# Methods that have nodes of their own; all others are on Merge Concepts, the one that needs texts last.
APART = (BLOCK.name, FUSION.name)
SUMS = tuple(sorted((name for name in METHODS if name not in APART), key=lambda name: METHODS[name].needs == TEXTS))
DEFAULTS = MergeOptions()

OUTPUTS = (
    ("model", io.Model, "The model with the concepts in it; what you loaded stays as it is"),
    ("clip", io.Clip, "The text encoder with the concepts in it; it knows their trigger words"),
    ("stack", CONCEPT_STACK, "The concepts and strengths that are in the model, for reports and for saving"),
)


def _option(setting: Setting, **differs: Any) -> io.Input:
    """A choice that some methods read, which its tooltip names."""
    *others, last = setting.read_by
    readers = f"{', '.join(others)} and {last}" if others else last
    return widget(setting, tooltip=f"For {readers}: {setting.help}{setting.more}", optional=True, **differs)


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
                widget(
                    declared.HOW,
                    options=list(SUMS),
                    tooltip=". ".join(f"{name}: {declared.METHOD_HELP[name]}" for name in SUMS),
                ),
                _option(declared.DENSITY),
                _option(declared.RANK),
                _option(declared.SEED, control_after_generate=io.ControlAfterGenerate.fixed),
                apply_input(),
                widget(declared.ACT_ON, optional=True),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        concepts: dict,
        method: str,
        density: float = DEFAULTS.density,
        rank: int = DEFAULTS.rank,
        seed: int = DEFAULTS.seed,
        apply: str = APPLY[0],
        act_on: str = declared.ACT_ON.default,
    ) -> io.NodeOutput:
        stack, merge = (
            stacks.joined(concepts),
            Merge(method, options=MergeOptions(density=density, rank=rank, seed=seed)),
        )
        return io.NodeOutput(*merge_by(HostModel(model, clip), stack, merge, apply, act_on), stack)


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
                apply_input(),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(cls, model, clip, concepts: dict, strengths: str, apply: str = APPLY[0]) -> io.NodeOutput:
        stack = stacks.joined(concepts)
        literal = strengths == "sum to one"
        merge = Merge(BLOCK.name, literal)
        return io.NodeOutput(*merge_by(HostModel(model, clip), stack, merge, apply), stack)


class ConceptFusion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConceptFusion",
            display_name="Fuse Concepts",
            category="modular concepts",
            description="Mix-of-Show's gradient fusion as damped least squares, solved in seconds: each layer answers "
            "every concept's own inputs nearly as that concept alone would. For LoRAs that were not trained to be "
            "summed; each is drawn a few times first, once.",
            search_aliases=["gradient fusion", "mix of show", "regmean", "lora merge", "merge loras", "ed-lora"],
            inputs=[
                io.Model.Input("model", tooltip="The base that the concepts were trained on"),
                io.Clip.Input("clip", tooltip="Its text encoder"),
                many_concepts_input("A concept or a stack; each one's strength sits on its own Load Concept node"),
                io.String.Input(
                    "prompts",
                    default="\n".join(PROMPTS),
                    multiline=True,
                    tooltip="What each concept is drawn with, one prompt a line, used in turn; {concept} stands for "
                    "its trigger word",
                ),
                widget(declared.RECORDED_PICTURES),
                widget(declared.RIDGE),
                widget(declared.RECORDED_STEPS),
                widget(declared.RECORDED_SIDE),
                io.Boolean.Input(
                    "anew",
                    default=False,
                    advanced=True,
                    tooltip="Draw also the concepts whose moments lie beside their file; needed after changing "
                    "prompts, pictures, steps or size",
                ),
                apply_input(),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        concepts: dict,
        prompts: str,
        pictures: int,
        ridge: float,
        steps: int = declared.RECORDED_STEPS.default,
        size: int = declared.RECORDED_SIDE.default,
        anew: bool = False,
        apply: str = APPLY[0],
    ) -> io.NodeOutput:
        stack = stacks.joined(concepts)
        drawing = Drawing(prompts.splitlines(), pictures, steps, size)
        model, clip, text = fuse(HostModel(model, clip), stack, drawing, ridge, anew, apply == "activations")
        show_text(text)
        return io.NodeOutput(model, clip, stack)


class ConceptOrthogonalize(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConceptOrthogonalize",
            display_name="Make Concepts Orthogonal",
            category="modular concepts",
            description="Gives LoRAs that were never trained for it directions of their own, with the least change, so "
            "that summing them adds no crosstalk. What a concept read in others' directions is lost; the text says how "
            "much each one keeps.",
            search_aliases=["orthogonal lora", "lora merge", "decorrelate", "lora conflict", "gram schmidt"],
            inputs=[
                many_concepts_input("A concept or a stack; strengths pass through"),
                widget(declared.WAY),
            ],
            outputs=[
                CONCEPT_STACK.Output("stack", display_name="CONCEPT_STACK", tooltip="The changed concepts"),
                io.String.Output("text", display_name="text", tooltip="What share of its energy each concept keeps"),
            ],
        )

    @classmethod
    def execute(cls, concepts: dict, way: str) -> io.NodeOutput:
        whole, strengths = stacks.parts(stacks.joined(concepts))
        changed, shares = orthogonal_concepts(whole, way)
        energies = zip(changed, shares, strict=True)
        text = "\n".join(f"{concept.name} keeps {share:.1%} of its energy" for concept, share in energies)
        show_text(text)
        return io.NodeOutput(tuple(zip(changed, strengths, strict=True)), text)


class ConceptHook(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConceptHook",
            display_name="Concepts as Hook",
            category="modular concepts",
            description="The sum of concepts as a hook for ComfyUI's hook nodes: keyframes change its strength from "
            "step to step, and it acts only on prompts that it is set on. One adapter a layer, however many they are.",
            search_aliases=["lora hook", "create hook lora", "lora schedule", "keyframe lora strength", "hook concept"],
            inputs=[
                io.Model.Input("model", tooltip="The base that the concepts were trained on; it stays as it is"),
                io.Clip.Input("clip", tooltip="Its text encoder"),
                many_concepts_input("A concept or a stack; keyframes multiply the strengths that they come with"),
            ],
            outputs=[
                io.Hooks.Output(
                    "hooks", display_name="HOOKS", tooltip="For Set Hook Keyframes, Set CLIP Hooks and conditioning"
                )
            ],
        )

    @classmethod
    def execute(cls, model, clip, concepts: dict) -> io.NodeOutput:
        return io.NodeOutput(make_hook(HostModel(model, clip), stacks.joined(concepts)))


class ConceptFromModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConceptFromModel",
            display_name="Merge to One Concept",
            category="modular concepts",
            description="Takes what the merge nodes put into a MODEL and CLIP out again as one concept, exactly and by "
            "whatever method it was merged: for Save Concept, which writes it as one LoRA, and ComfyUI's LoRA nodes.",
            search_aliases=["save merged lora", "extract lora", "merge loras to one", "bake lora", "lora merge"],
            inputs=[
                io.Model.Input("model", tooltip="From Merge Concepts, Merge Block Concepts or Fuse Concepts"),
                io.String.Input(
                    "name",
                    default="",
                    placeholder="the concepts' names",
                    tooltip="What the new concept is called; empty joins the names of its parts",
                ),
            ],
            outputs=[
                CONCEPT.Output(
                    "concept", display_name="CONCEPT", tooltip="The whole merge, at strength 1 as it is now"
                ),
                io.LoraModel.Output("lora", display_name="LORA_MODEL", tooltip="Its layers, for ComfyUI's LoRA nodes"),
            ],
        )

    @classmethod
    def execute(cls, model, name: str) -> io.NodeOutput:
        concept = concept_inside(model, name)
        return io.NodeOutput(concept, lora_of(concept))
