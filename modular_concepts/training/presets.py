"""Whole choices under one name: each method as its paper publishes it, as far as it says, or as it is quick.

A slot, a name and a seed are the person's own.  Rates are for Stable Diffusion; `toy/presets.py` has the toy base's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from ..errors import AdapterError
from ..settings.training import COMPANY_PICTURES
from .settings import TrainSettings

_RANDOM = "random + class"


@dataclass(frozen=True)
class Preset:
    """settings; targets, text_encoder_targets: as `layers.chosen_layers`; prior: pictures that the base draws itself.

    company_pictures: others whom it draws, where the settings ask for company.
    help: one paragraph for people: whose it is, and when to take it.
    """

    settings: TrainSettings
    targets: tuple[str, ...]
    help: str
    text_encoder_targets: tuple[str, ...] | None = None
    prior: int = 0
    company_pictures: int = COMPANY_PICTURES.default


_ORTHOGONAL = TrainSettings(
    method="orthogonal",
    rank=20,
    steps=1500,
    adapter_lr=1e-5,
    token_lr=1e-3,
    token_vectors=2,
    token_start=_RANDOM,
    layerwise=True,
)
_BLOCK = TrainSettings(
    method="block", rank=20, blocks=15, erasure=0.2, steps=800, adapter_lr=1e-4, token_lr=1e-3, token_vectors=2
)

# At its own words a concept disturbs nobody, so its layers may learn faster than others'.
_OWN_WORDS = TrainSettings(
    method="own_words", rank=8, steps=500, adapter_lr=2.5e-4, token_lr=1e-3, token_vectors=4, schedule="cosine"
)

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "orthogonal adaptation": Preset(
            _ORTHOGONAL,
            ("all_linear",),
            "As Po et al. 2024 publish it: all linear layers, rank 20, a layer-wise word of two vectors, and a rate of "
            "1e-5 for the layers, so small that the word carries most of the identity and merged concepts disturb each "
            "other least. It needs many steps; the paper does not say how many.",
        ),
        "orthogonal adaptation, fast": Preset(
            replace(_ORTHOGONAL, adapter_lr=1e-4, steps=500),
            ("all_linear",),
            "Ours: the same with 1e-4 for the layers, which then learn ten times as much in a step. There after a "
            "third of the steps; merged concepts are as orthogonal, but their layers act more on each other's words.",
        ),
        "block lora": Preset(
            _BLOCK,
            ("all_linear",),
            "BlockLoRA (Zhu et al. 2025): each concept writes its own block of output rows, some of which are erased "
            "at random while it learns. The paper states neither rank nor rates nor the erasure's probability: these "
            "are ours.",
        ),
        "block + orthogonal": Preset(
            replace(_BLOCK, method="block_orthogonal"),
            ("all_linear",),
            "Ours: both separations at once, columns of a shared basis read and a block of rows written.",
        ),
        "own words": Preset(
            _OWN_WORDS,
            ("cross_attention_kv",),
            "Ours, after TARA (2025): keys and values of cross-attention learn, and act where the text says the "
            "concept's own words and nowhere else, in training and in drawing. Any number of such concepts add up "
            "without a trace of each other, and the class word stays what it was. No other program draws with it.",
        ),
        "own words, in company": Preset(
            replace(_OWN_WORDS, company=0.5),
            ("cross_attention_kv",),
            "The same for people who are to stand together in one picture without regions: half of the steps are on "
            "wide pictures with the concept in one half and somebody else, whom the base draws first, in the other.",
        ),
        "ed-lora": Preset(
            TrainSettings(
                method="lora",
                rank=4,
                steps=1000,
                adapter_lr=1e-4,
                text_encoder_lr=1e-5,
                token_lr=1e-3,
                token_vectors=2,
                token_start=_RANDOM,
                token_norm=0.55,
                layerwise=True,
                schedule="linear",
                noise_offset=0.01,
            ),
            ("attention",),
            "Mix-of-Show's ED-LoRA (Gu et al. 2023): a layer-wise word of a random vector and the class word's, LoRA "
            "of rank 4 on the attention of U-Net and text encoder. What gradient fusion merges best.",
            text_encoder_targets=("attention",),
        ),
        "dreambooth lora": Preset(
            TrainSettings(
                method="lora",
                rank=8,
                steps=800,
                adapter_lr=1e-4,
                token_lr=0.0,
                token_vectors=2,
                token_start=_RANDOM,
            ),
            ("attention",),
            "DreamBooth (Ruiz et al. 2023) with LoRA: the word is a random one beside the class word and does not "
            "learn; the layers do, beside 200 pictures of the class that the base draws first, so that the class stays "
            "what it was.",
            text_encoder_targets=("attention",),
            prior=200,
        ),
        "textual inversion": Preset(
            TrainSettings(method="words", steps=3000, token_lr=5e-3, token_vectors=1),
            ("attention",),
            "Gal et al. 2022: one vector from the class word's, rate 5e-3; no layer changes. Small, gentle, and not "
            "always whole: more vectors hold more.",
        ),
        "p+": Preset(
            TrainSettings(method="words", steps=500, batch=8, token_lr=5e-3, token_vectors=1, layerwise=True),
            ("attention",),
            "Voynov et al. 2023: Textual Inversion with a vector for each cross-attention layer; says more in fewer "
            "steps. Only this program draws with it: an exported embedding is the mean of the layers.",
        ),
        "custom diffusion": Preset(
            TrainSettings(
                method="custom_diffusion",
                steps=250,
                adapter_lr=4e-5,
                token_lr=4e-5,
                token_vectors=2,
                token_start=_RANDOM,
                flip=True,
            ),
            ("cross_attention_kv",),
            "Kumari et al. 2023: the key and value weights of every cross-attention, whole, and a rare word before the "
            "class word, beside 200 pictures that the base draws first. A large file; its own merge is exact on the "
            "concepts' words.",
            prior=200,
        ),
        "lora": Preset(
            TrainSettings(method="lora", rank=8, steps=500, adapter_lr=1e-4, token_lr=1e-3, token_vectors=2),
            ("attention", "feed_forward"),
            "A plain LoRA with a learned word: one concept by itself. Several of them in one model mix.",
        ),
    }
)


def preset_named(name: str) -> Preset:
    """Raises AdapterError for a name that there is not."""
    if name not in PRESETS:
        raise AdapterError(f"there is no preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
