"""Load the toy base as a `BaseModel`."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from ..errors import AdapterError
from ..models.base import BaseModel, weights_hash
from ..models.schedules import NoiseSchedule
from . import model
from .captions import company, ordinary_captions, prior_prompts, tokenize, unknown_words
from .world import TILE


def load_toy_base(weights: Path | None = None) -> BaseModel:
    """The toy base in float32 on the CPU, frozen."""
    folder = weights or model.WEIGHTS
    unet, text_encoder = model.build_unet(), model.build_text_encoder()
    for network, name in ((unet, "unet"), (text_encoder, "text_encoder")):
        keys = {key.removeprefix("text_model."): key for key in network.state_dict()}
        path = folder / f"{name}.safetensors"
        if not path.is_file():
            raise AdapterError(f"the toy base's weights are not at {path}; install this pack anew, whole and unpacked")
        stored = load_file(path)
        network.load_state_dict({keys[key.removeprefix("text_model.")]: value.float() for key, value in stored.items()})
        network.requires_grad_(False).eval()
    return BaseModel(
        architecture="toy",
        unet=unet,
        text_encoder=text_encoder,
        tokenize=tokenize,
        encode=model.encode_pictures,
        decode=model.decode_latents,
        schedule=NoiseSchedule(model.alphas_cumprod().float(), "v_prediction"),
        betas=model.SCHEDULE,
        latent_channels=model.LATENT_CHANNELS,
        downscale=model.PATCH,
        multiple=4 * model.PATCH,
        size=(TILE, TILE),
        hash=weights_hash(unet, text_encoder),
        prior_prompts=prior_prompts,
        unknown_words=unknown_words,
        ordinary=ordinary_captions(),
        company=company,
    )
