"""Places for regions that nobody drew, to look at and to go on with."""

from __future__ import annotations

from comfy_api.latest import io

from ..host.messages import show_text
from ..host.model import HostModel
from ..host.regions.sampling import find_regions
from ..host.regions.scene import Sampling, Scene
from . import stacks
from .regions import drawing_inputs, overlap_input, prompt_inputs
from .types import CONCEPT_REGIONS, concepts_input
from .unused import unused


class FindRegions(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FindRegions",
            display_name="Find Regions",
            category="modular concepts/regions",
            description="Places for regions that have none (units: automatic): draws the first steps once and looks "
            "where each concept's own words are heard. The masks can be looked at, edited and connected to regions.",
            search_aliases=["automatic regions", "attention mask", "find mask", "segment concepts", "auto mask"],
            inputs=[
                io.Model.Input("model", tooltip="The base as it was loaded, without any merge"),
                io.Clip.Input("clip", tooltip="Its text encoder, from the same node"),
                concepts_input("concepts", "The concepts that the regions name or call, with strengths"),
                CONCEPT_REGIONS.Input("regions", tooltip="From Draw Regions, Concept Region or Regions From JSON"),
                *prompt_inputs("The whole picture in words, best with the trigger words in it"),
                *drawing_inputs(),
                overlap_input(),
            ],
            outputs=[
                CONCEPT_REGIONS.Output(
                    "found", display_name="CONCEPT_REGIONS", tooltip="The same regions, each with its place"
                ),
                io.Mask.Output("masks", display_name="MASK", tooltip="A mask for each region, in their order"),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        concepts,
        regions,
        prompt,
        negative,
        latent,
        sampler_name,
        scheduler,
        steps,
        cfg,
        seed,
        denoise,
        overlap,
    ) -> io.NodeOutput:
        if idle := unused(cls, dict(negative=negative, cfg=cfg)):
            show_text("\n".join(idle))
        how, stack = Sampling(sampler_name, scheduler, steps, cfg, seed, denoise), stacks.as_stack(concepts)
        scene = Scene(stack, regions, (prompt, negative), overlap=overlap)
        return io.NodeOutput(*find_regions(HostModel(model, clip), scene, latent, how))
