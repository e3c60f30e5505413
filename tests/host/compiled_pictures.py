"""In the host: concepts by hooks on a MODEL that was compiled, before or after, and where a kernel is fused."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from comfy_api.torch_helpers import set_torch_compile_wrapper
from modular_concepts_pack.host.merging import fusion
from modular_concepts_pack.host.merging import weights as patching
from modular_concepts_pack.host.regions import sampling as regions
from modular_concepts_pack.host.text.words import encode_prompt as encode
from modular_concepts_pack.host.toy_base import load_toy_base
from modular_concepts_pack.modular_concepts.regions.geometry import Region

import nodes


@torch.inference_mode()
def drawn(concept, warnings: list[str]) -> tuple[dict[str, torch.Tensor], dict]:
    """(pictures, what was said while each was drawn)."""
    model, clip, _ = load_toy_base()
    layers = {name: own for name, own in concept.layers.items() if name.startswith("unet.")}
    concept = replace(concept, tokens={}, layers=layers)
    latent = {"samples": torch.zeros(1, 12, 16, 16)}
    texts = [encode(clip, text) for text in ("a man on the beach", "tree")]
    found, said = {}, {}

    def draw(model) -> torch.Tensor:
        return nodes.common_ksampler(model, 5, 1, 3.0, "euler", "normal", *texts, latent)[0]["samples"].clone()

    def compiled(model):
        model = model.clone()
        set_torch_compile_wrapper(model, backend="eager")
        return model

    def activations(model, strength=1.0):
        return patching.merge_into(model, clip, [(concept, strength)], beside=True)[0]

    def gated(model):
        region = Region("a man on the beach", (0.0, 0.0, 0.5, 1.0), concepts=("tom",))
        prompts = ("a man on the beach", "tree")
        ready = regions.with_regions(
            regions.HostModel(model, clip), regions.Scene([(concept, 1.0)], [region], prompts, "gated")
        )
        return nodes.common_ksampler(ready.model, 5, 1, 3.0, "euler", "normal", *ready[1:], latent)[0]["samples"]

    def note(title: str, attempt) -> None:
        before = len(warnings)
        found[title] = attempt()
        said[title] = [line for line in warnings[before:] if "layer" in line]

    note("base", lambda: draw(model))
    for strength in (1.0, 0.3):
        note(f"plain|{strength}", lambda strength=strength: draw(activations(model, strength)))
    note("plain|gated", lambda: gated(model))
    traced = compiled(model)
    note("compiled|base", lambda: draw(traced))
    for strength in (1.0, 0.3):
        note(f"compiled|{strength}", lambda strength=strength: draw(activations(traced, strength)))
    note("compiled|gated", lambda: gated(traced))
    note("compiled|base afterwards", lambda: draw(traced))
    later = compiled(activations(model))
    note("compiled later|1.0", lambda: draw(later))
    note("compiled later|again", lambda: draw(later))
    asked = fusion.Drawing(["a man"], 1, 1, 32)
    said["recorded"] = sorted(fusion.record(fusion.HostModel(traced, clip), concept, asked)) == sorted(layers)

    block = model.model.diffusion_model.middle_block[1].transformer_blocks[0].attn1
    block.compile(backend="eager")
    note("in place|base", lambda: draw(model))
    note("in place|1.0", lambda: draw(activations(model)))
    note("in place|gated", lambda: gated(model))
    block._compiled_call_impl = None

    plain = block.to_q
    block.to_q = FusedKernel(plain)
    for title, way in (("activations", lambda: draw(activations(model))), ("gated", lambda: gated(model))):
        note(f"fused|{title}", way)
    block.to_q = plain
    return found, said


class FusedKernel(torch.nn.Linear):
    """A layer whose products are made without it being called, as a kernel that joins several layers does."""

    def __init__(self, layer: torch.nn.Module):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x), self.bias)
