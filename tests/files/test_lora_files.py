"""Promise 7: LoRAs of any program, read by what each key is; what finds no place is named, key by key."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from laws import seeded
from safetensors.torch import load_file, save_file

from modular_concepts.adapters.low_rank import shaped_for
from modular_concepts.errors import AdapterError
from modular_concepts.files.concept import save_concept
from modular_concepts.files.diffusers import export_diffusers
from modular_concepts.files.kohya import export_kohya
from modular_concepts.files.lora import IDLE, Place, by_rule, import_lora, lora_concept, read_concept

CONV = "unet.down_blocks.0.resnets.0.conv1"
KOHYA_CONV = "lora_unet_down_blocks_0_resnets_0_conv1"


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def locon(rank_up: int = 5, rank_down: int = 5, side: int = 3) -> dict[str, torch.Tensor]:
    """LyCORIS' layout of a convolution 8 -> 6 with a middle factor."""
    return {
        f"{KOHYA_CONV}.lora_up.weight": random(6, rank_up, 1, 1),
        f"{KOHYA_CONV}.lora_mid.weight": random(rank_up, rank_down, side, side, seed=1),
        f"{KOHYA_CONV}.lora_down.weight": random(rank_down, 8, 1, 1, seed=2),
        f"{KOHYA_CONV}.alpha": torch.tensor(2.0, dtype=torch.float64),
    }


@pytest.mark.parametrize(("ranks", "side"), [((5, 5), 3), ((5, 3), 3), ((4, 4), 1)])
def test_a_middle_factor_is_the_chain_of_three_convolutions(ranks, side):
    tensors = locon(*ranks, side)
    concept, unmatched = lora_concept(Path("x"), tensors, {})
    assert unmatched == []
    picture = random(2, 8, 7, 9, seed=3)
    down, mid, up = (tensors[f"{KOHYA_CONV}.lora_{part}.weight"] for part in ("down", "mid", "up"))
    chain = F.conv2d(F.conv2d(F.conv2d(picture, down), mid, padding=side // 2), up) * (2.0 / ranks[1])
    ours = F.conv2d(picture, concept.layers[CONV].delta(), padding=side // 2)
    assert torch.allclose(ours, chain, rtol=1e-12, atol=1e-12)
    assert chain.abs().max() > 1


def test_a_small_file_cannot_ask_for_much_memory_by_its_middle_factor():
    tensors = locon() | {f"{KOHYA_CONV}.lora_mid.weight": torch.ones(50000, 1, 1, 1)}
    tensors |= {f"{KOHYA_CONV}.lora_down.weight": torch.ones(1, 50000, 1, 1)}
    with pytest.raises(AdapterError, match="x: .*lora_mid .* does not fit"):
        lora_concept(Path("x"), tensors, {})
    with pytest.raises(AdapterError, match="x: .*lora_mid .* does not fit"):
        lora_concept(Path("x"), locon(side=9), {})


@pytest.mark.parametrize("export", [export_kohya, export_diffusers])
def test_the_form_of_a_file_is_found_by_its_keys(concept, tmp_path, export):
    export(concept, tmp_path / "x.safetensors")
    found, unmatched = import_lora(tmp_path / "x.safetensors")
    assert unmatched == [] and set(found.layers) == set(concept.layers) and found.recipe.architecture == "toy"
    for name, adapter in concept.layers.items():
        assert torch.allclose(found.layers[name].delta(), adapter.delta(), rtol=1e-6, atol=1e-7)
        assert adapter.delta().abs().max() > 1e-2


NAMES = {
    "lora_unet_mid_block_attentions_0_proj_in": "unet.mid_block.attentions.0.proj_in",
    "lycoris_down_blocks_0_resnets_0_conv1": CONV,
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q": (
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    ),
    "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k": (
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    ),
    "diffusion_model.input_blocks.8.0.in_layers.2": "unet.down_blocks.2.resnets.1.conv1",
    "diffusion_model.input_blocks.3.0.op": "unet.down_blocks.0.downsamplers.0.conv",
    "diffusion_model.middle_block.2.out_layers.3": "unet.mid_block.resnets.1.conv2",
    "diffusion_model.middle_block.1.proj_in": "unet.mid_block.attentions.0.proj_in",
    "diffusion_model.output_blocks.2.1.conv": "unet.up_blocks.0.upsamplers.0.conv",
    "diffusion_model.output_blocks.5.2.conv": "unet.up_blocks.1.upsamplers.0.conv",
    "diffusion_model.output_blocks.11.0.skip_connection": "unet.up_blocks.3.resnets.2.conv_shortcut",
    "diffusion_model.output_blocks.9.1.proj_out": "unet.up_blocks.3.attentions.0.proj_out",
    "diffusion_model.time_embed.0": "unet.time_embedding.linear_1",
    "diffusion_model.label_emb.0.2": "unet.add_embedding.linear_2",
    "diffusion_model.input_blocks.0.0": "unet.conv_in",
    "diffusion_model.joint_blocks.0.x_block.attn.qkv": "unet.joint_blocks.0.x_block.attn.qkv",
    "diffusion_model.input_blocks.1.0.emb_layers.9": None,
    "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1": (
        "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    ),
    "text_encoders.clip_g.transformer.text_model.encoder.layers.3.self_attn.q_proj": (
        "text_encoder_2.text_model.encoder.layers.3.self_attn.q_proj"
    ),
    "diffusion_model.middle_block.1.a b": None,
}


@pytest.mark.parametrize("stem", NAMES)
def test_modules_are_known_by_any_of_their_names(stem):
    assert by_rule(stem) == NAMES[stem]


def test_every_key_without_a_place_is_named(make_concept, tmp_path):
    export_kohya(make_concept("lora"), tmp_path / "x")
    strange = {
        "diffusion_model.middle_block.1.norm.diff": torch.ones(8),
        "diffusion_model.middle_block.1.proj_in.diff_b": torch.ones(8),
        "bundle_emb.word": torch.ones(2, 8),
        "lora_te3_encoder_block_0.lora_up.weight": torch.ones(4, 2),
        "lora_te3_encoder_block_0.lora_down.weight": torch.ones(2, 4),
        "lora_unet_mid_block_attentions_0_proj_out.hada_w1_a": torch.ones(4, 2),
        "unet.mid_block.attentions.0.proj_out.lora_magnitude_vector": torch.ones(4),
    }
    save_file(load_file(tmp_path / "x") | strange, tmp_path / "y")
    found, unmatched = import_lora(tmp_path / "y")
    assert set(unmatched) == set(strange)
    assert set(found.layers) == set(make_concept("lora").layers)


def test_a_file_that_fits_nowhere_is_refused(tmp_path):
    save_file({"double_blocks.0.img_attn.qkv.lora_A.weight": torch.ones(2, 4)}, tmp_path / "flux.safetensors")
    with pytest.raises(AdapterError, match=r"flux\.safetensors: none of its 1 keys fits"):
        import_lora(tmp_path / "flux.safetensors")


LAYER = "unet.joint_blocks.0.x_block.attn.qkv"


def places(stem: str) -> Place | None:
    """As a host tells of diffusers' names for a layer that is one in the model."""
    known = {"to_q": (0, 6), "to_k": (6, 6), "to_v": (12, 6)}
    part = stem.rpartition(".")[2]
    return Place(LAYER, known[part]) if part in known else None


def test_queries_keys_and_values_become_rows_of_one_layer():
    tensors, wanted = {}, torch.zeros(18, 8, dtype=torch.float64)
    for number, part in enumerate(("to_v", "to_q")):
        stem, start = f"transformer.transformer_blocks.0.attn.{part}", {"to_q": 0, "to_v": 12}[part]
        up, down = random(6, 3 + number, seed=number), random(3 + number, 8, seed=7 + number)
        tensors |= {f"{stem}.lora_B.weight": up, f"{stem}.lora_A.weight": down}
        wanted[start : start + 6] = 2 * up @ down
    settings = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 6, "transformer.r": 3})}
    tensors["transformer.transformer_blocks.0.attn.to_q.alpha"] = torch.tensor(8.0)
    concept, unmatched = lora_concept(Path("x"), tensors, settings, None, places, {LAYER: (18, 8)})
    assert unmatched == [] and set(concept.layers) == {LAYER}
    assert torch.allclose(concept.layers[LAYER].delta(), wanted) and wanted.abs().max() > 1
    with pytest.raises(AdapterError, match="from row 0: the adapter is for"):
        lora_concept(Path("x"), tensors, {}, None, places, {LAYER: (18, 9)})


def test_a_convolution_without_its_kernel_and_a_linear_layer_with_one_are_put_right(make_concept, tmp_path):
    flat = {key: value.flatten(1) if value.dim() > 1 else value for key, value in locon().items()}
    del flat[f"{KOHYA_CONV}.lora_mid.weight"]
    adapter = lora_concept(Path("x"), flat, {}).concept.layers[CONV]
    wide = adapter.replace(lora_down=random(5, 8 * 9))
    shaped = shaped_for(wide, (6, 8, 3, 3))
    assert shaped.weight_shape == (6, 8, 3, 3)
    assert torch.equal(shaped.delta().flatten(1), wide.delta())
    assert shaped_for(shaped, (6, 72)) is shaped and shaped_for(wide, (6, 73)) is wide
    pointed = adapter.replace(lora_down=adapter.lora_down[:, :, None, None])
    assert torch.equal(shaped_for(pointed, (6, 8)).delta(), adapter.delta())


def test_a_concept_says_that_it_was_imported(make_concept, tmp_path):
    concept = dataclasses.replace(make_concept("lora"), name="kodo")
    export_kohya(concept, tmp_path / "k.safetensors")
    assert import_lora(tmp_path / "k.safetensors").concept.recipe.origin == {"imported_from": "kohya"}
    assert import_lora(tmp_path / "k.safetensors").concept.about == {"title": "kodo"}


def two_layers(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    """Two convolutions of rank 2; changes: up, down or alpha of both."""
    tensors = {}
    for stem in (KOHYA_CONV, KOHYA_CONV.replace("conv1", "conv2")):
        parts = {"up": torch.ones(6, 2, 1, 1), "down": torch.ones(2, 8, 3, 3), "alpha": torch.tensor(2.0)} | changes
        tensors |= {
            f"{stem}.{name if name == 'alpha' else f'lora_{name}.weight'}": part.clone() for name, part in parts.items()
        }
    return tensors


NOTHING = {
    "alpha 0": {"alpha": torch.tensor(0.0)},
    "alpha -0": {"alpha": torch.tensor(-0.0)},
    "denormal alpha": {"alpha": torch.tensor(1e-42)},
    "up 0": {"up": torch.zeros(6, 2, 1, 1)},
    "down -0": {"down": -torch.zeros(2, 8, 3, 3)},
}


@pytest.mark.parametrize("kind", NOTHING)
def test_a_file_that_changes_nothing_is_told_in_one_sentence(tmp_path, kind):
    path = tmp_path / "x.safetensors"
    save_file(two_layers(**NOTHING[kind]), path)
    for read in (import_lora, read_concept):
        assert read(path).notes("x.safetensors") == [f"x.safetensors: {IDLE}"]
    one = next(iter(NOTHING[kind]))
    whole = two_layers(**NOTHING[kind])
    key = next(key for key in whole if one in key.rsplit("conv2")[-1] and "conv2" in key)
    save_file(whole | {key: two_layers()[key]}, path)  # one layer that does something
    assert import_lora(path).notes("x") == []


def test_a_concept_file_that_changes_nothing_is_told_unless_it_brings_a_word(tmp_path):
    concept, _ = lora_concept(Path("x"), two_layers(up=torch.zeros(6, 2, 1, 1)), {})
    save_concept(concept, tmp_path / "x.safetensors")
    assert read_concept(tmp_path / "x.safetensors").sentences == [IDLE]
    recipe = dataclasses.replace(concept.recipe, triggers=("<x>",))
    save_concept(
        dataclasses.replace(concept, recipe=recipe, tokens={"<x>": torch.ones(1, 8)}), tmp_path / "y.safetensors"
    )
    assert read_concept(tmp_path / "y.safetensors").sentences == []
