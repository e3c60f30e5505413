"""In the host: checkpoints in the layouts of SDXL and Stable Diffusion 3, narrow, shallow and random.

`write(NAME)` makes FOLDER/NAME.safetensors in the layout in which such models are shared; `load(NAME)` reads it with
the host's own loader, which knows the family by itself and is told only how shallow the text models are.
"""

from __future__ import annotations

from functools import cache

import comfy.ldm.modules.diffusionmodules.mmdit
import comfy.ldm.modules.diffusionmodules.openaimodel
import comfy.ops
import comfy.sd
import comfy.sdxl_clip
import comfy.supported_models
import comfy.taesd.taesd
import comfy.text_encoders.sd3_clip
import torch
from in_host import FOLDER
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


def write(name: str) -> None:
    """name: sdxl, vega (SDXL's layout with fewer blocks), sd3, sd3_t5, sd35 (with norms and self-attention)."""
    text = dict(dtype=torch.float16, device="cpu", model_options=TEXT)
    if name in ("sdxl", "vega"):
        deep = (10, 2) if name == "sdxl" else (2, 1)
        unet = comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel(
            **SDXL_UNET,
            transformer_depth=[0, 0, deep[1], deep[1], deep[0], deep[0]],
            transformer_depth_middle=deep[0] if name == "sdxl" else -1,
            transformer_depth_output=[0, 0, 0, deep[1], deep[1], deep[1], deep[0], deep[0], deep[0]],
            dtype=torch.float16,
            operations=comfy.ops.disable_weight_init,
        )
        family, clip = comfy.supported_models.SDXL(SDXL_UNET), comfy.sdxl_clip.SDXLClipModel(**text)
    else:
        more = dict(qk_norm="rms", x_block_self_attn_layers=[0]) if name == "sd35" else {}
        unet = comfy.ldm.modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper(
            **SD3_UNET, **more, dtype=torch.float16, operations=comfy.ops.disable_weight_init
        )
        family = comfy.supported_models.SD3(SD3_UNET)
        t5 = dict(t5=True, dtype_t5=torch.float16) if name == "sd3_t5" else dict(t5=False)
        clip = comfy.text_encoders.sd3_clip.SD3ClipModel(**t5, **text)
    vae = comfy.taesd.taesd.TAESD(latent_channels=4 if name in ("sdxl", "vega") else 16)
    save_file(
        {
            **family.process_unet_state_dict_for_saving(random_weights(unet)),
            **{
                key: value.contiguous()
                for key, value in family.process_clip_state_dict_for_saving(random_weights(clip)).items()
            },
            **{f"first_stage_model.{key}": value for key, value in random_weights(vae, 0.05).items()},
        },
        FOLDER / f"{name}.safetensors",
    )


def load(name: str, stored: str = "float16"):
    """(MODEL, CLIP, VAE), the weights kept in memory as `stored`: float16, or float32."""
    dtype = {"dtype": getattr(torch, stored)}
    return comfy.sd.load_checkpoint_guess_config(
        str(FOLDER / f"{name}.safetensors"),
        embedding_directory=str(FOLDER / "embeddings"),
        model_options=dtype,
        te_model_options=TEXT | dtype,
    )[:3]


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
