"""In the host: write FOLDER/tiny_sd15.safetensors, a checkpoint in Stable Diffusion 1.5's layout with random weights.

One level of 320 channels, the whole text encoder, a tiny autoencoder; the host detects it as SD1.5.
"""

from __future__ import annotations

from in_host import FOLDER, start

start()

import comfy.ldm.modules.diffusionmodules.openaimodel as unets
import comfy.ops
import comfy.sd1_clip
import comfy.taesd.taesd
import tiny_models
import torch
from safetensors.torch import save_file

torch.manual_seed(0)


def random_weights(module: torch.nn.Module, prefix: str, scale: float = 0.02) -> dict[str, torch.Tensor]:
    """Norms as they are made, everything else small and random, in half precision."""
    return {
        f"{prefix}{key}": (torch.randn(value.shape) * scale + is_norm(key, value)).half()
        for key, value in module.state_dict().items()
        if value.is_floating_point()
    }


def is_norm(key: str, value: torch.Tensor) -> bool:
    return key.endswith("weight") and value.dim() == 1


unet = unets.UNetModel(**tiny_models.SD15_UNET, operations=comfy.ops.disable_weight_init)
text = comfy.sd1_clip.SDClipModel(device="cpu", dtype=torch.float32)
save_file(
    {
        **random_weights(unet, "model.diffusion_model."),
        **{
            key: value
            for key, value in random_weights(text.transformer, "cond_stage_model.transformer.").items()
            if "text_projection" not in key
        },
        **random_weights(comfy.taesd.taesd.TAESD(), "first_stage_model.", 0.05),
    },
    FOLDER / "tiny_sd15.safetensors",
)
