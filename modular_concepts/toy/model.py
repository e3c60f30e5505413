"""The toy base itself: an SD1-shaped, narrow U-Net and a CLIP-style text encoder.

Latents are pixels: each 2×2 block of a picture in -1..1 becomes 12 channels (a pixel unshuffle), so a 32×32
picture is a (12, 16, 16) latent and the noise in latent space is noise on pixels.  v-prediction on a scaled
linear schedule.  Built from diffusers and transformers, whose modules the host knows how to map.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.library import LibraryNetwork
from .captions import END, MAX_TOKENS, PAD, START
from .vocabulary import WORDS

PATCH = 2
LATENT_CHANNELS = 3 * PATCH * PATCH
CONTEXT_WIDTH = 128
WEIGHTS = Path(__file__).parent / "weights"

UNET_CONFIG: dict[str, Any] = dict(
    sample_size=16,
    in_channels=LATENT_CHANNELS,
    out_channels=LATENT_CHANNELS,
    block_out_channels=(64, 128),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    mid_block_type="UNetMidBlock2DCrossAttn",
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=4,  # diffusers' name for the number of heads
    cross_attention_dim=CONTEXT_WIDTH,
    norm_num_groups=16,
)
TEXT_CONFIG: dict[str, Any] = dict(
    vocab_size=len(WORDS),
    hidden_size=CONTEXT_WIDTH,
    intermediate_size=4 * CONTEXT_WIDTH,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=MAX_TOKENS,
    hidden_act="quick_gelu",
    bos_token_id=START,
    eos_token_id=END,
    pad_token_id=PAD,
    projection_dim=CONTEXT_WIDTH,
)
SCHEDULE: dict[str, Any] = dict(
    beta_start=0.00085, beta_end=0.016, beta_schedule="scaled_linear", prediction_type="v_prediction"
)


def encode_pictures(pictures: Tensor) -> Tensor:
    """(N, 3, H, W) in 0..1 -> latents (N, 12, H/2, W/2) in -1..1."""
    return F.pixel_unshuffle(pictures * 2 - 1, PATCH)


def decode_latents(latents: Tensor) -> Tensor:
    """(N, 12, h, w) -> pictures (N, 3, 2h, 2w) in 0..1."""
    return ((F.pixel_shuffle(latents, PATCH) + 1) / 2).clamp(0, 1)


def alphas_cumprod() -> Tensor:
    """(1000,) float64 products of 1 - beta; betas are squares of a line, as in SD1."""
    betas = torch.linspace(SCHEDULE["beta_start"] ** 0.5, SCHEDULE["beta_end"] ** 0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


def build_unet() -> LibraryNetwork:
    from diffusers import UNet2DConditionModel

    return cast(LibraryNetwork, UNet2DConditionModel(**UNET_CONFIG))


def build_text_encoder() -> LibraryNetwork:
    from transformers import CLIPTextConfig, CLIPTextModel

    return cast(LibraryNetwork, CLIPTextModel(CLIPTextConfig(**TEXT_CONFIG)))
