"""Concepts for their own words trained in the host: the headless concept, previews that show it, and no trace left."""

from __future__ import annotations

import comfy.sample
import comfy.utils
import pytest
import torch
from laws import relative_error
from left_behind import traces
from lessons import Material, Seen, lesson
from modular_concepts_pack.host.merging.weights import merge_into
from modular_concepts_pack.host.text.words import encode_prompt
from modular_concepts_pack.host.toy_base import load_toy_base
from modular_concepts_pack.host.training import train as training
from modular_concepts_pack.host.training.base import SAMPLER, draw, host_base
from modular_concepts_pack.modular_concepts.families.sd3 import SD3
from modular_concepts_pack.modular_concepts.merging.own_words import residuals_of, spoken
from modular_concepts_pack.modular_concepts.sampling import SampleSettings
from modular_concepts_pack.nodes.training_form import lora_of

from modular_concepts.data.dataset import filled_in, of_pictures
from modular_concepts.models.targets import Targets
from modular_concepts.toy import base as toy
from modular_concepts.toy.standard import BY_NAME, pictures_of
from modular_concepts.training.settings import TrainSettings
from modular_concepts.training.teach import Subject, train_concept

CASE = {
    "name": "gated",
    "settings": {"method": "own_words", "rank": 4, "steps": 8, "batch": 2, "token_vectors": 2},
    "targets": ["cross_attention_kv"],
    "learning_rate": 1e-2,
    "preview_every": 8,
}


@pytest.fixture(scope="module")
def trained(folder, replaced):
    """(what the host loaded, its concept, the losses, the headless concept and losses)."""
    replaced.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0.0)
    replaced.setattr(comfy.utils, "PROGRESS_BAR_HOOK", None)
    drawn, captions = pictures_of(BY_NAME["tom"], 4)
    texts = [text.replace("<tom>", "{concept}") for text in captions]
    loaded, seen = load_toy_base(), Seen()
    before = traces(*loaded[:2])
    concept, result = training.train_in_host(host_base(*loaded), lesson(Material("toy", drawn, texts), CASE))
    assert traces(*loaded[:2]) == before and seen.previews == [["JPEG", 256, 256]]
    data = filled_in(of_pictures(list(drawn), texts, None, (32, 32)), ("<gated>",))
    known = TrainSettings.__dataclass_fields__
    settings = TrainSettings(**{key: value for key, value in concept.recipe.training.items() if key in known})
    subject = Subject("gated", data.pictures, data.captions, "man", data.masks, data.fingerprint, "")
    expected = train_concept(toy.load_toy_base(), subject, settings, Targets(("cross_attention_kv",)))
    return loaded, concept, result.losses, expected


def test_the_host_trains_the_headless_concept(trained):
    _, concept, losses, (expected, result) = trained
    assert concept.recipe.to_json() == expected.recipe.to_json() and concept.recipe.method == "own_words"
    assert losses == pytest.approx(result.losses, rel=1e-5)
    assert concept.layers.keys() == expected.layers.keys()
    for name, adapter in expected.layers.items():
        assert relative_error(concept.layers[name].lora_up, adapter.lora_up) < 1e-3, name
        assert adapter.lora_up.abs().max() > 1e-3
    assert relative_error(concept.tokens["<gated>"], expected.tokens["<gated>"]) < 1e-5


@torch.no_grad()
def test_a_preview_shows_what_is_drawn_with_it_later(trained):
    (model, clip, vae), concept, _, _ = trained
    base, settings = host_base(model, clip, vae), SampleSettings(steps=3, cfg=2.0, height=32, width=32)
    rows, prompt = dict(concept.tokens), "a dog and <gated>, <gated>"
    tokens = spoken([], residuals_of(concept, 1.0), lambda _: rows["<gated>"])
    shown, words_alone = (draw(base, [prompt], [1], each, settings) for each in (tokens, rows))
    merged, knowing = merge_into(model, clip, [(concept, 1.0)])
    positive, negative = (encode_prompt(knowing, text) for text in (prompt, settings.negative))
    noise = torch.randn(1, 12, 16, 16, generator=torch.Generator().manual_seed(1))
    how = (settings.steps, settings.cfg, *SAMPLER, positive, negative, torch.zeros_like(noise))
    later = base.decode(comfy.sample.sample(merged, noise, *how, disable_pbar=True, seed=0))
    assert relative_error(later, shown) < 1e-5 and relative_error(words_alone, shown) > 1e-3
    two = draw(base, [prompt, "a <gated>"], [1, 2], tokens, settings)
    assert relative_error(two[:1], shown) < 1e-5 and relative_error(two[1:], shown) > 1e-3


def test_no_plain_loader_takes_its_layers_for_a_lora(trained):
    _, concept, _, _ = trained
    assert all(key.startswith("own_words.") for key in lora_of(concept))


def test_a_family_without_a_layer_for_it_is_refused_by_name():
    rates = training.Rates(1e-3, 1e-3)
    with pytest.raises(ValueError, match="Stable Diffusion 3 reads text and picture in one attention"):
        training.settings_for(SD3, rates, method="own_words", steps=8)
    assert training.settings_for(SD3, rates, method="lora", steps=8).method == "lora"
