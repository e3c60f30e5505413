"""Concepts of the toy base that nobody trained: right in form, random in content, made in milliseconds."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch

from modular_concepts.adapters.basis import OrthogonalBasis
from modular_concepts.adapters.low_rank import new_lora
from modular_concepts.concept import Concept
from modular_concepts.models.layers import find_layers
from modular_concepts.models.targets import Targets, concept_layers
from modular_concepts.toy.base import load_toy_base
from modular_concepts.training.methods import new_adapters, seeded
from modular_concepts.training.run import TrainResult
from modular_concepts.training.settings import TrainSettings
from modular_concepts.training.teach import Subject, concept_from

toy_base = cache(load_toy_base)
CONVOLUTIONS = {"unet.down_blocks.1.attentions.0.proj_in": (1, 1), "unet.down_blocks.0.resnets.0.conv1": (3, 3)}


def made_concept(name: str, method: str = "orthogonal", basis: OrthogonalBasis | None = None, **settings) -> Concept:
    """As a training of `settings` would leave it, with noise for what it learned."""
    base, targets = toy_base(), Targets(("attention",))
    basis = basis or OrthogonalBasis()
    chosen = TrainSettings(method=method, name=name, **{"rank": 8, "slot": 0, **settings})
    generator = seeded(chosen.slot, name)
    layers = {
        layer: adapter.replace(lora_up=0.02 * torch.randn(adapter.lora_up.shape, generator=generator))
        for layer, adapter in new_adapters(concept_layers(base, targets), chosen, basis).items()
    }
    tokens = {f"<{name}>": base.word_rows("dog") + 0.05 * torch.randn(2, 128, generator=generator)}
    subject = Subject(name, torch.zeros(4, 3, 32, 32), [f"a <{name}>"] * 4, "dog")
    result = TrainResult(layers, tokens, [], 1, True, chosen)
    return concept_from(base, subject, result, basis, targets)


def with_recipe(concept: Concept, **changes) -> Concept:
    return replace(concept, recipe=replace(concept.recipe, **changes))


def foreign_concept(name: str) -> Concept:
    """One that belongs to Stable Diffusion 1.5."""
    concept = made_concept(name)
    return with_recipe(concept, architecture="sd15", base_hash="0123456789abcdef")


def wide_concept():
    """A concept on every kind of layer: all Linear ones of U-Net and text encoder, 1x1 and 3x3 convolutions."""
    base = toy_base()
    layers = dict(find_layers(base.unet, base.text_encoder, "all_linear", "all_linear"))
    modules = {f"unet.{name}": module for name, module in base.unet.named_modules()}
    layers |= {name: modules[name] for name in CONVOLUTIONS}
    generator, adapters = seeded(9, "wide"), {}
    for name, module in layers.items():
        out, inp = module.weight.shape[:2]
        adapter = new_lora(out, inp, 3, 6.0, generator, CONVOLUTIONS.get(name))
        adapters[name] = adapter.replace(lora_up=0.05 * torch.randn(out, 3, generator=generator))
    return replace(made_concept("wide", "lora"), layers=adapters)
