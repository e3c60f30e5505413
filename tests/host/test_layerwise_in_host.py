"""Layer-wise words in the host: each layer hears its own rows, in one batch with the negative prompt, by region too."""

from __future__ import annotations

from dataclasses import replace

import comfy.sd
import layerwise_pictures as pictures
import pytest
import torch
from laws import relative_error
from made_concepts import made_concept, toy_base
from modular_concepts_pack.host.toy_base import load_toy_base

from modular_concepts.concept import Concept, Recipe
from modular_concepts.files.concept import save_concept
from modular_concepts.sampling import customised

LAYERS = 4  # of the toy base and of the tiny checkpoint
MODELS = ["", "sd_"]


def words(width: int, size: float) -> dict[str, torch.Tensor]:
    """The same two vectors once and for each layer, and other ones for each layer."""
    generator = torch.Generator().manual_seed(4)
    rows = size * torch.randn(LAYERS, 2, width, generator=generator)
    return {"flat": rows[0], "even": rows[:1].expand(LAYERS, -1, -1).contiguous(), "varied": rows}


def concepts() -> dict[str, Concept]:
    made = made_concept("made")
    toy = {
        kind: replace(made, name=kind, tokens={f"<{kind}>": rows}, recipe=replace(made.recipe, triggers=(f"<{kind}>",)))
        for kind, rows in words(128, 0.5).items()
    }
    # Words alone, as Textual Inversion and P+ leave them.
    sd = {
        f"sd_{kind}": Concept(
            kind,
            {},
            {f"<{kind}>": rows},
            Recipe(method="words", architecture="sd15", triggers=(f"<{kind}>",), class_word="dog"),
        )
        for kind, rows in words(768, 0.3).items()
    }
    return toy | sd


@pytest.fixture(scope="module")
def found(folder, checkpoint):
    """(tensors, facts, what the toy base's network was asked)."""
    for name, concept in concepts().items():
        save_concept(concept, folder / f"{name}.safetensors")
    noisy = torch.randn(2, 12, 16, 16, generator=torch.Generator().manual_seed(8))
    on_toy = pictures.look("", load_toy_base()[:2], folder, 32, noisy)
    sd15 = comfy.sd.load_checkpoint_guess_config(str(checkpoint("sd15")), output_vae=False)[:2]
    on_sd = pictures.look("sd_", sd15, folder, 64, noisy)
    on_sdxl = pictures.look_at_sdxl(checkpoint("vega"))
    tensors, facts = on_toy[0] | on_sd[0] | on_sdxl[0], on_toy[1] | on_sd[1] | on_sdxl[1]
    facts["refused"] = on_toy[1]["refused"] | on_sd[1]["refused"] | pictures.refused_by_sd3(checkpoint("sd3"))
    return {key: value.float().clone() for key, value in tensors.items()}, facts, noisy


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("title", ["{}|euler", "{}|dpmpp_2m_sde", "long|{}", "negative|{}", "weighted|{}"])
def test_equal_rows_for_all_layers_are_the_flat_word(found, model, title):
    tensors, facts, _ = found
    assert facts[f"{model}layers"] == LAYERS
    even, flat = (tensors[model + title.format(kind)] for kind in ("even", "flat"))
    assert relative_error(even, flat) <= 1e-6 and flat.norm() > 0


@pytest.mark.parametrize("model", MODELS)
def test_each_layers_own_rows_are_heard(found, model):
    tensors, _, _ = found
    varied, flat = tensors[f"{model}varied|euler"], tensors[f"{model}flat|euler"]
    assert relative_error(varied, flat) > 1e-4
    contexts, mean = tensors[f"{model}contexts"], tensors[f"{model}context"]
    assert contexts.shape == (1, LAYERS, *mean.shape[1:])
    assert len({relative_error(contexts[0, i], contexts[0, 0]) for i in range(LAYERS)}) == LAYERS


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("title", ["varied", "long", "plain"])
def test_positive_and_negative_are_one_batch(found, model, title):
    assert found[1][f"{model}calls {title}"] == [2, 2, 2]


@pytest.mark.parametrize("model", MODELS)
def test_prompts_without_such_a_word_are_drawn_to_the_last_bit_as_without_layers(found, model):
    tensors, facts, _ = found
    assert torch.equal(tensors[f"{model}plain beside layers"], tensors[f"{model}plain"])
    assert facts[f"{model}plain keys"]
    assert facts[f"{model}wrapped"] == {"flat": 0, "even": 1, "varied": 1}
    assert not any(facts[f"{model}left"])


@torch.no_grad()
def test_the_network_hears_what_the_headless_one_hears(found):
    tensors, _, noisy = found
    base, concept = toy_base(), concepts()["varied"]
    with customised(base, [concept], [1.0]):
        by_layer = [base.context(["a <varied> in the snow"], {"<varied>": rows}) for rows in concept.tokens["<varied>"]]
        assert relative_error(tensors["contexts"][0], torch.cat(by_layer)) < 1e-5
        heard = iter(by_layer)

        def own(module, args, kwargs):
            # In the order in which the network runs them.
            return args, {**kwargs, "encoder_hidden_states": next(heard).expand(len(noisy), -1, -1)}

        layers = [part for name, part in base.unet.named_modules() if name.endswith("attn2")]
        handles = [layer.register_forward_pre_hook(own, with_kwargs=True) for layer in layers]
        expected = base.predict(noisy, torch.full((len(noisy),), 500), by_layer[0].expand(len(noisy), -1, -1))
        for handle in handles:
            handle.remove()
        plain = base.predict(noisy, torch.full((len(noisy),), 500), by_layer[0].expand(len(noisy), -1, -1))
        own = base.context(["a <varied> in the snow"] * len(noisy), concept.tokens)
        headless = base.predict(noisy, torch.full((len(noisy),), 500), own)
    assert next(heard, None) is None
    assert relative_error(tensors["predicted"], headless) < 1e-5
    assert relative_error(tensors["predicted"], expected) < 1e-5
    assert relative_error(tensors["predicted"], plain) > 1e-3


@pytest.mark.parametrize("model", MODELS)
def test_regions_listen_layer_by_layer(found, model):
    tensors, _, _ = found
    assert torch.equal(tensors[f"{model}everywhere|varied"], tensors[f"{model}varied|euler"])
    for title in ("half", "around"):
        even, flat, varied = (tensors[f"{model}{title}|{kind}"] for kind in ("even", "flat", "varied"))
        assert relative_error(even, flat) <= 1e-6
        assert relative_error(varied, flat) > 1e-5


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("core", "AdapterError: <varied> was learned for each layer apart, which this node cannot say"),
        ("core without it", ""),
        ("layers", f"AdapterError: <odd> was learned for 3 cross-attention layers, and this model has {LAYERS}"),
        ("none", "AdapterError: <odd> was learned for each cross-attention layer apart, and this model has none"),
    ],
)
def test_what_cannot_be_said_is_refused_in_plain_words(found, model, what, words):
    message = found[1]["refused"][model + what]
    assert message.startswith(words) and bool(message) == bool(words)
    assert what != "core" or "Concept Prompt" in message


def test_sdxl_hears_layer_by_layer_too(found):
    tensors, facts, _ = found
    layers = facts["sdxl_layers"]
    assert layers > LAYERS and facts["sdxl_contexts"][:2] == [1, layers] and facts["sdxl_contexts"][3] == 2048
    assert relative_error(tensors["sdxl_even"], tensors["sdxl_flat"]) <= 1e-6
    assert relative_error(tensors["sdxl_varied"], tensors["sdxl_flat"]) > 1e-5
    assert facts["sdxl_calls varied"] == [2, 2]


def test_a_diffusion_transformer_has_no_layers_for_words(found):
    refused = found[1]["refused"]
    assert refused["sd3_merged"].startswith("AdapterError: <varied> was learned for each cross-attention layer apart")
    assert refused["sd3_trained"].startswith("AdapterError: layer-wise words need a base whose cross-attention layers")
    assert refused["sd3_trained flat"] == ""
