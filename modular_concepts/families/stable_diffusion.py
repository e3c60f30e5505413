"""Stable Diffusion 1.x, 2.x and XL: one U-Net in three sizes, one text encoder or two."""

from .clip_text import CLIP_TEXT
from .family import Family, TextEncoder
from .unet import UNET

SD15 = Family(
    name="sd15",
    title="Stable Diffusion 1.x",
    modelspec="stable-diffusion-v1",
    kohya_versions=("sd_v1", "sd_1"),
    side=512,
    denoiser=UNET,
    text_encoders=(TextEncoder("text_encoder", "clip_l", 768, CLIP_TEXT),),
    token_norm=True,
    widths=(320, 640, 768, 1280, 2560, 5120),
)
SD2 = Family(
    name="sd2",
    title="Stable Diffusion 2.x",
    modelspec="stable-diffusion-v2",  # 512 and 768-v differ in what they predict, and adapters go with either
    kohya_versions=("sd_v2", "sd_2"),
    side=512,
    denoiser=UNET,
    text_encoders=(TextEncoder("text_encoder", "clip_h", 1024, CLIP_TEXT),),
)
SDXL = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    modelspec="stable-diffusion-xl-v1-base",
    implementation="https://github.com/Stability-AI/generative-models",
    kohya_versions=("sdxl_base",),
    side=1024,
    denoiser=UNET,
    text_encoders=(
        TextEncoder("text_encoder", "clip_l", 768, CLIP_TEXT),
        TextEncoder("text_encoder_2", "clip_g", 1280, CLIP_TEXT, projected=True),
    ),
)
