"""The toy base in the host; `host/toy_base.py` loads it."""

from __future__ import annotations

import comfy.model_patcher

from ...modular_concepts.families.toy import TOY
from ..toy_base import ToyConfig
from .family import HostFamily
from .unet import cells, weight_names


def _matches(model: comfy.model_patcher.ModelPatcher) -> bool:
    return isinstance(getattr(model.model, "model_config", None), ToyConfig)


HOST_TOY = HostFamily(TOY, _matches, weight_names, cells)
