"""In the host: concepts of a fused layer's projections on a tiny Stable Diffusion 3, in every way that they can act."""

from __future__ import annotations

import json

from in_host import FOLDER, pack_module, start

start()

import comfy.model_management
import tiny_models
import torch

torch.set_num_threads(1)
weights, gating = pack_module("host.merging.weights"), pack_module("host.regions.gating")
adapters, sites = pack_module("modular_concepts.adapters.low_rank"), pack_module("modular_concepts.adapters.sites")
concepts, geometry = pack_module("modular_concepts.concept"), pack_module("modular_concepts.regions.geometry")
shares, AdapterError = (
    pack_module("modular_concepts.regions.shares"),
    pack_module("modular_concepts.errors").AdapterError,
)

QKV = "unet.joint_blocks.0.x_block.attn.qkv"
tiny_models.write("sd3")
model, clip, _ = tiny_models.load("sd3", "float32")
network = model.model.diffusion_model
width = network.joint_blocks[0].x_block.attn.qkv.weight.shape[1]
SIDE, TEXT = 8, 5


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def concept(name: str, layers: dict[str, tuple[int, int]], seed: int):
    made = {
        layer: adapters.new_lora(*shape, 2, 2.0, generator(seed + number)).replace(
            lora_up=20 * torch.randn(shape[0], 2, generator=generator(seed + 50 + number))
        )
        for number, (layer, shape) in enumerate(layers.items())
    }
    return concepts.Concept(name, made, {}, concepts.Recipe(rank=2, architecture="sd3", triggers=(f"<{name}>",)))


parts = concept("parts", {f"{QKV}.q": (width, width), f"{QKV}.v": (width, width)}, 1)
whole = concepts.Concept("whole", sites.put_together(parts.layers), {}, parts.recipe)
other = concept("other", {QKV: (3 * width, width)}, 7)
x = torch.randn(1, 16, SIDE, SIDE, generator=generator(3))
context, pooled = torch.randn(1, TEXT, 4096, generator=generator(4)), torch.randn(1, 2048, generator=generator(5))


def answer(patcher, hooked=None) -> torch.Tensor:
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    with torch.no_grad():
        if hooked is None:
            return patcher.model.diffusion_model(x, torch.tensor([500.0]), context, y=pooled)
        with hooked:
            return patcher.model.diffusion_model(x, torch.tensor([500.0]), context, y=pooled)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def gated(box: tuple) -> torch.Tensor:
    stack = [(parts, 1.0)]
    gate = gating.HostGate(gating.HostModel(model, None), stack, [(), (0,)], shares.Places([geometry.Region("a", box)]))
    return answer(model, gate.attached(network, gating.Moment((SIDE, SIDE), lengths=(0,)), {}))


base = answer(model)
in_weights = answer(weights.merged(model, clip, [(parts, 1.0)])[0])
facts = {
    "effect": distance(in_weights, base),
    "whole": distance(answer(weights.merged(model, clip, [(whole, 1.0)])[0]), in_weights),
    "activations": distance(answer(weights.merged(model, clip, [(parts, 1.0)], beside=True)[0]), in_weights),
    "gated": distance(gated((0.0, 0.0, 1.0, 1.0)), in_weights),
    "half": distance(gated((0.0, 0.0, 0.5, 1.0)), base),
    "both": distance(
        answer(weights.merged(model, clip, [(parts, 1.0), (other, 0.5)])[0]),
        answer(weights.merged(model, clip, [(other, 0.5), (whole, 1.0)])[0]),
    ),
    "restored": bool(torch.equal(answer(model), base)),
}
wrong = concept("wrong", {f"{QKV}.q": (2 * width, width)}, 9)
try:
    weights.merged(model, clip, [(wrong, 1.0)])
except AdapterError as error:
    facts["wrong"] = str(error)
(FOLDER / "facts.json").write_text(json.dumps(facts))
