"""The layers of the host's models under our canonical names, what family a model is, and which weights it has.

The host keeps Stable Diffusion's U-Nets in their original layout and wraps text encoders; patches name weights
by those paths.  Here each canonical name (`modular_concepts/layers.py`) meets its weight key and its module.
A diffusion transformer's layers are called as the host calls them.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import comfy.model_base
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.utils
from torch import Tensor, nn

from ..modular_concepts.base_model import tables_hash
from ..modular_concepts.errors import AdapterError
from ..modular_concepts.fingerprint import base_mark, weights_sample
from ..modular_concepts.layers import canonical_name
from .toy import ToyConfig

UNET_PREFIX = "diffusion_model."
_HASHES: weakref.WeakKeyDictionary[nn.Module, weakref.WeakKeyDictionary[nn.Module, str]] = weakref.WeakKeyDictionary()
_MARKS: weakref.WeakKeyDictionary[nn.Module, weakref.WeakKeyDictionary[nn.Module, str]] = weakref.WeakKeyDictionary()
_SAMPLES: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class HostLayer:
    """part: "unet" (patches go to MODEL) or "text_encoder" (to CLIP, any of its text models).

    key: the weight's name in the patcher.
    """

    part: str
    key: str
    module: nn.Module


def host_layers(model: comfy.model_patcher.ModelPatcher | None, clip: comfy.sd.CLIP | None) -> dict[str, HostLayer]:
    """Canonical name -> layer, for every Linear and convolution that concepts can be for.

    Either may be None.  Raises AdapterError for a MODEL of another family than Stable Diffusion's.
    """
    return (_unet_layers(model) if model is not None else {}) | (_text_layers(clip) if clip is not None else {})


def architecture_of(model: comfy.model_patcher.ModelPatcher) -> str:
    """The family as concept files name it: "toy", "sd15", "sd2", "sdxl", "sd3".

    Raises AdapterError, naming what the model is, for one that concepts cannot be made for.
    """
    config = getattr(model.model, "model_config", None)
    if isinstance(config, ToyConfig):
        return "toy"
    known = getattr(config, "unet_config", {})
    width, adm = known.get("context_dim"), known.get("adm_in_channels")
    if _is_unet(known) and isinstance(width, int):
        if adm is None and width in (768, 1024):
            return {768: "sd15", 1024: "sd2"}[width]
        if width == 2048 and isinstance(model.model, comfy.model_base.SDXL):
            return "sdxl"
    if isinstance(model.model, comfy.model_base.SD3):
        return "sd3"
    raise AdapterError(
        f"the model is a {type(config).__name__ if config is not None else type(model.model).__name__}, and concepts "
        "are for Stable Diffusion 1.x, 2.x, XL and 3 and for the toy base; load one of these"
    )


def base_hash(model: comfy.model_patcher.ModelPatcher, clip: comfy.sd.CLIP | None) -> str:
    """The same digits that the headless face gives the same weights (`base_model.weights_hash`), as float32.

    Patches that are applied just now do not count: it is the loader's own weights.  T5 does not count either, since
    concepts train without it and go with any.
    """
    text = model.model if clip is None else clip.cond_stage_model
    known = _HASHES.setdefault(model.model, weakref.WeakKeyDictionary())
    if text not in known:
        known[text] = tables_hash(*_tables(model, clip))
    return known[text]


def mark_of(model: comfy.model_patcher.ModelPatcher, clip: comfy.sd.CLIP | None) -> str:
    """The mark that the headless face gives the same base in whatever precision: `fingerprint.base_mark`."""
    text = model.model if clip is None else clip.cond_stage_model
    marks = _MARKS.setdefault(model.model, weakref.WeakKeyDictionary())
    if text not in marks:
        marks[text] = base_mark(_tables(model, clip), lambda: base_hash(model, clip))
    return marks[text]


def _tables(model: comfy.model_patcher.ModelPatcher, clip: comfy.sd.CLIP | None) -> list[dict[str, Tensor]]:
    """Canonical name -> weight of the denoiser, and of each text encoder."""
    texts = text_encoders_of(clip) if clip is not None else {}
    return [
        _unpatched(model, _weight_names(model)),
        *(_unpatched(clip.patcher, _text_names(name, encoder)) for name, encoder in texts.items()),
    ]


def known_hash(model: comfy.model_patcher.ModelPatcher, clip: comfy.sd.CLIP | None) -> str:
    """`base_hash` where a training has asked for it before, else "": it reads every byte, which takes seconds."""
    text = model.model if clip is None else clip.cond_stage_model
    return _HASHES.get(model.model, {}).get(text, "")


def base_sample(model: comfy.model_patcher.ModelPatcher) -> str:
    """`fingerprint.weights_sample` of the loader's own weights, patched just now or not."""
    if model.model not in _SAMPLES:
        _SAMPLES[model.model] = weights_sample(_unpatched(model, _weight_names(model)))
    return _SAMPLES[model.model]


def _unpatched(patcher: comfy.model_patcher.ModelPatcher, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Canonical name -> weight as it was loaded; where a patch is applied, the patcher keeps it aside."""
    weights = patcher.model.state_dict()
    kept = {key: entry.weight for key, entry in patcher.backup.items()}
    return {name: kept.get(key, weights[key]) for name, key in names.items()}


# -- U-Net or diffusion transformer


def _is_unet(config: dict) -> bool:
    return "num_res_blocks" in config and "transformer_depth" in config


def _weight_names(model: comfy.model_patcher.ModelPatcher) -> dict[str, str]:
    """diffusers' parameter name -> the patcher's, in order of name, for those that the model has; SD3's are its own."""
    there = model.model.state_dict().keys()
    if architecture_of(model) == "sd3":
        return {key.removeprefix(UNET_PREFIX): key for key in sorted(there) if key.startswith(UNET_PREFIX)}
    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    # The host lists the label embedding of SDXL twice, under diffusers' old name too.
    return {
        name: UNET_PREFIX + key
        for name, key in sorted(names.items())
        if UNET_PREFIX + key in there and not name.startswith("class_embedding.")
    }


def _unet_layers(model: comfy.model_patcher.ModelPatcher) -> dict[str, HostLayer]:
    return {
        canonical_name("unet", name.removesuffix(".weight")): HostLayer("unet", key, module)
        for name, key in _weight_names(model).items()
        if name.endswith(".weight")
        and _takes_adapters(module := model.model.get_submodule(key.removesuffix(".weight")))
    }


def quantised(model: comfy.model_patcher.ModelPatcher) -> bool:
    """Whether any layer's weight is kept in fewer than 16 bits."""
    modules = (layer.module for layer in _unet_layers(model).values())
    return any(getattr(module, "layout_type", None) is not None or module.weight.itemsize < 2 for module in modules)


def _takes_adapters(module: nn.Module) -> bool:
    """A Linear or convolution, also one whose weight is quantised, which is none of torch's classes in the host."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        return True
    sized = hasattr(module, "in_features") and hasattr(module, "out_features")
    return sized and getattr(getattr(module, "weight", None), "dim", int)() == 2


# -- text encoders


def text_encoders_of(clip: comfy.sd.CLIP) -> dict[str, comfy.sd1_clip.SDClipModel]:
    """Attribute name in the CLIP's model -> encoder, for every CLIP text model in it; CLIP-L first.

    Raises AdapterError for a CLIP without one.
    """
    found = {
        name: child
        for name, child in clip.cond_stage_model.named_children()
        if isinstance(child, comfy.sd1_clip.SDClipModel) and hasattr(child.transformer, "text_model")
    }
    if not found:
        raise AdapterError(
            f"the CLIP is a {type(clip.cond_stage_model).__name__} without a CLIP text model; "
            "load the text encoder of Stable Diffusion 1.x, 2.x, XL or 3, or the toy base's"
        )
    return dict(sorted(found.items(), key=lambda item: item[0] != "clip_l"))


def _text_names(name: str, encoder: comfy.sd1_clip.SDClipModel) -> dict[str, str]:
    """transformers' parameter name without `text_model.` -> the patcher's; only CLIP-G has a projection there."""
    own = ("text_model.", "text_projection.") if name == "clip_g" else ("text_model.",)
    return {
        key.removeprefix("text_model."): f"{name}.transformer.{key}"
        for key in encoder.transformer.state_dict()
        if key.startswith(own)
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
