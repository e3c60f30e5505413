"""The layers of the host's models under our canonical names, what family a model is, and which weights it has.

The host keeps Stable Diffusion's U-Nets in their original layout and wraps text encoders; patches name weights
by those paths.  Here each canonical name (`modular_concepts/models/layers.py`) meets its weight key and its module.
A diffusion transformer's layers are called as the host calls them.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
from torch import Tensor, nn

from ..modular_concepts.adapters.sites import Layer, Site, rows_of_sites
from ..modular_concepts.errors import AdapterError
from ..modular_concepts.families import encoder_names, titles
from ..modular_concepts.models.base import tables_hash
from ..modular_concepts.models.fingerprint import base_mark, weights_sample
from ..modular_concepts.models.layers import canonical_name
from .families.family import DENOISER
from .families.lookup import host_family_of, projected_names

_HASHES: weakref.WeakKeyDictionary[nn.Module, weakref.WeakKeyDictionary[nn.Module, str]] = weakref.WeakKeyDictionary()
_MARKS: weakref.WeakKeyDictionary[nn.Module, weakref.WeakKeyDictionary[nn.Module, str]] = weakref.WeakKeyDictionary()
_SAMPLES: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class HostLayer:
    """part: "unet" (patches go to MODEL) or "text_encoder" (to CLIP, any of its text models).

    key: the weight's name in the patcher.  rows: (first, how many) of its rows, of a site of a fused layer.
    """

    part: str
    key: str
    module: nn.Module
    rows: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, or of the site's part of it."""
        out, *rest = self.weight.shape
        return (out if self.rows is None else self.rows[1], *rest)

    @property
    def weight(self) -> Tensor:
        """Quantised ones too are tensors."""
        return cast(Tensor, self.module.weight)

    def found_in(self, network: nn.Module) -> Layer:
        """The denoiser's layer, or a site of it, in a network that may be a copy of the model's own."""
        module = network.get_submodule(self.key.removeprefix(DENOISER).removesuffix(".weight"))
        return cast(Layer, module) if self.rows is None else Site(cast(nn.Linear, module), *self.rows)


def host_layers(model: comfy.model_patcher.ModelPatcher | None, clip: comfy.sd.CLIP | None) -> dict[str, HostLayer]:
    """Canonical name -> layer, for every Linear and convolution that concepts can be for.

    Either may be None.  Raises AdapterError for a MODEL of another family than Stable Diffusion's.
    """
    return (_unet_layers(model) if model is not None else {}) | (_text_layers(clip) if clip is not None else {})


def host_places(model: comfy.model_patcher.ModelPatcher | None, clip: comfy.sd.CLIP | None) -> dict[str, HostLayer]:
    """`host_layers`, and the sites of those that are fused: all that an adapter may be for."""
    places: dict[str, HostLayer] = {}
    for name, layer in host_layers(model, clip).items():
        places[name] = layer
        out, *inp = layer.shape
        sites = rows_of_sites(name, inp[0]) if len(inp) == 1 else {}
        # A layer of another height than its family's is one that nobody has described.
        if sites and max(start + count for start, count in sites.values()) == out:
            places |= {site: replace(layer, rows=rows) for site, rows in sites.items()}
    return places


def architecture_of(model: comfy.model_patcher.ModelPatcher) -> str:
    """The family as concept files name it.

    Raises AdapterError, naming what the model is, for one that concepts cannot be made for.
    """
    return host_family_of(model).family.name


def base_hash(model: comfy.model_patcher.ModelPatcher, clip: comfy.sd.CLIP | None) -> str:
    """The same digits that the headless face gives the same weights (`models.base.weights_hash`), as float32.

    Patches that are applied just now do not count: it is the loader's own weights.  T5 does not count either, since
    concepts train without it and go with any.
    """
    text = model.model if clip is None else clip.patcher.model
    hashes = _HASHES.setdefault(model.model, weakref.WeakKeyDictionary())
    if text not in hashes:
        hashes[text] = tables_hash(*_tables(model, clip))
    return hashes[text]


def mark_of(model: comfy.model_patcher.ModelPatcher, clip: comfy.sd.CLIP | None) -> str:
    """The mark that the headless face gives the same base in whatever precision: `fingerprint.base_mark`."""
    text = model.model if clip is None else clip.patcher.model
    marks = _MARKS.setdefault(model.model, weakref.WeakKeyDictionary())
    if text not in marks:
        marks[text] = base_mark(_tables(model, clip), lambda: base_hash(model, clip))
    return marks[text]


def _tables(model: comfy.model_patcher.ModelPatcher, clip: comfy.sd.CLIP | None) -> list[dict[str, Tensor]]:
    """Canonical name -> weight of the denoiser, and of each text encoder."""
    tables = [_unpatched(model, host_family_of(model).weight_names(model))]
    if clip is not None:
        patcher, texts = clip.patcher, text_encoders_of(clip)
        tables += [_unpatched(patcher, _text_names(name, encoder)) for name, encoder in texts.items()]
    return tables


def known_hash(model: comfy.model_patcher.ModelPatcher, clip: comfy.sd.CLIP | None) -> str:
    """`base_hash` where a training has asked for it before, else "": it reads every byte, which takes seconds."""
    text = model.model if clip is None else clip.patcher.model
    return _HASHES.get(model.model, {}).get(text, "")


def base_sample(model: comfy.model_patcher.ModelPatcher) -> str:
    """`fingerprint.weights_sample` of the loader's own weights, patched just now or not."""
    if model.model not in _SAMPLES:
        _SAMPLES[model.model] = weights_sample(_unpatched(model, host_family_of(model).weight_names(model)))
    return _SAMPLES[model.model]


def _unpatched(patcher: comfy.model_patcher.ModelPatcher, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Canonical name -> weight as it was loaded; where a patch is applied, the patcher keeps it aside."""
    weights = patcher.model.state_dict()
    backed_up = {key: entry.weight for key, entry in patcher.backup.items()}
    return {name: backed_up.get(key, weights[key]) for name, key in names.items()}


# -- denoiser


def _unet_layers(model: comfy.model_patcher.ModelPatcher) -> dict[str, HostLayer]:
    return {
        canonical_name("unet", name.removesuffix(".weight")): HostLayer("unet", key, module)
        for name, key in host_family_of(model).weight_names(model).items()
        if name.endswith(".weight")
        and _takes_adapters(module := model.model.get_submodule(key.removesuffix(".weight")))
    }


def quantised(model: comfy.model_patcher.ModelPatcher) -> bool:
    """Whether any layer's weight is kept in fewer than 16 bits."""
    layers = _unet_layers(model).values()
    return any(getattr(layer.module, "layout_type", None) is not None or layer.weight.itemsize < 2 for layer in layers)


def _takes_adapters(module: nn.Module) -> bool:
    """A Linear or convolution, also one whose weight is quantised, which is none of torch's classes in the host."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        return True
    sized = hasattr(module, "in_features") and hasattr(module, "out_features")
    return sized and getattr(getattr(module, "weight", None), "dim", int)() == 2


# -- text encoders


def text_encoders_of(clip: comfy.sd.CLIP) -> dict[str, comfy.sd1_clip.SDClipModel]:
    """Attribute name in the CLIP's model -> encoder, for every CLIP text model in it, in the order of learned rows.

    Raises AdapterError for a CLIP without one.
    """
    encoders = {
        name: child
        for name, child in clip.cond_stage_model.named_children()
        if isinstance(child, comfy.sd1_clip.SDClipModel) and hasattr(child.transformer, "text_model")
    }
    if not encoders:
        raise AdapterError(
            f"the CLIP is a {type(clip.cond_stage_model).__name__} without a CLIP text model; "
            f"load the text encoder of one of these: {titles()}"
        )
    order = encoder_names()
    return dict(sorted(encoders.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def _text_names(name: str, encoder: comfy.sd1_clip.SDClipModel) -> dict[str, str]:
    """transformers' parameter name without `text_model.` -> the patcher's; not every one has its projection there."""
    parts = ("text_model.", "text_projection.") if name in projected_names() else ("text_model.",)
    return {
        key.removeprefix("text_model."): f"{name}.transformer.{key}"
        for key in encoder.transformer.state_dict()
        if key.startswith(parts)
    }


def _text_layers(clip: comfy.sd.CLIP) -> dict[str, HostLayer]:
    return {
        canonical_name(part, path): HostLayer("text_encoder", f"{name}.transformer.{path}.weight", module)
        for part, (name, encoder) in zip(
            ("text_encoder", "text_encoder_2"), text_encoders_of(clip).items(), strict=False
        )
        for path, module in encoder.transformer.named_modules()
        if path.startswith("text_model.") and _takes_adapters(module)
    }
