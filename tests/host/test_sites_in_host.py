"""Concepts of one projection of a fused layer act in the real host as on its whole weight."""

from __future__ import annotations

import comfy.model_management
import pytest
import tiny_models
import torch
from laws import relative_error
from modular_concepts_pack.host.merging.weights import merge_into
from modular_concepts_pack.host.regions.gating import HostGate, HostModel
from modular_concepts_pack.modular_concepts.adapters.low_rank import new_lora
from modular_concepts_pack.modular_concepts.adapters.sites import put_together
from modular_concepts_pack.modular_concepts.concept import Concept, Recipe
from modular_concepts_pack.modular_concepts.errors import AdapterError
from modular_concepts_pack.modular_concepts.regions.geometry import Region
from modular_concepts_pack.modular_concepts.regions.moment import Moment
from modular_concepts_pack.modular_concepts.regions.shares import Places

QKV = "unet.joint_blocks.0.x_block.attn.qkv"
SIDE, TEXT = 8, 5


@pytest.fixture(scope="module")
def loaded(checkpoint):
    """MODEL, CLIP and the width of the layer's input, on a tiny Stable Diffusion 3."""
    model, clip, _ = tiny_models.load(checkpoint("sd3"), "float32")
    return model, clip, model.model.diffusion_model.joint_blocks[0].x_block.attn.qkv.weight.shape[1]


@pytest.fixture(scope="module")
def concepts(loaded):
    """Of q and v each, the same on the whole weight, and another on the whole weight."""
    width = loaded[2]
    parts = made("parts", {f"{QKV}.q": (width, width), f"{QKV}.v": (width, width)}, 1)
    whole = Concept("whole", put_together(parts.layers), {}, parts.recipe)
    return parts, whole, made("other", {QKV: (3 * width, width)}, 7)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(name: str, layers: dict[str, tuple[int, int]], seed: int) -> Concept:
    adapters = {
        layer: new_lora(*shape, 2, 2.0, generator(seed + number)).replace(
            lora_up=20 * torch.randn(shape[0], 2, generator=generator(seed + 50 + number))
        )
        for number, (layer, shape) in enumerate(layers.items())
    }
    return Concept(name, adapters, {}, Recipe(rank=2, architecture="sd3", triggers=(f"<{name}>",)))


@torch.no_grad()
def answer(patcher) -> torch.Tensor:
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    x = torch.randn(1, 16, SIDE, SIDE, generator=generator(3))
    context, pooled = torch.randn(1, TEXT, 4096, generator=generator(4)), torch.randn(1, 2048, generator=generator(5))
    return patcher.model.diffusion_model(x, torch.tensor([500.0]), context, y=pooled)


def merged_answer(loaded, *stack, beside: bool = False) -> torch.Tensor:
    return answer(merge_into(*loaded[:2], list(stack), beside=beside)[0])


def gated_answer(loaded, concept: Concept, box: tuple[float, float, float, float]) -> torch.Tensor:
    model = loaded[0]
    gate = HostGate(HostModel(model, None), [(concept, 1.0)], [(), (0,)], Places([Region("a", box)]))
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    with gate.attached(model.model.diffusion_model, Moment((SIDE, SIDE), lengths=(0,)), {}):
        return answer(model)


def test_projections_of_a_fused_layer_are_merged_hooked_and_gated(loaded, concepts):
    parts, whole, other = concepts
    base, in_weights = answer(loaded[0]), merged_answer(loaded, (parts, 1.0))
    assert relative_error(in_weights, base) > 1e-2
    assert relative_error(merged_answer(loaded, (whole, 1.0)), in_weights) < 1e-5
    assert relative_error(merged_answer(loaded, (parts, 1.0), beside=True), in_weights) < 1e-5
    assert relative_error(gated_answer(loaded, parts, (0.0, 0.0, 1.0, 1.0)), in_weights) < 1e-5
    assert relative_error(gated_answer(loaded, parts, (0.0, 0.0, 0.5, 1.0)), base) > 1e-2
    both = merged_answer(loaded, (parts, 1.0), (other, 0.5))
    assert relative_error(both, merged_answer(loaded, (other, 0.5), (whole, 1.0))) < 1e-5
    assert torch.equal(answer(loaded[0]), base)


def test_a_projection_of_another_size_is_named(loaded):
    wrong = made("wrong", {f"{QKV}.q": (2 * loaded[2], loaded[2])}, 9)
    with pytest.raises(AdapterError, match="wrong, unet.joint_blocks.0.x_block.attn.qkv.q"):
        merge_into(*loaded[:2], [(wrong, 1.0)])
