"""Pictures with a prompt, and concepts, for each region."""

from __future__ import annotations

from typing import Any

from comfy.samplers import SAMPLER_NAMES, SCHEDULER_NAMES
from comfy_api.latest import io, ui

from ..host.messages import show_text
from ..host.model import HostModel
from ..host.regions.sampling import sample_regions, with_regions
from ..host.regions.scene import Sampling, Scene
from ..modular_concepts.errors import AdapterError
from ..modular_concepts.regions.geometry import region_from
from ..modular_concepts.regions.parsing import names_from, region_box
from ..modular_concepts.regions.preview import draw_regions
from ..modular_concepts.settings import drawing as declared
from ..modular_concepts.settings.merging import ACT_ON
from . import stacks
from .types import CONCEPT_REGIONS, concepts_input
from .unused import unused
from .widgets import widget

AUTOMATIC = "automatic"
UNITS = (*declared.UNITS.choices, AUTOMATIC)
MODES = declared.MODE.choices


def prompt_inputs(tooltip: str = "The whole picture in words; it holds wherever no region is") -> list[io.Input]:
    """Those of the whole picture, what to draw and what not."""
    return [
        io.String.Input("prompt", multiline=True, dynamic_prompts=True, default="", tooltip=tooltip),
        io.String.Input(
            "negative", multiline=True, dynamic_prompts=True, default="", tooltip="What not to draw, everywhere"
        ),
    ]


def mode_input(optional: bool = False) -> io.Input:
    return widget(declared.MODE, optional=optional)


def overlap_input(optional: bool = False) -> io.Input:
    return widget(declared.OVERLAP, optional=optional)


def act_on_input() -> io.Input:
    return widget(
        ACT_ON,
        tooltip=f"{ACT_ON.help}. In gated mode what reads the picture still acts by place",
        optional=True,
    )


def drawing_inputs() -> list[io.Input]:
    """Latent and settings of a sampling, as KSampler has them."""
    return [
        io.Latent.Input("latent", tooltip="An empty latent image of the picture's size, or one to change"),
        io.Combo.Input("sampler_name", options=SAMPLER_NAMES, default="dpmpp_2m", tooltip="Sampling algorithm"),
        io.Combo.Input("scheduler", options=SCHEDULER_NAMES, default="karras", tooltip="How noise falls off"),
        widget(declared.STEPS),
        widget(declared.CFG),
        widget(declared.SEED, control_after_generate=True),
        widget(declared.DENOISE),
    ]


def _edge(name: str, default: float, tooltip: str) -> io.Input:
    return widget(declared.EDGE, id=name, default=default, tooltip=tooltip)


class ConceptRegion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConceptRegion",
            display_name="Concept Region",
            category="modular concepts/regions",
            description="One region of a picture and what is asked for in it: a box, or a mask of any shape. Chain "
            "several through regions and connect the last to the regional sampler; gaps and overlaps are fine.",
            search_aliases=[
                "regional prompt",
                "regional lora",
                "attention couple",
                "bounding box",
                "area",
                "mask prompt",
            ],
            inputs=[
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="What is in this region, with trigger words; say the scene again for a seamless picture",
                ),
                widget(
                    declared.UNITS,
                    options=list(UNITS),
                    tooltip="What the edges and the feather are counted in: fractions of the picture, or its pixels; "
                    "automatic means no edges: the sampler finds the place by the concept's own words",
                ),
                _edge("left", 0.0, "Left edge: 0 is the picture's left"),
                _edge("top", 0.0, "Top edge: 0 is the picture's top"),
                _edge("right", 1.0, "Right edge: as a fraction, 1 is the picture's right"),
                _edge("bottom", 1.0, "Bottom edge: as a fraction, 1 is the bottom"),
                widget(declared.FEATHER),
                widget(declared.STRENGTH, display_mode=io.NumberDisplay.slider),
                io.String.Input(
                    "negative",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="What not to draw in this region; empty takes the sampler's negative prompt",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the region is, any size; takes the place of the box, whose edges then mean "
                    "nothing",
                ),
                CONCEPT_REGIONS.Input("regions", optional=True, tooltip="Regions before this one"),
                io.String.Input(
                    "concepts",
                    default="",
                    optional=True,
                    placeholder="tom, hat",
                    tooltip="Names of the concepts that act here, with commas between; empty means those whose "
                    "trigger word is in the prompt, a dash none at all",
                ),
                widget(declared.START, optional=True),
                widget(declared.END, optional=True),
                widget(declared.PRIORITY, optional=True),
                io.BoundingBox.Input(
                    "bounding_box",
                    optional=True,
                    force_input=True,
                    tooltip="A box in pixels from another node, a detector for instance; takes the place of the edges",
                ),
            ],
            outputs=[
                CONCEPT_REGIONS.Output(
                    "all_regions", display_name="CONCEPT_REGIONS", tooltip="Those before and this one"
                )
            ],
        )

    @classmethod
    def validate_inputs(
        cls, prompt=None, units=None, left=None, top=None, right=None, bottom=None, start=0.0, end=1.0
    ) -> bool | str:
        """Refused before anything runs, the training of the concepts for instance."""
        edges: Any = (left, top, right, bottom)
        if units is None or None in (*edges, start, end):
            return True  # linked to another node, whose answer is not known yet
        if units not in UNITS:
            return f"units is {units!r}; choose one of {', '.join(UNITS)}"
        if units == AUTOMATIC:
            edges = (0.0, 0.0, 1.0, 1.0)
        try:
            region_from(prompt or "", edges, units == "pixels", None, 0.0, 1.0, "", start=start, end=end)
        except AdapterError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls,
        prompt,
        units,
        left,
        top,
        right,
        bottom,
        feather,
        strength,
        negative="",
        mask=None,
        regions=(),
        concepts="",
        start=0.0,
        end=1.0,
        priority=0,
        bounding_box=None,
    ) -> io.NodeOutput:
        chosen = dict(units=units, left=left, top=top, right=right, bottom=bottom, feather=feather)
        if idle := unused(cls, {**chosen, "mask": mask, "bounding_box": bounding_box}):
            show_text("\n".join(idle))
        edges, pixels = (left, top, right, bottom), units == "pixels"
        if bounding_box is not None:
            edges, pixels = region_box(bounding_box), True
        elif units == AUTOMATIC:
            edges = None
        more = {"concepts": names_from(concepts), "start": start, "end": end, "priority": priority}
        return io.NodeOutput((*regions, region_from(prompt, edges, pixels, mask, feather, strength, negative, **more)))


class RegionPreview(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RegionPreview",
            display_name="Region Preview",
            category="modular concepts/regions",
            description="A picture of the regions with numbers, concepts, prompts and colours, before a second is "
            "spent on drawing. Soft edges and overlaps are shown as the sampler will use them.",
            search_aliases=["show regions", "preview boxes", "region map", "debug regions", "visualize mask"],
            is_output_node=True,
            inputs=[
                CONCEPT_REGIONS.Input("regions", tooltip="From Draw Regions, Concept Region or Regions From JSON"),
                widget(declared.CANVAS, id="width", tooltip="The picture's width in pixels"),
                widget(declared.CANVAS, id="height", tooltip="Its height in pixels"),
                overlap_input(),
                io.Image.Input(
                    "image", optional=True, tooltip="A picture to draw upon; its size takes the place of the two above"
                ),
            ],
            outputs=[io.Image.Output("preview", display_name="IMAGE", tooltip="The regions as a picture")],
        )

    @classmethod
    def execute(cls, regions, width, height, overlap, image=None) -> io.NodeOutput:
        if idle := unused(cls, dict(width=width, height=height, image=image)):
            show_text("\n".join(idle))
        under = None if image is None else image[0]
        if under is not None:
            height, width = under.shape[:2]
        picture = draw_regions(regions, width, height, overlap, under)
        return io.NodeOutput(picture, ui=ui.PreviewImage(picture, cls=cls))


class RegionalConcepts(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RegionalConcepts",
            display_name="Regional Concepts",
            category="modular concepts/regions",
            description="Regions for a sampler of your own: gives the MODEL and the two CONDITIONINGs that a KSampler "
            "or SamplerCustomAdvanced draws with, in one pass, each concept in its place.",
            search_aliases=["regional lora", "regional prompt", "attention couple", "lora mask", "multi character"],
            inputs=[
                io.Model.Input("model", tooltip="The base; in merged mode also the model from Merge Concepts"),
                io.Clip.Input("clip", tooltip="Its text encoder, from the same node"),
                concepts_input("concepts", "The concepts that the regions name or call, with strengths", optional=True),
                CONCEPT_REGIONS.Input("regions", tooltip="From Draw Regions, Concept Region or Regions From JSON"),
                *prompt_inputs(),
                mode_input(),
                overlap_input(),
                act_on_input(),
            ],
            outputs=[
                io.Model.Output("regional_model", display_name="MODEL", tooltip="For the sampler's model input"),
                io.Conditioning.Output("positive", display_name="positive", tooltip="For the sampler's positive input"),
                io.Conditioning.Output(
                    "negative_conditioning", display_name="negative", tooltip="For the sampler's negative input"
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model, clip, regions, prompt, negative, mode, overlap, concepts=None, act_on=ACT_ON.default
    ) -> io.NodeOutput:
        stack = stacks.as_stack(concepts)
        scene = Scene(stack, regions, (prompt, negative), mode, overlap, act_on)
        return io.NodeOutput(*with_regions(HostModel(model, clip), scene))


class RegionalConceptSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RegionalConceptSampler",
            display_name="Regional Concept Sampler",
            category="modular concepts/regions",
            description="Draws one picture in which every region follows a prompt of its own, all in one pass, with "
            "any sampler and any number of regions. The global prompt holds outside of them.",
            search_aliases=["regional lora", "regional prompt", "attention couple", "ksampler", "multi character"],
            inputs=[
                io.Model.Input("model", tooltip="The base; in merged mode also the model from Merge Concepts"),
                io.Clip.Input("clip", tooltip="Its text encoder, from the same node"),
                *prompt_inputs(),
                CONCEPT_REGIONS.Input("regions", tooltip="From Draw Regions, Concept Region or Regions From JSON"),
                *drawing_inputs(),
                concepts_input(
                    "concepts",
                    "The concepts that the regions name or call, with strengths; in merged mode, those that are in "
                    "the model already are not added again",
                    optional=True,
                ),
                mode_input(optional=True),
                overlap_input(optional=True),
                act_on_input(),
            ],
            outputs=[io.Latent.Output(tooltip="For VAE Decode")],
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        prompt,
        negative,
        regions,
        latent,
        sampler_name,
        scheduler,
        steps,
        cfg,
        seed,
        denoise,
        concepts=None,
        mode="merged",  # what a prompt meant before there was a choice
        overlap="average",
        act_on=ACT_ON.default,
    ) -> io.NodeOutput:
        how, stack = Sampling(sampler_name, scheduler, steps, cfg, seed, denoise), stacks.as_stack(concepts)
        notes = unused(cls, dict(negative=negative, cfg=cfg))
        scene = Scene(stack, regions, (prompt, negative), mode, overlap, act_on)
        return io.NodeOutput(sample_regions(HostModel(model, clip), scene, latent, how, notes))
