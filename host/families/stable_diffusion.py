"""Stable Diffusion 1.x, 2.x and XL in the host."""

from __future__ import annotations

from collections.abc import Mapping

import comfy.model_base
import comfy.model_patcher
import comfy.sd
import comfy.sdxl_clip
import torch
from torch import Tensor

from ...modular_concepts.families.stable_diffusion import SD2, SD15, SDXL
from .family import HostFamily, Read, Said
from .unet import cells, unet_config, weight_names

_XL_WIDTH = 2048


def _of_one_text(width: int):
    def matches(model: comfy.model_patcher.ModelPatcher) -> bool:
        config = unet_config(model)
        return config.get("context_dim") == width and config.get("adm_in_channels") is None

    return matches


def _is_sdxl(model: comfy.model_patcher.ModelPatcher) -> bool:
    return unet_config(model).get("context_dim") == _XL_WIDTH and isinstance(model.model, comfy.model_base.SDXL)


def _side_by_side(
    _clip: comfy.sd.CLIP, hidden: Mapping[str, Tensor], pooled: Mapping[str, Tensor], _said: Said, _read: Read
) -> tuple[Tensor, Tensor]:
    """Both encoders' columns side by side; the larger one's summary."""
    return torch.cat(list(hidden.values()), dim=-1), pooled[SDXL.text_encoders[1].name]


HOST_SD15 = HostFamily(SD15, _of_one_text(SD15.text_encoders[0].width), weight_names, cells)
HOST_SD2 = HostFamily(SD2, _of_one_text(SD2.text_encoders[0].width), weight_names, cells)
HOST_SDXL = HostFamily(
    SDXL,
    _is_sdxl,
    weight_names,
    cells,
    clip_model=comfy.sdxl_clip.SDXLClipModel,
    put_together=_side_by_side,
)
