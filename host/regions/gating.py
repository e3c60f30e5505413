"""Gated concepts in the host: each acts where its region is, beside weights that nobody changes.

The MODEL stays as it is.  For the length of each call of the network its layers have hooks that add the concepts'
residuals to their own positions (`modular_concepts/regions/gating.py`); an exception or a cancel ends them like any
return.  Each text is encoded by a CLIP with its own concepts alone.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
from torch import nn

from ...modular_concepts.adapters.sites import Site
from ...modular_concepts.errors import AdapterError
from ...modular_concepts.merging.compatibility import faded_words, fitted, fitting_concepts
from ...modular_concepts.regions.gating import Gate
from ...modular_concepts.regions.shares import Places
from ...modular_concepts.stack import Stack
from ..called import Called, uncompiled
from ..families.family import DENOISER
from ..layers import HostLayer, architecture_of, host_layers, host_places
from ..merging.weights import MergedWeight, is_inside
from ..text.layerwise import cross_attention_layers, refuse_other_layers
from ..text.words import class_words_of, learned_words, with_tokens, word_rows


class HostGate:
    """The gate of one MODEL, and what its calls of the network do with it."""

    def __init__(
        self,
        model: comfy.model_patcher.ModelPatcher,
        stack: Stack,
        texts: Sequence[tuple[int, ...]],
        places: Places,
    ):
        self.places = host_places(model, None)
        network = model.model.diffusion_model
        self.gate = Gate(stack, texts, places, {name: _in(network, place) for name, place in self.places.items()})
        self.watch = Called("gated concepts", "choose the merged mode")

    @contextmanager
    def attached(
        self,
        network: nn.Module,
        latent_size: tuple[int, int],
        progress: float,
        lengths: Sequence[int],
        options: Mapping | None,
    ) -> Generator[None]:
        """A block in which a network, the model's own or a copy on another device, has the concepts' residuals.

        lengths: how many tokens of the context each region's text has, behind the global one's.
        options: the call's transformer_options, which say whether the network was compiled.
        """
        self.watch.look_at(network, options)
        self.gate.now, self.gate.lengths = (latent_size, progress), lengths
        self.gate.called.clear()
        modules = {name: _in(network, self.places[name]) for name in self.gate.gated}
        with self.gate.attached(modules), uncompiled():
            yield
        self.watch.count([name for name in self.gate.gated if name not in self.gate.called], len(self.gate.gated))


def _in(network: nn.Module, place: HostLayer) -> nn.Module | Site:
    """A layer, or a site of one, in a network that may be a copy of the model's own."""
    module = network.get_submodule(place.key.removeprefix(DENOISER).removesuffix(".weight"))
    return module if place.rows is None else Site(cast(nn.Linear, module), *place.rows)


def fitting_stack(model: comfy.model_patcher.ModelPatcher, clip: comfy.sd.CLIP, stack: Stack) -> Stack:
    """The stack in the shapes of the model's weights.

    Raises AdapterError for concepts that do not fit it, or are in it already and so act everywhere.
    """
    for concept, _ in stack:
        if is_inside(model, concept):
            raise AdapterError(
                f"{concept.name} is merged into this model already, so it acts everywhere and no region can hold it; "
                "take the model and the text encoder from before Merge Concepts, or choose the merged mode"
            )
    shapes = {name: place.shape for name, place in host_places(model, clip).items()}
    concepts = fitting_concepts(architecture_of(model), shapes, Stack.of(stack).concepts)
    return Stack((concept, strength) for concept, (_, strength) in zip(concepts, stack, strict=True))


def check_memory(model: comfy.model_patcher.ModelPatcher, stack: Stack) -> None:
    """Raise AdapterError for more concepts than the device could hold even without the model, which can move away."""
    adapters = [own for concept, _ in stack for name, own in concept.layers.items() if name.startswith("unet.")]
    numbers = sum(own.out_features * own.rank + own.lora_down.numel() for own in adapters)
    needed = numbers * (model.model_dtype() or torch.float32).itemsize
    device = model.load_device
    room = comfy.model_management.get_total_memory(device) - comfy.model_management.minimum_inference_memory()
    if needed > room:
        raise AdapterError(
            f"these {len(stack)} concepts take {needed / 1e9:.2g} GB beside the model, and {device} has "
            f"{room / 1e9:.2g} GB for them; take fewer of them or of a smaller rank, or the merged mode, which keeps "
            "none apart"
        )


def with_words(model: comfy.model_patcher.ModelPatcher, clip: comfy.sd.CLIP, stack: Stack) -> comfy.sd.CLIP:
    """A CLIP that knows all learned words of the stack; no concept acts on it."""
    concepts, strengths = Stack.of(stack).concepts, Stack.of(stack).strengths
    words = faded_words(concepts, strengths, lambda text: word_rows(clip, text))
    refuse_other_layers(words, cross_attention_layers(model))
    return with_tokens(clip, words, class_words_of(concepts), learned_words(concepts))


def with_concepts(architecture: str, clip: comfy.sd.CLIP, stack: Stack) -> comfy.sd.CLIP:
    """A clone of a CLIP that reads with the concepts' text encoder layers; it knows their words already."""
    layers = host_layers(None, clip)
    shapes = {name: layer.shape for name, layer in layers.items()}
    there = [
        (replace(concept, layers={name: own for name, own in concept.layers.items() if name in shapes}), strength)
        for concept, strength in stack
    ]
    merged, _ = fitted(architecture, shapes, there)
    if not merged:
        return clip
    clip = clip.clone()
    clip.add_patches({layers[name].key: MergedWeight(set(), (layer, None)) for name, layer in merged.items()})
    return clip
