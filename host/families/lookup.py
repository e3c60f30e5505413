"""Which family a MODEL is of, and which a CLIP's text encoders are for.

A new one is a record beside these (`family.HostFamily`) and a line here.
"""

from __future__ import annotations

import comfy.model_patcher
import comfy.sd

from ...modular_concepts.errors import AdapterError
from ...modular_concepts.families import titles
from .family import HostFamily
from .sd3 import HOST_SD3
from .stable_diffusion import HOST_SD2, HOST_SD15, HOST_SDXL
from .toy import HOST_TOY

# The toy base first: its U-Net is one of Stable Diffusion's.
HOST_FAMILIES: tuple[HostFamily, ...] = (HOST_TOY, HOST_SD15, HOST_SD2, HOST_SDXL, HOST_SD3)


def host_family_of(model: comfy.model_patcher.ModelPatcher) -> HostFamily:
    """The family of a MODEL.  Raises AdapterError, naming what it is, for one that concepts cannot be made for."""
    for family in HOST_FAMILIES:
        if family.matches(model):
            return family
    config = getattr(model.model, "model_config", None)
    raise AdapterError(
        f"the model is a {type(model.model if config is None else config).__name__}, and concepts are for {titles()}; "
        "load one of these"
    )


def host_family_of_texts(clip: comfy.sd.CLIP) -> HostFamily:
    """The family whose text encoders a CLIP has; one of those with a single encoder where several have the same."""
    whole = clip.cond_stage_model
    several = ((family, family.clip_model) for family in HOST_FAMILIES)
    return next((family for family, kind in several if kind is not None and isinstance(whole, kind)), HOST_SD15)


def projected_names() -> frozenset[str]:
    """Those of `encoder_names` whose projection of the summary belongs to the family's weights."""
    encoders = (encoder for family in HOST_FAMILIES for encoder in family.family.text_encoders)
    return frozenset(encoder.name for encoder in encoders if encoder.projected)
