"""The toy base as the host's own MODEL, CLIP and VAE: `load_toy_base()`.

The weights are diffusers' and transformers'; the host's U-Net and CLIP compute the same function.  Where the
host takes for granted what holds for Stable Diffusion (32 norm groups, 49408 words, more than 4 channels mean
inpainting) we say otherwise here.  Everything is float32: the model is tiny, and adapters add up exactly.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.pixel_space_convert
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.utils
import torch
import torch.nn.functional as F
from torch import Tensor

from ..modular_concepts.errors import AdapterError
from ..modular_concepts.families.toy import TOY
from ..modular_concepts.toy.captions import END, MAX_TOKENS, PAD, START, split_words, tokenize
from ..modular_concepts.toy.model import (
    CONTEXT_WIDTH,
    LATENT_CHANNELS,
    PATCH,
    SCHEDULE,
    TEXT_CONFIG,
    UNET_CONFIG,
    WEIGHTS,
)
from ..modular_concepts.toy.vocabulary import WORDS


def load_toy_base(
    weights: Path = WEIGHTS, embeddings: list[str] | None = None
) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """(MODEL, CLIP, VAE) of the toy base, ready for the host's samplers, encoders and loaders.

    weights: folder with unet.safetensors and text_encoder.safetensors.
    embeddings: folders in which `embedding:name` in a prompt is looked up.
    Raises AdapterError when a file is missing or holds another model.
    """
    clip = load_clip(weights, embeddings)
    clip.patcher.cached_patcher_init = (_clip_patcher, (weights, embeddings))
    return load_model(weights), clip, load_vae()


# -- diffusion model


class ToyLatent(comfy.latent_formats.LatentFormat):
    """12 channels of 2x2 pixels in -1..1; the preview is the picture itself."""

    latent_channels = LATENT_CHANNELS
    spacial_downscale_ratio = PATCH
    latent_rgb_factors = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    latent_rgb_factors_reshape = staticmethod(lambda latent: F.pixel_shuffle(latent, PATCH))


class ToyOperations(comfy.ops.disable_weight_init):
    """The host's layers; its U-Net asks for 32 norm groups everywhere, ours has a count of its own."""

    class GroupNorm(comfy.ops.disable_weight_init.GroupNorm):
        def __init__(self, num_groups: int, num_channels: int, **settings):
            super().__init__(UNET_CONFIG["norm_num_groups"], num_channels, **settings)


class ToyConfig(comfy.supported_models_base.BASE):
    unet_extra_config = {}  # BASE would force heads of 64 channels
    sampling_settings = {
        "beta_schedule": "linear",  # the host's name of the scaled-linear schedule
        "linear_start": SCHEDULE["beta_start"],
        "linear_end": SCHEDULE["beta_end"],
    }
    latent_format = ToyLatent
    supported_inference_dtypes = [torch.float32]
    custom_operations = ToyOperations

    def model_type(self, state_dict: Mapping[str, Tensor], prefix: str = "") -> comfy.model_base.ModelType:
        return comfy.model_base.ModelType.V_PREDICTION

    def inpaint_model(self) -> bool:
        return False  # BASE says so of every model with more than 4 input channels


def host_unet_config() -> dict:
    """UNET_CONFIG in the host's words."""
    channels = UNET_CONFIG["block_out_channels"]
    blocks = UNET_CONFIG["layers_per_block"]
    down = [int("CrossAttn" in block) for block in UNET_CONFIG["down_block_types"] for _ in range(blocks)]
    # The host lists the output blocks from the last to the first.
    up = [int("CrossAttn" in block) for block in UNET_CONFIG["up_block_types"][::-1] for _ in range(blocks + 1)]
    return {
        "image_size": UNET_CONFIG["sample_size"],
        "in_channels": UNET_CONFIG["in_channels"],
        "out_channels": UNET_CONFIG["out_channels"],
        "model_channels": channels[0],
        "channel_mult": [count // channels[0] for count in channels],
        "num_res_blocks": [blocks] * len(channels),
        "num_heads": UNET_CONFIG["attention_head_dim"],  # diffusers' name for the number of heads
        "num_head_channels": -1,
        "context_dim": UNET_CONFIG["cross_attention_dim"],
        "use_spatial_transformer": True,
        "use_linear_in_transformer": False,
        "transformer_depth": down,
        "transformer_depth_middle": 1,
        "transformer_depth_output": up,
        "adm_in_channels": None,
        "use_temporal_attention": False,
    }


def load_model(weights: Path = WEIGHTS, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """The U-Net as a MODEL; the host sets `disable_dynamic` when it wants a second loading without it."""
    config = ToyConfig(host_unet_config())
    config.set_inference_dtype(torch.float32, None)
    names = comfy.utils.unet_to_diffusers(config.unet_config)
    stored = _read(weights / "unet.safetensors")
    if missing := sorted(stored.keys() - names.keys()):
        raise AdapterError(
            f"unet.safetensors: {missing[0]} is not a weight of the toy base; the file is of another model"
        )
    device = comfy.model_management.unet_offload_device()
    model = config.get_model(stored, "", device=device)
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = patcher_class(model, load_device=comfy.model_management.get_torch_device(), offload_device=device)
    _fill(
        model.diffusion_model,
        {names[key]: value for key, value in stored.items()},
        "unet.safetensors",
        patcher.is_dynamic(),
    )
    patcher.cached_patcher_init = (load_model, (weights,))
    return patcher


# -- text


class ToyTextModel(comfy.sd1_clip.SDClipModel):
    """The host's CLIP text model in our size, with our vocabulary."""

    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(
            device=device,
            dtype=dtype,
            max_length=MAX_TOKENS,
            textmodel_json_config=dict(TEXT_CONFIG),
            special_tokens={"start": START, "end": END, "pad": PAD},
            return_projected_pooled=False,
            model_options=model_options or {},
        )
        # The host makes 49408 rows whatever the configuration says.
        operations: Any = self.operations
        table = operations.Embedding(len(WORDS), CONTEXT_WIDTH, dtype=dtype, device=device)
        self.transformer.set_input_embeddings(table.requires_grad_(False))


class ToyClip(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(
            device=device,
            dtype=dtype,
            model_options=model_options or {},
            clip_name="l",
            clip_model=ToyTextModel,
        )


class WordTokenizer:
    """What the host needs of a Hugging Face tokenizer, on whole words."""

    @classmethod
    def from_pretrained(cls, _path: str) -> WordTokenizer:
        return cls()

    def __call__(self, text: str) -> dict[str, list[int]]:
        words = [int(tokenize([word])[0, 1]) for word in split_words(text)]
        return {"input_ids": [START, *words, END]}

    def get_vocab(self) -> dict[str, int]:
        return {word: row for row, word in enumerate(WORDS)}

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return " ".join(WORDS[row] for row in ids if not (skip_special_tokens and row in (START, END, PAD)))


class ToySectionTokenizer(comfy.sd1_clip.SDTokenizer):
    """Prompt weights, `embedding:name` and sections of 40 tokens, as the host does them for SD1."""

    def __init__(self, embedding_directory=None, tokenizer_data=None):
        super().__init__(
            tokenizer_path="",
            tokenizer_class=WordTokenizer,
            max_length=MAX_TOKENS,
            pad_with_end=False,
            pad_token=PAD,
            embedding_directory=embedding_directory,
            embedding_size=CONTEXT_WIDTH,
            tokenizer_data=tokenizer_data or {},
        )


class ToyTokenizer(comfy.sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data=None):
        super().__init__(embedding_directory, tokenizer_data or {}, clip_name="l", tokenizer=ToySectionTokenizer)


def load_clip(
    weights: Path = WEIGHTS, embeddings: list[str] | None = None, disable_dynamic: bool = False
) -> comfy.sd.CLIP:
    """The text encoder as a CLIP."""
    clip = comfy.sd.CLIP(
        comfy.supported_models_base.ClipTarget(ToyTokenizer, ToyClip),
        embedding_directory=embeddings,
        model_options={"dtype": torch.float32},
        disable_dynamic=disable_dynamic,
    )
    stored = _read(weights / "text_encoder.safetensors")
    # transformers 5 has dropped the level `text_model.`; nobody reads the pooled output.
    named = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in stored.items()}
    named["text_projection.weight"] = torch.eye(CONTEXT_WIDTH)
    _fill(
        getattr(clip.cond_stage_model, TOY.text_encoders[0].name).transformer,
        named,
        "text_encoder.safetensors",
        clip.patcher.is_dynamic(),
    )
    return clip


def _clip_patcher(weights: Path, embeddings: list[str] | None, disable_dynamic: bool = False):
    return load_clip(weights, embeddings, disable_dynamic).patcher


# -- pictures


class PixelUnshuffle(comfy.pixel_space_convert.PixelspaceConversionVAE):
    """(N, 3, H, W) in -1..1 <-> (N, 12, H/2, W/2): nothing is lost."""

    def encode(self, pixels: Tensor, *_args, **_settings) -> Tensor:
        return F.pixel_unshuffle(pixels, PATCH)

    def decode(self, samples: Tensor, *_args, **_settings) -> Tensor:
        return F.pixel_shuffle(samples, PATCH)


def load_vae() -> comfy.sd.VAE:
    """A VAE whose latents are the pixels; it crops pictures of odd size to even ones, as the host does."""
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)}, dtype=torch.float32)
    network = PixelUnshuffle().eval()
    network.load_state_dict(cast(torch.nn.Module, vae.first_stage_model).state_dict())
    vae.patcher = type(vae.patcher)(
        network, load_device=vae.patcher.load_device, offload_device=vae.patcher.offload_device
    )
    vae.first_stage_model = network
    vae.downscale_ratio = vae.upscale_ratio = PATCH
    vae.latent_channels = LATENT_CHANNELS
    return vae


# -- files


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise AdapterError(f"{path.name} is missing from {path.parent}; the pack is incomplete, install it again")
    return {key: value.float() for key, value in comfy.utils.load_torch_file(str(path), safe_load=True).items()}


def _fill(module: torch.nn.Module, weights: Mapping[str, Tensor], file: str, assign: bool) -> None:
    """Load strictly, in the host's way: dynamic patchers take the tensors over."""
    missing, unexpected = module.load_state_dict(weights, strict=False, assign=assign)
    if missing or unexpected:
        raise AdapterError(
            f"{file}: {(missing or unexpected)[0]} is "
            f"{'missing' if missing else 'not a weight of the toy base'}; the file is of another model"
        )
    logging.debug("%s: %d weights", file, len(weights))
