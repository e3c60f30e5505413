"""What the host's U-Nets have in common, whichever family they are of."""

from __future__ import annotations

from collections.abc import Mapping

import comfy.model_patcher
import comfy.utils

from .family import DENOISER


def is_unet(config: Mapping) -> bool:
    return "num_res_blocks" in config and "transformer_depth" in config


def unet_config(model: comfy.model_patcher.ModelPatcher) -> Mapping:
    """The U-Net's configuration, empty for what is none."""
    config = getattr(getattr(model.model, "model_config", None), "unet_config", {})
    return config if is_unet(config) else {}


def weight_names(model: comfy.model_patcher.ModelPatcher) -> dict[str, str]:
    """diffusers' parameter name -> the patcher's, in order of name, for those that the model has."""
    there = model.model.state_dict().keys()
    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    # The host lists the label embedding of SDXL twice, under diffusers' old name too.
    return {
        name: DENOISER + key
        for name, key in sorted(names.items())
        if DENOISER + key in there and not name.startswith("class_embedding.")
    }


def cells(config: Mapping) -> int:
    """The lowest level is half as large for each level above it."""
    return 2 ** (len(config["channel_mult"]) - 1)
