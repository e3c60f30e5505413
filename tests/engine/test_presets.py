"""Presets: every one can be trained with, says what it is, and keeps its method's own numbers on the toy base."""

from dataclasses import asdict, replace

import pytest
from untrained_toy import untrained_base

from modular_concepts.errors import AdapterError
from modular_concepts.toy.presets import on_toy_base
from modular_concepts.training.methods import new_adapters, new_words
from modular_concepts.training.presets import PRESETS, preset_named

PUBLISHED = {
    "orthogonal adaptation": {
        "method": "orthogonal",
        "rank": 20,
        "layerwise": True,
        "token_vectors": 2,
        "token_lr": 1e-3,
        "adapter_lr": 1e-5,
    },
    "ed-lora": {"method": "lora", "rank": 4, "token_start": "random + class", "token_norm": 0.55, "layerwise": True},
    "p+": {"method": "words", "layerwise": True, "token_lr": 5e-3, "steps": 500},
    "textual inversion": {"method": "words", "layerwise": False, "token_lr": 5e-3},
    "custom diffusion": {"method": "custom_diffusion", "steps": 250},
    "block lora": {"method": "block", "blocks": 15},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_what_is_published(name):
    own = asdict(PRESETS[name].settings)
    assert {key: own[key] for key in PUBLISHED[name]} == PUBLISHED[name]


def test_the_fast_one_differs_in_rate_and_steps_alone():
    paper, fast = (PRESETS[name] for name in ("orthogonal adaptation", "orthogonal adaptation, fast"))
    assert fast.settings == replace(paper.settings, adapter_lr=1e-4, steps=fast.settings.steps)
    assert fast.settings.steps < paper.settings.steps and fast.targets == paper.targets
    assert "Po et al. 2024" in paper.help and "Ours" in fast.help


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_fits_the_toy_base(name):
    preset = on_toy_base(PRESETS[name])
    before, after = asdict(PRESETS[name].settings), asdict(preset.settings)
    method = ("method", "layerwise", "token_start", "erasure", "layout", "noise_offset", "flip")
    assert {key: after[key] for key in method} == {key: before[key] for key in method}
    base, settings = untrained_base(), replace(preset.settings, slot=1, name="tom")
    adapters = new_adapters(base.layers(preset.targets, preset.text_encoder_targets), settings)
    assert bool(adapters) == (settings.method != "words")
    words = new_words({"<tom>": base.word_rows("man")}, settings, base.cross_attention_layers)
    assert words["<tom>"].shape[-2] == settings.token_vectors and (words["<tom>"].dim() == 3) == settings.layerwise


def test_a_preset_that_there_is_not_is_refused():
    with pytest.raises(AdapterError, match="no preset 'dora'; choose one of orthogonal adaptation,"):
        preset_named("dora")
