"""In the host: checkpoints in the layouts of the model families, narrow, shallow and random.

`write(NAME, FOLDER)` makes FOLDER/NAME.safetensors in the layout in which such models are shared; `load(PATH)` reads it
with the host's own loader, which knows the family by itself and is told only how shallow the text models are.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import comfy.ldm.modules.diffusionmodules.mmdit
import comfy.ldm.modules.diffusionmodules.openaimodel
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models
import comfy.taesd.taesd
import comfy.text_encoders.sd3_clip
import torch
from safetensors.torch import save_file

# The host builds text models of full depth whatever the checkpoint holds, unless told otherwise.
TEXT = {
    "clip_l_model_config": {"num_hidden_layers": 3, "intermediate_size": 192},
    "clip_g_model_config": {"num_hidden_layers": 3, "intermediate_size": 320},
    "t5xxl_model_config": {"num_layers": 1, "num_heads": 2, "d_kv": 32, "d_ff": 64, "vocab_size": 8192},
}
SD15_UNET = dict(
    image_size=32,
    in_channels=4,
    out_channels=4,
    model_channels=320,
    channel_mult=[1],
    num_res_blocks=[1],
    num_heads=8,
    num_head_channels=-1,
    context_dim=768,
    use_spatial_transformer=True,
    transformer_depth=[1],
    transformer_depth_output=[1, 1],
    transformer_depth_middle=1,
)
SDXL_UNET = dict(
    image_size=32,
    in_channels=4,
    out_channels=4,
    model_channels=320,
    channel_mult=[1, 1, 1],
    num_res_blocks=[2, 2, 2],
    num_heads=-1,
    num_head_channels=64,
    context_dim=2048,
    adm_in_channels=2816,
    num_classes="sequential",
    use_spatial_transformer=True,
    use_linear_in_transformer=True,
)
SD3_UNET = dict(
    input_size=None,
    patch_size=2,
    in_channels=16,
    depth=2,
    adm_in_channels=2048,
    context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 128}},
    num_patches=36,
    pos_embed_max_size=6,
)

PERIOD = 1_000_003


def write(name: str, folder: Path) -> Path:
    """name: sd15, sdxl, vega (SDXL's layout with fewer blocks), sd3, sd3_t5, sd35 (with norms and self-attention)."""
    path = folder / f"{name}.safetensors"
    parts = _sd15() if name == "sd15" else _sdxl(name) if name in ("sdxl", "vega") else _sd3(name)
    save_file({key: value.contiguous() for key, value in parts.items()}, path)
    return path


def load(path: Path, stored: str = "float16", embeddings: Path | None = None):
    """(MODEL, CLIP, VAE), the weights kept in memory as `stored`: float16, or float32.  Not for sd15."""
    dtype = {"dtype": getattr(torch, stored)}
    return comfy.sd.load_checkpoint_guess_config(
        str(path),
        embedding_directory=None if embeddings is None else str(embeddings),
        model_options=dtype,
        te_model_options=TEXT | dtype,
    )[:3]


def _sd15() -> Mapping[str, torch.Tensor]:
    """One level of 320 channels, the whole text encoder, a tiny autoencoder."""
    unet = comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel(
        **SD15_UNET, operations=comfy.ops.disable_weight_init
    )
    text = comfy.sd1_clip.SDClipModel(device="cpu", dtype=torch.float32).transformer
    words = {key: value for key, value in random_weights(text).items() if "text_projection" not in key}
    return {
        **_under("model.diffusion_model.", random_weights(unet)),
        **_under("cond_stage_model.transformer.", words),
        **_under("first_stage_model.", random_weights(comfy.taesd.taesd.TAESD(), 0.05)),
    }


def _sdxl(name: str) -> Mapping[str, torch.Tensor]:
    deep = (10, 2) if name == "sdxl" else (2, 1)
    unet = comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel(
        **SDXL_UNET,
        transformer_depth=[0, 0, deep[1], deep[1], deep[0], deep[0]],
        transformer_depth_middle=deep[0] if name == "sdxl" else -1,
        transformer_depth_output=[0, 0, 0, deep[1], deep[1], deep[1], deep[0], deep[0], deep[0]],
        dtype=torch.float16,
        operations=comfy.ops.disable_weight_init,
    )
    text = comfy.sdxl_clip.SDXLClipModel(dtype=torch.float16, device="cpu", model_options=TEXT)
    return _whole(comfy.supported_models.SDXL(SDXL_UNET), unet, text, latent_channels=4)


def _sd3(name: str) -> Mapping[str, torch.Tensor]:
    more = dict(qk_norm="rms", x_block_self_attn_layers=[0]) if name == "sd35" else {}
    network = comfy.ldm.modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper(
        **SD3_UNET, **more, dtype=torch.float16, operations=comfy.ops.disable_weight_init
    )
    t5 = dict(t5=True, dtype_t5=torch.float16) if name == "sd3_t5" else dict(t5=False)
    text = comfy.text_encoders.sd3_clip.SD3ClipModel(**t5, dtype=torch.float16, device="cpu", model_options=TEXT)
    return _whole(comfy.supported_models.SD3(SD3_UNET), network, text, latent_channels=16)


def _whole(family, network, text, latent_channels: int) -> Mapping[str, torch.Tensor]:
    """Everything under the keys that the family's checkpoints have, with random weights."""
    vae = comfy.taesd.taesd.TAESD(latent_channels=latent_channels)
    return {
        **family.process_unet_state_dict_for_saving(random_weights(network)),
        **family.process_clip_state_dict_for_saving(random_weights(text)),
        **_under("first_stage_model.", random_weights(vae, 0.05)),
    }


def _under(prefix: str, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}{key}": value for key, value in weights.items()}


def random_weights(module: torch.nn.Module, scale: float = 0.02) -> dict[str, torch.Tensor]:
    """Norms and single numbers as they are made, everything else small and random, in half precision."""
    made, place = {}, 0
    for key, value in module.state_dict().items():
        if not value.is_floating_point():
            continue
        if not value.dim():
            made[key] = value.clone()
            continue
        norm = key.endswith("weight") and value.dim() == 1
        made[key] = _numbers(place, value.numel()).reshape(value.shape) * scale + norm
        place += value.numel()
    return made


def _numbers(start: int, count: int) -> torch.Tensor:
    """Gaussian numbers in half precision, a few again and again; no two rows are equal, since PERIOD is prime."""
    return _drawn().roll(-(start % PERIOD)).repeat(count // PERIOD + 1)[:count]


@cache
def _drawn() -> torch.Tensor:
    return torch.randn(PERIOD, generator=torch.Generator().manual_seed(0)).half()
