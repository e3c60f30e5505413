"""What a training can be told beside a trainer's own widgets; a fresh Training Options changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from ..modular_concepts.settings import training as declared
from ..modular_concepts.settings.setting import Setting
from .widgets import widget

CONCEPT_TRAINING_OPTIONS = io.Custom("CONCEPT_TRAINING_OPTIONS")
OF_METHOD = "as the method has it"
OF_METHOD_NUMBER = -1

# Input -> what its choices say -> the value of the setting.
MEANINGS: Mapping[str, Mapping[str, object]] = {
    "word_layers": {"one for all layers": False, "one for each layer": True},
    "word_start": {"class word or description": "words", "random, then class word": "random + class"},
    "schedule": {"constant": "constant", "linear to 0": "linear", "cosine to 0": "cosine"},
    "flip": {"off": False, "half of the pictures": True},
}
# Input -> the setting, where the two are called differently.
SETTING_NAMES = {setting.widget_name: name for name, setting in declared.TRAINING.items()}


def _choice(setting: Setting, tooltip: str | None = None) -> io.Input:
    """A setting in other words than the engine's, and a word for leaving it to the method."""
    options = [OF_METHOD, *MEANINGS[setting.widget_name]]
    text = setting.tooltip if tooltip is None else tooltip
    return io.Combo.Input(setting.widget_name, options=options, default=OF_METHOD, tooltip=text)


def _number(setting: Setting, off: str = "; 0: off") -> io.Input:
    """A setting with a number for leaving it to the method."""
    start: Any = setting.kind(OF_METHOD_NUMBER)
    return widget(setting, f"{setting.more}. -1: {OF_METHOD}{off}", default=start, min=start)


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
                    declared.LAYERWISE,
                    "Whether the learned word means the same to all cross-attention layers of the U-Net, or has "
                    "vectors of its own for each (P+, ED-LoRA, Orthogonal Adaptation; 16 layers in Stable Diffusion "
                    "1.5), which tells it more precisely. Such a word needs Concept Prompt and the MODEL from Merge "
                    "Concepts",
                ),
                _choice(declared.TOKEN_START),
                _number(declared.TOKEN_NORM),
                _number(declared.TEXT_ENCODER_LR, "; 0: the same as the others'"),
                _choice(declared.SCHEDULE),
                _number(declared.WARMUP, ""),
                _number(declared.WEIGHT_DECAY),
                _number(declared.CLIP_NORM),
                _number(declared.NOISE_OFFSET),
                _number(declared.MIN_SNR),
                _number(declared.ATTENTION_REGULARISATION),
                _number(declared.PRIOR_WEIGHT),
                widget(declared.CAPTION_DROPOUT),
                widget(declared.SHUFFLE_TAGS),
                _choice(declared.FLIP),
                widget(declared.OPTIMIZER),
                widget(declared.GRADIENT_CHECKPOINTING),
                io.Boolean.Input(
                    "keep_latents",
                    default=False,
                    tooltip="Keep pictures as the VAE encodes them, and the base's own, in output/"
                    "modular_concepts_latents, so that the next training on them starts at once",
                    advanced=True,
                ),
                widget(declared.KEEP_CHECKPOINTS),
            ],
            outputs=[
                CONCEPT_TRAINING_OPTIONS.Output(
                    "options", display_name="CONCEPT_TRAINING_OPTIONS", tooltip="For the options of any trainer"
                )
            ],
        )

    @classmethod
    def execute(cls, **chosen) -> io.NodeOutput:
        return io.NodeOutput(name_settings(cls, chosen))


def name_settings(node: type[io.ComfyNode], chosen: Mapping[str, object]) -> dict[str, object]:
    """Settings by their names in the engine (and keep_latents), those alone that are not left to the method.

    chosen: input -> value.  What is as the node starts is left to the method.
    """
    starts = {entry.id: getattr(entry, "default", None) for entry in node.define_schema().inputs}
    settings: dict[str, object] = {}
    for name, value in chosen.items():
        if value == starts[name] or name in MEANINGS and value not in MEANINGS[name]:
            continue
        setting = SETTING_NAMES.get(name, name)
        off = not value and setting in declared.TRAINING and declared.TRAINING[setting].default is None
        settings[setting] = None if off else MEANINGS[name][str(value)] if name in MEANINGS else value
    return settings
