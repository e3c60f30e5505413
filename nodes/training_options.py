"""What a training can be told beside a trainer's own widgets; a fresh Training Options changes nothing."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

CONCEPT_TRAINING_OPTIONS = io.Custom("CONCEPT_TRAINING_OPTIONS")
OWN = "as the method has it"
OWN_NUMBER = -1.0
OFF_IS_NONE = ("min_snr", "token_norm", "text_encoder_lr")

# What a choice says -> the value of the setting.
WORD_LAYERS = {"one for all layers": False, "one for each layer": True}
WORD_STARTS = {"class word or description": "words", "random, then class word": "random + class"}
SCHEDULES = {"constant": "constant", "linear to 0": "linear", "cosine to 0": "cosine"}
FLIPS = {"off": False, "half of the pictures": True}


def _choice(name: str, meanings: dict, tooltip: str) -> io.Input:
    return io.Combo.Input(name, options=[OWN, *meanings], default=OWN, tooltip=tooltip)


def _number(name: str, tooltip: str, high: float = 10.0, step: float = 0.01, **more: Any) -> io.Input:
    tooltip = f"{tooltip}. -1: as the method has it; 0: off"
    return io.Float.Input(
        name, default=OWN_NUMBER, min=OWN_NUMBER, max=high, step=step, round=0.0001, tooltip=tooltip, **more
    )


class ConceptTrainingOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConceptTrainingOptions",
            display_name="Training Options",
            category="modular concepts/training",
            description="More about how a concept is trained: its word, the loss, the captions, speed and memory. "
            "Connect it to a trainer's options. As it comes, it changes nothing: each method keeps its own settings.",
            search_aliases=["min snr", "noise offset", "8-bit adam", "gradient checkpointing", "caption dropout"],
            inputs=[
                _choice(
                    "word_layers",
                    WORD_LAYERS,
                    "Whether the learned word means the same to all cross-attention layers of the U-Net, or has "
                    "vectors of its own for each (P+, ED-LoRA, Orthogonal Adaptation; 16 layers in Stable Diffusion "
                    "1.5), which tells it more precisely. Such a word needs Concept Prompt and the MODEL from Merge "
                    "Concepts",
                ),
                _choice(
                    "word_start",
                    WORD_STARTS,
                    "Where the learned word starts: from its class word or description (Textual Inversion, P+), or the "
                    "first vector at random and the others from the class word (ED-LoRA)",
                ),
                _number(
                    "token_norm",
                    "Longest that a vector of the learned word may grow; ED-LoRA's authors stop at 0.55",
                ),
                io.Float.Input(
                    "text_encoder_learning_rate",
                    default=OWN_NUMBER,
                    min=OWN_NUMBER,
                    max=1.0,
                    step=1e-5,
                    round=1e-7,
                    tooltip="Step size of the text encoder's layers, per step, where they learn; ED-LoRA gives them a "
                    "tenth of the others'. -1: as the method has it; 0: the same as the others'",
                ),
                _choice(
                    "schedule",
                    SCHEDULES,
                    "How the learning rates change over the training: the orthogonal, block and LoRA trainers use "
                    "cosine, ED-LoRA linear, Textual Inversion and Custom Diffusion constant",
                ),
                io.Int.Input(
                    "warmup",
                    default=-1,
                    min=-1,
                    max=100_000,
                    tooltip="Steps in which the learning rates rise from 0. -1: as the method has it",
                ),
                _number(
                    "weight_decay",
                    "How strongly AdamW pulls what is trained towards 0 in each step, times the learning rate; "
                    "ED-LoRA's authors use 0.01",
                    high=1.0,
                    advanced=True,
                ),
                _number(
                    "clip_norm",
                    "Longest gradient of a step; longer ones are shortened to it. 1 is usual",
                    high=1000.0,
                    step=0.1,
                    advanced=True,
                ),
                _number(
                    "noise_offset",
                    "How much the noise may brighten or darken a whole picture, so that dark and bright ones are "
                    "learned too; ED-LoRA's authors use 0.01, others up to 0.1",
                    high=1.0,
                ),
                _number(
                    "min_snr",
                    "Gamma of min-SNR, which gives steps with little noise less weight; its authors use 5 "
                    "(Hang et al. 2023). Without effect on flow models such as Stable Diffusion 3",
                    high=100.0,
                    step=0.5,
                ),
                _number(
                    "attention_regularisation",
                    "Weight of a term that keeps the learned word's attention inside the masks, so that it does not "
                    "learn the background; Mix-of-Show uses 0.01. The pictures need masks",
                    step=0.005,
                ),
                _number(
                    "prior_weight",
                    "Weight of the base's own pictures (prior_pictures) beside yours; 1 in DreamBooth and Custom "
                    "Diffusion",
                    high=100.0,
                    step=0.1,
                    advanced=True,
                ),
                io.Float.Input(
                    "caption_dropout",
                    default=0.0,
                    min=0.0,
                    max=0.95,
                    step=0.05,
                    round=0.01,
                    tooltip="Share of captions that are left empty, 0 to 0.95: the concept then shows without its word "
                    "too. Off in the papers",
                ),
                io.Boolean.Input(
                    "shuffle_tags",
                    default=False,
                    tooltip="Put the parts of a caption between commas in another order each time, except the first; "
                    "for captions that are lists of tags (Mix-of-Show does so)",
                ),
                _choice(
                    "flip",
                    FLIPS,
                    "Mirror half of the pictures, left and right; not for faces with a parting, writing or one-sided "
                    "things. On in Custom Diffusion",
                ),
                io.Combo.Input(
                    "optimizer",
                    options=["adamw", "adamw8bit"],
                    default="adamw",
                    tooltip="adamw8bit keeps its moments in 8 bits, a quarter of their memory; it needs the Python "
                    "package bitsandbytes and an NVIDIA GPU",
                ),
                io.Boolean.Input(
                    "gradient_checkpointing",
                    default=False,
                    tooltip="Compute the network's blocks again on the way back instead of keeping them: less "
                    "memory, about a third more time a step; the result is the same",
                ),
                io.Boolean.Input(
                    "keep_latents",
                    default=False,
                    tooltip="Keep pictures as the VAE encodes them, and the base's own, in output/"
                    "modular_concepts_latents, so that the next training on them starts at once",
                    advanced=True,
                ),
                io.Int.Input(
                    "keep_checkpoints",
                    default=2,
                    min=1,
                    max=1000,
                    tooltip="How many of the newest checkpoints are kept in output/modular_concepts/NAME",
                    advanced=True,
                ),
            ],
            outputs=[
                CONCEPT_TRAINING_OPTIONS.Output(
                    "options", display_name="CONCEPT_TRAINING_OPTIONS", tooltip="For the options of any trainer"
                )
            ],
        )

    @classmethod
    def execute(cls, **chosen) -> io.NodeOutput:
        return io.NodeOutput(settings_of(**chosen))


def settings_of(
    word_layers: str,
    word_start: str,
    schedule: str,
    flip: str,
    warmup: int,
    keep_checkpoints: int,
    caption_dropout: float,
    shuffle_tags: bool,
    optimizer: str,
    gradient_checkpointing: bool,
    keep_latents: bool,
    text_encoder_learning_rate: float,
    **numbers: float,
) -> dict[str, object]:
    """Settings by their names in the engine (and keep_latents), those alone that are not left to the method."""
    choices: dict[str, object] = {
        "layerwise": WORD_LAYERS.get(word_layers),
        "token_start": WORD_STARTS.get(word_start),
        "schedule": SCHEDULES.get(schedule),
        "flip": FLIPS.get(flip),
        "warmup": None if warmup < 0 else warmup,
        "keep_checkpoints": keep_checkpoints,
        "caption_dropout": caption_dropout or None,
        "shuffle_tags": shuffle_tags or None,
        "optimizer": None if optimizer == "adamw" else optimizer,
        "gradient_checkpointing": gradient_checkpointing or None,
        "keep_latents": keep_latents or None,
    }
    found = {name: value for name, value in choices.items() if value is not None}
    for name, value in {**numbers, "text_encoder_lr": text_encoder_learning_rate}.items():
        if value != OWN_NUMBER:
            found[name] = None if name in OFF_IS_NONE and not value else value
    return found
