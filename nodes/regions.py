"""Pictures with a prompt for each region."""

from __future__ import annotations

from comfy.samplers import SAMPLER_NAMES, SCHEDULER_NAMES
from comfy_api.latest import io

from ..host.regions import Sampling, sample_regions
from ..modular_concepts.errors import AdapterError
from ..modular_concepts.regions.geometry import region_from
from . import stacks
from .types import CONCEPT_REGIONS, concepts_input

UNITS = ("fractions", "pixels")


class ConceptRegion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        edge = {"min": 0.0, "max": 16384.0, "step": 0.01, "round": 0.001}
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
                io.Combo.Input(
                    "units",
                    options=list(UNITS),
                    default="fractions",
                    tooltip="What the edges and the feather are counted in: fractions of the picture, or its pixels",
                ),
                io.Float.Input("left", default=0.0, tooltip="Left edge: 0 is the picture's left", **edge),
                io.Float.Input("top", default=0.0, tooltip="Top edge: 0 is the picture's top", **edge),
                io.Float.Input(
                    "right", default=1.0, tooltip="Right edge: as a fraction, 1 is the picture's right", **edge
                ),
                io.Float.Input("bottom", default=1.0, tooltip="Bottom edge: as a fraction, 1 is the bottom", **edge),
                io.Float.Input(
                    "feather",
                    default=0.0,
                    tooltip="Width of the soft edge, half of it on each side: a fraction of the picture's shorter "
                    "side, or pixels; 0 is a hard edge",
                    **edge,
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.05,
                    display_mode=io.NumberDisplay.slider,
                    tooltip="How far this prompt replaces the global one inside: 1 wholly, 0.5 half of each, 0 not "
                    "at all",
                ),
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
            ],
            outputs=[
                CONCEPT_REGIONS.Output(
                    "all_regions", display_name="CONCEPT_REGIONS", tooltip="Those before and this one"
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, prompt=None, units=None, left=None, top=None, right=None, bottom=None) -> bool | str:
        """Refused before anything runs, the training of the concepts for instance."""
        edges = (left, top, right, bottom)
        if units is None or None in edges:
            return True  # linked to another node, whose answer is not known yet
        if units not in UNITS:
            return f"units is {units!r}; choose one of {', '.join(UNITS)}"
        try:
            region_from(prompt or "", edges, units == "pixels", None, 0.0, 1.0, "")
        except AdapterError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, prompt, units, left, top, right, bottom, feather, strength, negative="", mask=None, regions=()
    ) -> io.NodeOutput:
        own = region_from(prompt, (left, top, right, bottom), units == "pixels", mask, feather, strength, negative)
        return io.NodeOutput((*regions, own))


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
                io.Model.Input("model", tooltip="The base, or the model from Merge Concepts"),
                io.Clip.Input("clip", tooltip="Its text encoder, from the same node"),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="The whole picture in words; it holds wherever no region is",
                ),
                io.String.Input(
                    "negative", multiline=True, dynamic_prompts=True, default="", tooltip="What not to draw, everywhere"
                ),
                CONCEPT_REGIONS.Input("regions", tooltip="From the last Concept Region node of the chain"),
                io.Latent.Input("latent", tooltip="An empty latent image of the picture's size, or one to change"),
                io.Combo.Input("sampler_name", options=SAMPLER_NAMES, default="dpmpp_2m", tooltip="Sampling algorithm"),
                io.Combo.Input("scheduler", options=SCHEDULER_NAMES, default="karras", tooltip="How noise falls off"),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Sampling steps; more is slower and finer"),
                io.Float.Input(
                    "cfg",
                    default=5.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Guidance scale: how strictly the prompts are followed; 1 is none and twice as fast",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Number that the noise is drawn from; the same noise whatever the regions are",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    round=0.01,
                    tooltip="How much of the latent is drawn anew: 1 all of it, less keeps its composition",
                ),
                concepts_input(
                    "concepts",
                    "Concepts to add to the model for this picture; those that are in it already are not added again",
                    optional=True,
                ),
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
    ) -> io.NodeOutput:
        how = Sampling(sampler_name, scheduler, steps, cfg, seed, denoise)
        return io.NodeOutput(
            sample_regions(model, clip, stacks.as_stack(concepts), (prompt, negative), regions, latent, how)
        )
