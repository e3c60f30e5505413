"""Promise 7 for merges: diffusers and peft load every method's merge as one LoRA and compute the same delta."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from laws import SHIFT, seeded

from modular_concepts.adapters.low_rank import block_rows, new_block, new_lora
from modular_concepts.concept import Concept, Recipe
from modular_concepts.files.diffusers import FILE_NAME, export_diffusers
from modular_concepts.merging import METHOD_HELP, Evidence, MergeOptions, merge_concepts
from modular_concepts.models.layers import find_layers

STRENGTHS = [0.6, 1.0, -0.5]
TEXT = 24


@pytest.fixture(scope="module")
def unet():
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SHIFT)
        return diffusers.UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16,), layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
            cross_attention_dim=TEXT, attention_head_dim=2, norm_num_groups=8,
        )  # fmt: skip


def concepts_for(layers, in_blocks):
    """Three concepts with an adapter for each layer."""
    found = []
    for slot in range(3):
        adapters = {}
        for number, (name, module) in enumerate(layers.items()):
            out, inp = module.weight.shape
            generator = seeded(100 * slot + number)
            made = (
                new_block(out, inp, 2, None, block_rows(out, 3, slot), generator)
                if in_blocks
                else new_lora(out, inp, 2, None, generator)
            )
            adapters[name] = made.replace(lora_up=torch.randn(made.lora_up.shape, generator=generator))
        found.append(SimpleNamespace(name=f"c{slot}", layers=adapters))
    return found


def evidence_for(concepts):
    moments = []
    for slot, concept in enumerate(concepts):
        inputs = {
            name: torch.randn(200, a.weight_shape[1], generator=seeded(slot)) for name, a in concept.layers.items()
        }
        moments.append({name: x.double().mT @ x.double() / len(x) for name, x in inputs.items()})
    return Evidence(moments, [torch.randn(2, TEXT, generator=seeded(slot)) for slot in range(3)], torch.eye(TEXT))


@pytest.mark.parametrize("how", METHOD_HELP)
def test_diffusers_computes_what_was_merged(unet, tmp_path, how):
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader

    layers = find_layers(unet, None, "attention")
    concepts = concepts_for(layers, how == "block")
    options = MergeOptions(density=0.4, rank=3)
    merged = merge_concepts(concepts, STRENGTHS, how, options=options, evidence=evidence_for(concepts))
    one = Concept("one", {name: layer.as_low_rank() for name, layer in merged.items()}, {}, Recipe("lora", 6, 6.0))
    export_diffusers(one, tmp_path / FILE_NAME)
    state, alphas = Loader.lora_state_dict(str(tmp_path), weight_name=FILE_NAME)
    Loader.load_lora_into_unet(state, alphas, unet, adapter_name="merged")
    try:
        for name in layers:
            delta = unet.get_submodule(name.removeprefix("unet.")).get_delta_weight("merged")
            wanted = merged[name].delta()
            assert (delta - wanted).norm() < 1e-5 * wanted.norm(), name
            assert wanted.norm() > 1e-2
    finally:
        unet.unload_lora()
