"""Teach the loaded model one concept by the methods that the papers compare with, with those papers' numbers."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io

from ..modular_concepts.models.targets import Targets
from ..modular_concepts.training.presets import PRESETS, Preset
from .training_form import Form, Trainer, Way, inputs, outputs, rank_input, train
from .training_options import MEANINGS
from .unused import unused

INVERSION, P_PLUS = PRESETS["textual inversion"], PRESETS["p+"]
CUSTOM, ED_LORA = PRESETS["custom diffusion"], PRESETS["ed-lora"]
WORDS = tuple(MEANINGS["word_layers"])
# Settings of a preset that a trainer has no widget for.
WITHOUT_WIDGET = (
    *("layerwise", "token_start", "token_norm", "schedule", "warmup", "weight_decay"),
    *("noise_offset", "min_snr", "flip"),
)


def _take_preset(preset: Preset, rank: int = 1, targets: Targets | None = None) -> Way:
    """The preset's method with all that the widgets do not say."""
    settings = {name: getattr(preset.settings, name) for name in WITHOUT_WIDGET}
    return Way(preset.settings.method, rank, targets=targets, settings=settings)


class WordTrainer(Trainer):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WordTrainer",
            display_name="Train Concept Word",
            category="modular concepts/training",
            description="Learns a new word for one concept, and nothing else of the model: Textual Inversion, or P+ "
            "with a word of its own for each layer. A tiny file that leaves the model as it is, and less like the "
            "pictures than methods that train layers too.",
            search_aliases=["textual inversion", "embedding", "p+", "extended textual inversion", "train embedding"],
            inputs=inputs(
                [
                    io.Combo.Input(
                        "word",
                        options=list(WORDS),
                        default=WORDS[0],
                        tooltip="one for all layers: Textual Inversion, usable as an embedding anywhere. one for each "
                        "layer: P+, which is more precise and takes fewer steps; prompts then need Concept Prompt and "
                        "the MODEL from Merge Concepts",
                    )
                ],
                Form(
                    steps=INVERSION.settings.steps,
                    steps_more=": 3000 for one word, 5000 in the paper; 500 for a word for each layer",
                    rate=None,
                    token_rate=INVERSION.settings.token_lr,
                    word_more=", per step: 0.005 for Stable Diffusion, as in Textual Inversion; 0.03 for the toy base",
                    vectors=INVERSION.settings.token_vectors,
                    targets=None,
                ),
            ),
            outputs=outputs(lora=False),
        )

    @classmethod
    def execute(cls, word: str, **common) -> io.NodeOutput:
        way = _take_preset(P_PLUS if word == WORDS[1] else INVERSION, targets=Targets())
        return train(common, replace(way, notes=unused(cls, common)))


class CustomDiffusionTrainer(Trainer):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CustomDiffusionTrainer",
            display_name="Train Custom Diffusion Concept",
            category="modular concepts/training",
            description="Learns one concept in the whole weights of the layers that read the text (cross-attention "
            "keys and values), with a word of its own, beside pictures of its class that the base draws (Kumari et "
            "al. 2023).",
            search_aliases=["custom diffusion", "cross attention", "dreambooth", "train concept", "fine-tune"],
            inputs=inputs(
                [],
                Form(
                    steps=CUSTOM.settings.steps,
                    steps_more=": the authors take 250, for faces 750 at half the step size",
                    rate=CUSTOM.settings.adapter_lr,
                    rate_more=", per step: the authors take 0.00001 for each picture of a step, "
                    "so 0.00004 for four; 0.0002 for the toy base",
                    token_rate=CUSTOM.settings.token_lr,
                    word_more=", per step: the same as the layers' in the paper; 0.03 for the toy base",
                    vectors=CUSTOM.settings.token_vectors,
                    targets=None,
                    prior=CUSTOM.prior,
                ),
            ),
            outputs=outputs(),
        )

    @classmethod
    def execute(cls, **common) -> io.NodeOutput:
        return train(common, replace(_take_preset(CUSTOM, targets=Targets(CUSTOM.targets)), notes=unused(cls, common)))


class EDLoRATrainer(Trainer):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="EDLoRATrainer",
            display_name="Train ED-LoRA Concept",
            category="modular concepts/training",
            description="Learns one concept as Mix-of-Show does: a word of two vectors for each layer carries most of "
            "it, one random and one from the class word, and a small LoRA the rest, in the text encoder too (Gu et al. "
            "2023).",
            search_aliases=["ed-lora", "mix of show", "mix-of-show", "train lora", "train concept"],
            inputs=inputs(
                [],
                Form(
                    rank=rank_input(": 4 in the paper", default=ED_LORA.settings.rank),
                    steps=ED_LORA.settings.steps,
                    steps_more=": the authors take 1000 for people and scenes, 500 for objects",
                    rate=ED_LORA.settings.adapter_lr,
                    rate_more=", per step: 0.0001 as the authors take for the U-Net; 0.0002 for "
                    "the toy base. The text encoder's take a tenth of it",
                    token_rate=ED_LORA.settings.token_lr,
                    word_more=", per step: 0.001 as in the paper; 0.03 for the toy base",
                    targets="attention",
                    text_encoder=True,
                ),
            ),
            outputs=outputs(),
        )

    @classmethod
    def execute(cls, rank: int, **common) -> io.NodeOutput:
        way = _take_preset(ED_LORA, rank)
        # A tenth of the others' in the paper, whatever the others' is.
        share = (ED_LORA.settings.text_encoder_lr or 0.0) / ED_LORA.settings.adapter_lr
        settings = {**way.settings, "text_encoder_lr": share * common["learning_rate"] or None}
        return train(common, replace(way, settings=settings, notes=unused(cls, common)))
