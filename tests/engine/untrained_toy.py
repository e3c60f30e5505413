"""The toy base as it is before training: real networks of the real size, with seeded random weights.

What holds for it holds whatever was learned; what the shipped weights draw is asked in test_toy_quality.py.
"""

import tempfile
from functools import cache
from pathlib import Path

import torch
from laws import SHIFT, seeded
from safetensors.torch import save_file
from torch import Tensor

from modular_concepts.concept import Concept, Recipe
from modular_concepts.models.base import BaseModel, weights_hash
from modular_concepts.models.targets import Targets, concept_layers
from modular_concepts.sampling import SampleSettings, sample
from modular_concepts.toy import model
from modular_concepts.toy.base import load_toy_base

QUICK = SampleSettings(steps=2, cfg=4.0)


def write_untrained(folder: Path, seed: int = 0) -> Path:
    """Weights as `load_toy_base` reads them; half precision, as the shipped ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + SHIFT)
        networks = {"unet": model.build_unet(), "text_encoder": model.build_text_encoder()}
    for name, network in networks.items():
        weights = {key: value.half().contiguous() for key, value in network.state_dict().items()}
        save_file(weights, folder / f"{name}.safetensors")
    return folder


@cache
def untrained_base() -> BaseModel:
    with tempfile.TemporaryDirectory() as folder:
        return load_toy_base(write_untrained(Path(folder)))


def picture(prompt: str, seed: int = 0, tokens=None, settings: SampleSettings = QUICK, regions=()) -> Tensor:
    """One picture (3, H, W) of the untrained base."""
    return sample(untrained_base(), [prompt], [seed], tokens, settings, regions)[0]


def filled_concept(name: str, seed: int) -> Concept:
    """A concept as a training could leave it: every attention layer moves, and one learned word of two rows."""
    from modular_concepts.adapters.low_rank import new_lora

    generator, base = seeded(seed), untrained_base()
    layers = {}
    for layer, module in concept_layers(base, Targets(("attention",))).items():
        adapter = new_lora(*module.weight.shape, 2, None, generator)
        up = 0.1 * torch.randn(adapter.lora_up.shape, generator=generator)
        layers[layer] = adapter.replace(lora_up=up)
    rows = torch.randn(2, base.embedding.embedding_dim, generator=generator)
    recipe = Recipe(
        rank=2, alpha=2.0, base_hash=base.hash, architecture="toy", triggers=(f"<{name}>",), class_word="man"
    )
    return Concept(name, layers, {f"<{name}>": rows}, recipe)


def traces(base: BaseModel) -> tuple[str, int, tuple[int, ...]]:
    """What promise 4 looks at: the weights' hash, the number of hooks, the identity of all processors."""
    modules = [module for network in (base.unet, base.text_encoder) for module in network.modules()]
    hooks = sum(
        len(getattr(module, kind))
        for module in modules
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )
    asking = sum(parameter.requires_grad for module in modules for parameter in module.parameters())
    processors = tuple(id(processor) for processor in base.unet.attn_processors.values())
    return weights_hash(base.unet, base.text_encoder), hooks + asking, processors
