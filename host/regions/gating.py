"""Gated concepts in the host: each acts where its region is, beside weights that nobody changes.

The MODEL stays as it is.  For the length of each call of the network its layers have hooks that add the concepts'
residuals to their own positions (`modular_concepts/regions/gating.py`); an exception or a cancel ends them like any
return.  Each text is encoded by a CLIP with its own concepts alone.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
from torch import nn

from ...modular_concepts.adapters.own_words import WordResidual
from ...modular_concepts.errors import AdapterError
from ...modular_concepts.merging.compatibility import fit, fitting_concepts, learned_words
from ...modular_concepts.regions.gating import Gate
from ...modular_concepts.regions.moment import Moment
from ...modular_concepts.regions.shares import Places
from ...modular_concepts.stack import Stack
from ..called import Called, uncompiled
from ..layers import host_layers
from ..merging.by_word import let_act, words_of_residuals
from ..merging.weights import MergedWeight, at_words, is_inside
from ..model import HostModel
from ..text.layerwise import refuse_other_layers
from ..text.words import with_words as clip_with_words


class HostGate:
    """The gate of one MODEL, and what its calls of the network do with it.

    by_word: as `Gate`.
    """

    def __init__(
        self,
        host: HostModel,
        stack: Stack,
        texts: Sequence[tuple[int, ...]],
        places: Places,
        by_word: Collection[int] = (),
    ):
        self.places = {name: place for name, place in host.places.items() if place.part == "unet"}
        layers = {name: place.found_in(host.network) for name, place in self.places.items()}
        self.gate = Gate(stack, texts, places, layers, by_word)
        self.watch = Called("gated concepts", "choose the merged mode")

    @contextmanager
    def attached(
        self,
        network: nn.Module,
        moment: Moment,
        options: Mapping | None,
    ) -> Generator[None]:
        """A block in which a network, the model's own or a copy on another device, has the concepts' residuals.

        options: the call's transformer_options, which say whether the network was compiled.
        """
        self.watch.look_at(network, options)
        self.gate.called.clear()
        modules = {name: self.places[name].found_in(network) for name in self.gate.gated}
        with self.gate.attached(modules, lambda: moment), uncompiled():
            yield
        self.watch.count([name for name in self.gate.gated if name not in self.gate.called], len(self.gate.gated))


def fitting_stack(host: HostModel, stack: Stack) -> Stack:
    """The stack in the shapes of the model's weights.

    Raises AdapterError for concepts that do not fit it, or are in it already and so act everywhere.
    """
    for concept, _ in stack:
        if is_inside(host.model, concept):
            raise AdapterError(
                f"{concept.name} is merged into this model already, so it acts everywhere and no region can hold it; "
                "take the model and the text encoder from before Merge Concepts, or choose the merged mode"
            )
    concepts = fitting_concepts(host.architecture, host.shapes, stack.concepts)
    return Stack(zip(concepts, stack.strengths, strict=True))


def check_memory(model: comfy.model_patcher.ModelPatcher, stack: Stack) -> None:
    """Raise AdapterError for more concepts than the device could hold even without the model, which can move away."""
    adapters = [a for concept, _ in stack for name, a in concept.layers.items() if name.startswith("unet.")]
    numbers = sum(adapter.out_features * adapter.rank + adapter.lora_down.numel() for adapter in adapters)
    needed = numbers * (model.model_dtype() or torch.float32).itemsize
    device = model.load_device
    room = comfy.model_management.get_total_memory(device) - comfy.model_management.minimum_inference_memory()
    if needed > room:
        raise AdapterError(
            f"these {len(stack)} concepts take {needed / 1e9:.2g} GB beside the model, and {device} has "
            f"{room / 1e9:.2g} GB for them; take fewer of them or of a smaller rank, or the merged mode, which keeps "
            "none apart"
        )


def with_words(host: HostModel, stack: Stack, residuals: Sequence[WordResidual] = ()) -> HostModel:
    """The same with a CLIP that knows all words of the stack; no concept acts on it.

    residuals: what acts at its own words, whose ordinary ones are known too.
    """
    words = learned_words(stack, host.word_rows)
    refuse_other_layers(words, host.cross_attention_layers)
    return HostModel(host.model, clip_with_words(host.clip, words_of_residuals(host, words, residuals)))


def act_by_text(
    host: HostModel, residuals: Sequence[WordResidual], acts: Sequence[tuple[int, ...]]
) -> comfy.model_patcher.ModelPatcher:
    """A clone of its MODEL in which residuals act at their own words, in the texts where their concepts act."""
    model = host.model.clone()
    texts = [[text for text, concepts in enumerate(acts) if residual.owner in concepts] for residual in residuals]
    let_act(model, [at_words(host, each, frozenset(at)) for each, at in zip(residuals, texts, strict=True)])
    return model


def with_concepts(host: HostModel, stack: Stack) -> comfy.sd.CLIP:
    """A clone of its CLIP that reads with the concepts' text encoder layers; it knows their words already."""
    clip, layers = host.clip, host_layers(None, host.clip)
    shapes = {name: layer.shape for name, layer in layers.items()}
    there = [
        (replace(concept, layers={name: a for name, a in concept.layers.items() if name in shapes}), strength)
        for concept, strength in stack
    ]
    merged, _ = fit(host.architecture, shapes, there)
    if not merged:
        return clip
    clip = clip.clone()
    clip.add_patches({layers[name].key: MergedWeight(set(), (layer, None)) for name, layer in merged.items()})
    return clip
