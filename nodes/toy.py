"""The pack's own small base model, and the pictures of its standard concepts."""

from __future__ import annotations

from comfy_api.latest import io

from ..host.files.folders import embedding_folders
from ..host.toy_base import load_toy_base
from ..modular_concepts.toy.standard import BY_NAME, PICTURES, lesson_of


class ToyBaseLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ToyBaseLoader",
            display_name="Load Toy Base",
            category="modular concepts/toy",
            description="The small base model that comes with this pack: text to pictures of 32 x 32, 64 x 32 or "
            "96 x 32 pixels, on any computer, nothing to download. A training takes a minute or two.",
            search_aliases=["toy model", "tiny checkpoint", "demo model", "load checkpoint", "test model"],
            inputs=[],
            outputs=[
                io.Model.Output(tooltip="The toy base's diffusion model"),
                io.Clip.Output(tooltip="Its text encoder; it knows some eighty plain words"),
                io.Vae.Output(tooltip="Its pixels as latents; nothing is lost"),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*load_toy_base(embeddings=embedding_folders()))


class ToyPictures(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ToyPictures",
            display_name="Toy Pictures",
            category="modular concepts/toy",
            description="Pictures of one of the fifteen standard concepts of the toy world, with captions, to train "
            "on: six people, five animals and things, two places, two styles. The toy base has never seen them.",
            search_aliases=["example dataset", "training pictures", "toy dataset", "demo images"],
            inputs=[
                io.Combo.Input(
                    "concept",
                    options=list(BY_NAME),
                    default="tom",
                    tooltip="Which concept. tom and tim, ada and ida are look-alikes; rex and fleck dogs; minka a cat, "
                    "bolt a robot, pip a bird; candy and mars places; riso and mint styles",
                ),
                io.Int.Input(
                    "count",
                    default=PICTURES,
                    min=2,
                    max=256,
                    tooltip="How many pictures, each in another scene and pose",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="0 is the standard set; any other number draws further pictures of the same concept",
                ),
            ],
            outputs=[
                io.Image.Output("images", display_name="IMAGE", tooltip="32 x 32 pixels each"),
                io.String.Output(
                    "captions",
                    display_name="captions",
                    tooltip="One line per picture; {concept} stands where the trainer puts the trigger word",
                ),
                io.Mask.Output(
                    "masks",
                    display_name="MASK",
                    tooltip="Where the subject is; all of the picture for places and styles",
                ),
                io.String.Output(
                    "class_word", display_name="class_word", tooltip="What the toy base calls it, such as man or dog"
                ),
                io.String.Output(
                    "description",
                    display_name="description",
                    tooltip="What it looks like in the toy base's words; empty for places and styles",
                ),
            ],
        )

    @classmethod
    def execute(cls, concept: str, count: int, seed: int) -> io.NodeOutput:
        lesson = lesson_of(BY_NAME[concept], count, seed)
        images = lesson.pictures.movedim(1, -1)
        return io.NodeOutput(
            images, "\n".join(lesson.captions), lesson.masks[:, 0], lesson.class_word, lesson.description
        )
