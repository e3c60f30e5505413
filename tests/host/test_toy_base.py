"""The toy base in the host is the toy base without one: same function, same pictures, real host objects."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import toy_base_nodes
from laws import relative_error
from safetensors.torch import load_file, save_file

from modular_concepts.models.layers import file_key, find_layers
from modular_concepts.toy.base import load_toy_base
from modular_concepts.toy.model import WEIGHTS

SIZES = [(32, 32), (64, 32), (96, 32)]  # width, height in pixels
PROMPTS = [
    "a man with green hair and striped red shirt on the beach",
    "a robot and a dog at night, neon style",
    "a zebra",
    "",
]
TRIGGER = "<mine>"
STRENGTH = 0.7


@pytest.fixture(scope="module")
def base():
    folder = Path(os.environ.get("MODULAR_CONCEPTS_TOY_WEIGHTS", WEIGHTS))
    if not (folder / "unet.safetensors").is_file():
        pytest.fail(f"the toy base's weights are not in {folder}")
    return folder, load_toy_base(folder)


@pytest.fixture(scope="module")
def asked(base, folder):
    """(the host's folder, tensors that both sides compute on, the plan)."""
    weights, toy = base
    generator = torch.Generator().manual_seed(5)
    tensors = {f"noisy.{w}x{h}": torch.randn(3, 12, h // 2, w // 2, generator=generator) for w, h in SIZES}
    tensors["timesteps"] = torch.tensor([0, 437, 999])
    tensors["context"] = toy.context([*PROMPTS[:2], ""], {})
    tensors["token"] = toy.embedding.weight[[30, 40, 50]] + 0.1 * torch.randn(3, 128, generator=generator)
    tensors["picture"] = torch.rand(2, 3, 32, 64, generator=generator)
    plan = {
        "weights": str(weights),
        "sizes": SIZES,
        "prompts": PROMPTS,
        "trigger": TRIGGER,
        "trigger_prompt": f"a {TRIGGER} man on the beach",
        "trigger_weighted": f"a ({TRIGGER}:1.4) man on the beach",
        "embedding_prompt": "a embedding:learned man on the beach",
        "seed": 11,
        "steps": 8,
        "cfg": 4.0,
        "samplers": ["dpmpp_2m", "uni_pc"],
    }
    save_file({"emb_params": tensors["token"]}, folder / "learned.safetensors")
    save_file(_stock_lora(toy, generator)[1], folder / "stock_lora.safetensors")
    return folder, tensors, plan


@pytest.fixture(scope="module")
def found(asked, replaced, warnings):
    """(tensors, facts)."""
    folder, tensors, plan = asked
    found, facts = toy_base_nodes.looked_at(tensors, plan, folder, replaced, warnings)
    return {key: value.float().clone() for key, value in found.items()}, facts


def _stock_lora(toy, generator):
    """A LoRA on every Linear layer of attention and feed-forward, as kohya's trainer names its keys."""
    layers = find_layers(toy.unet, toy.text_encoder, ("attention", "feed_forward"), ("attention", "feed_forward"))
    file = {}
    for name, layer in layers.items():
        key, (out, width) = file_key(name), layer.weight.shape
        file[f"{key}.lora_down.weight"] = torch.randn(4, width, generator=generator) / width**0.5
        file[f"{key}.lora_up.weight"] = torch.randn(out, 4, generator=generator) * 0.5
        file[f"{key}.alpha"] = torch.tensor(2.0)
    return layers, file


@pytest.fixture
def with_lora(asked, base):
    """The headless base with the stock LoRA added to its weights, put back afterwards."""
    toy = base[1]
    layers = find_layers(toy.unet, toy.text_encoder, ("attention", "feed_forward"), ("attention", "feed_forward"))
    file = load_file(asked[0] / "stock_lora.safetensors")
    kept = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    for name, layer in layers.items():
        key = file_key(name)
        scale = STRENGTH * file[f"{key}.alpha"] / 4
        layer.weight.data += scale * file[f"{key}.lora_up.weight"] @ file[f"{key}.lora_down.weight"]
    yield toy, len(layers)
    for name, layer in layers.items():
        layer.weight.data.copy_(kept[name])


@torch.no_grad()
def _velocity(toy, asked, size):
    tensors = asked[1]
    noisy = tensors[f"noisy.{size[0]}x{size[1]}"]
    return toy.predict(noisy, tensors["timesteps"], tensors["context"])


def test_what_is_loaded_are_the_hosts_own_objects_and_nothing_is_amiss(found):
    facts = found[1]
    assert facts["real"] == [True, True, True]
    assert not [line for line in facts["warnings"] if "missing" in line or "unexpected" in line.lower()], facts
    assert not [line for line in facts["warnings"] if "config object" in line], facts


def test_the_noise_schedule_is_the_one_it_was_trained_on(base, found):
    kept = base[1].schedule.alphas_cumprod.double()
    assert relative_error(found[0]["sigmas"].double(), ((1 - kept) / kept).sqrt()) < 1e-5


@pytest.mark.parametrize("size", SIZES)
def test_the_host_predicts_what_diffusers_predicts(base, asked, found, size):
    expected = _velocity(base[1], asked, size)
    assert relative_error(found[0][f"velocity.{size[0]}x{size[1]}"], expected) < 1e-5
    assert expected.std() > 0.1


@pytest.mark.parametrize("size", SIZES)
def test_core_empty_latents_take_the_toy_shape(found, size):
    assert found[1][f"empty.{size[0]}x{size[1]}"] == [1, 12, size[1] // 2, size[0] // 2]


@pytest.mark.parametrize("index", range(len(PROMPTS)))
@torch.no_grad()
def test_core_text_encoding_gives_the_transformers_context(base, found, index):
    expected = base[1].context([PROMPTS[index]], {})
    assert relative_error(found[0][f"context.{index}"], expected) < 1e-5


@pytest.mark.parametrize("way", ["trigger", "embedding"])
@torch.no_grad()
def test_learned_vectors_stand_where_the_trigger_stands(base, asked, found, way):
    expected = base[1].context([asked[2]["trigger_prompt"]], {TRIGGER: asked[1]["token"]})
    assert relative_error(found[0][f"context.{way}"], expected) < 1e-5
    assert relative_error(expected, base[1].context(["a man man man man on the beach"], {})) > 1e-2


@torch.no_grad()
def test_prompt_weights_scale_the_distance_from_the_empty_prompt(base, asked, found):
    plain, empty = found[0]["context.trigger"], base[1].context([""], {})
    expected = plain.clone()
    expected[:, 2:5] = empty[:, 2:5] + 1.4 * (plain - empty)[:, 2:5]
    assert relative_error(found[0]["context.trigger_weighted"], expected) < 1e-5


def test_long_prompts_become_sections_of_forty_tokens(found):
    assert found[0]["context.long"].shape == (1, 80, 128)


def test_the_vae_loses_nothing(base, asked, found):
    picture = asked[1]["picture"]
    assert relative_error(found[0]["latent"], base[1].encode(picture)) < 1e-6
    assert relative_error(found[0]["decoded"], picture) < 1e-6
    assert relative_error(found[0]["decoded_tiled"], picture) < 1e-5
    assert found[0]["latent_odd"].shape == (2, 12, 15, 14)


def test_previews_show_the_picture_at_full_size(asked, found):
    assert found[1]["preview"] == [64, 32]
    assert found[1]["previews"] == asked[2]["steps"]


@torch.no_grad()
def test_core_ksampler_draws_what_euler_by_hand_draws(base, asked, found):
    toy, plan = base[1], asked[2]
    context = toy.context([plan["prompts"][0], ""], {})
    all_sigmas, sigmas = found[0]["sigmas"], found[0]["sampler_sigmas"]
    noise = torch.randn(1, 12, 16, 16, generator=torch.Generator().manual_seed(plan["seed"]))
    latent = noise * (1 + sigmas[0] ** 2).sqrt()
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        timestep = (all_sigmas.log() - sigma.log()).abs().argmin().expand(2)
        size = (1 + sigma**2).sqrt()
        v = toy.predict((latent / size).expand(2, -1, -1, -1), timestep, context)
        denoised, base_denoised = (latent / size**2 - v * sigma / size).chunk(2)
        denoised = base_denoised + plan["cfg"] * (denoised - base_denoised)
        latent = latent + (latent - denoised) / sigma * (following - sigma)
    assert relative_error(found[0]["sampled"], latent) < 1e-4
    assert relative_error(found[0]["picture"], toy.decode(latent)) < 1e-4


def test_other_core_samplers_draw_finite_pictures_that_differ_from_noise(asked, found):
    for name in asked[2]["samplers"]:
        picture = found[0][f"picture.{name}"]
        assert picture.isfinite().all() and picture.shape == (1, 3, 32, 32)
        assert relative_error(picture, found[0]["picture"]) < 0.5


@torch.no_grad()
def test_a_stock_lora_finds_every_layer(asked, found, with_lora):
    toy, layers = with_lora
    assert found[1]["lora_warnings"] == []
    assert sum(found[1]["lora_layers"]) == layers
    assert relative_error(found[0]["velocity.lora"], _velocity(toy, asked, SIZES[0])) < 1e-5
    assert relative_error(found[0]["velocity.lora"], found[0]["velocity.32x32"]) > 1e-2
    assert relative_error(found[0]["context.lora"], toy.context([PROMPTS[0]], {})) < 1e-5
    assert relative_error(found[0]["context.lora"], found[0]["context.0"]) > 1e-2


def test_patches_leave_the_loaded_model_as_it_was_and_it_loads_twice(found):
    assert found[1]["untouched"] and found[1]["second"]
