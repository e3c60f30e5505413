"""LoRAs from the host's other nodes as concepts: LORA_MODEL, a dict of tensors, and LORA_STACK, a list of file names.

Where a MODEL and CLIP are at hand, the host's own table says which layer a key is for, whatever program wrote it; some
write queries, keys and values apart that are rows of one layer here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_patcher
import comfy.sd
from torch import Tensor

from ...modular_concepts.concept import Concept
from ...modular_concepts.errors import AdapterError
from ...modular_concepts.files.bundled import with_plain_words
from ...modular_concepts.files.lora import Place, by_rule, import_lora, lora_concept, told_apart
from ...modular_concepts.merging.block_strengths import check_strength
from ...modular_concepts.stack import Stack
from ..layers import host_layers
from .folders import path_of


class HostNames:
    """The layers of a MODEL and CLIP, either of which may be None, by any name that the host knows for them."""

    def __init__(self, model: comfy.model_patcher.ModelPatcher | None, clip: comfy.sd.CLIP | None):
        layers = host_layers(model, clip)
        self.shapes = {name: layer.shape for name, layer in layers.items()}
        self._canonical = {layer.key: name for name, layer in layers.items()}
        self._keys = comfy.lora.model_lora_keys_unet(model.model, {}) if model is not None else {}
        if clip is not None:
            self._keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, self._keys)

    def place(self, stem: str) -> Place | None:
        """Where a LoRA's module belongs: by the host's names, or else by the form of its own."""
        target = self._keys.get(stem)
        if isinstance(target, str) and target in self._canonical:
            return Place(self._canonical[target])
        if isinstance(target, tuple) and target[0] in self._canonical and target[1] is not None and target[1][0] == 0:
            return Place(self._canonical[target[0]], (target[1][1], target[1][2]))
        name = by_rule(stem)
        return Place(name) if name in self.shapes else None


def concepts_of(
    lora: Mapping[str, Tensor] | Sequence[Sequence],
    name: str,
    model: comfy.model_patcher.ModelPatcher | None = None,
    clip: comfy.sd.CLIP | None = None,
) -> tuple[Stack, str]:
    """(concepts with strengths, which keys found no place) of a LORA_MODEL or a LORA_STACK.

    name: what to call a LORA_MODEL; files are called by their names.  Raises AdapterError for what cannot be read.
    """
    names = None if model is None and clip is None else HostNames(model, clip)
    place, shapes = (None, None) if names is None else (names.place, names.shapes)
    if isinstance(lora, Mapping):
        title = name.strip() or "lora"
        tensors = {key: value for key, value in lora.items() if isinstance(value, Tensor)}
        imported = lora_concept(Path(title), tensors, {}, title, place, shapes)
        return Stack.of(imported.concept), "\n".join(imported.notes(title))
    stack, sentences, paths = [], [], []
    for entry in lora or ():
        file, strength, text_strength = _entry(entry)
        if file in ("", "None"):
            continue
        path = path_of("loras", file)
        imported = import_lora(path, None, place, shapes)
        stack.append(with_strengths(imported.concept, strength, text_strength))
        sentences += imported.notes(path.name)
        paths.append(path)
    called = told_apart([concept.name for concept, _ in stack], paths)
    stack = [(replace(concept, name=name), strong) for (concept, strong), name in zip(stack, called, strict=True)]
    return Stack(stack), "\n".join(sentences)


def with_strengths(concept: Concept, strength: float, text_strength: float) -> tuple[Concept, float]:
    """(concept, strength) that acts on the MODEL and on the CLIP as strongly as each is to be changed.

    A concept has one strength; where the two differ, the text encoder's layers are scaled by their ratio.
    """
    if strength == text_strength:
        return concept, strength
    # Learned words are the text encoder's, and follow the one strength that a concept has.
    common = (text_strength if concept.tokens else 0.0) or strength or 1.0
    parts = {name: text_strength if name.startswith("text_encoder") else strength for name in concept.layers}
    layers = {
        name: adapter.replace(alpha=adapter.alpha * (parts[name] / common))
        for name, adapter in concept.layers.items()
        if parts[name] != 0
    }
    if concept.tokens and text_strength == 0:
        concept = with_plain_words(concept)
    if not layers and not (concept.tokens and text_strength):
        return concept, 0.0
    return replace(concept, layers=layers), common


def _entry(entry: Any) -> tuple[str, float, float]:
    """(file name, strength, text strength) of a LORA_STACK's entry; some packs leave the last one out."""
    try:
        file, strength, *rest = entry
        read = str(file), float(strength), float(rest[0] if rest else strength)
    except (TypeError, ValueError) as error:
        raise AdapterError(
            f"a LORA_STACK is a list of (file name, model strength, clip strength), not {type(entry).__name__}"
        ) from error
    for each in read[1:]:
        check_strength(read[0], each)
    return read
