"""In the host's interpreter: MODEL, CLIP and VAE of each family, built in memory with random weights.

"full" has the family's own widths and depths, "tiny" one or two blocks of its narrowest.  Text models keep three
layers: what they cost is no part of what is measured.  Nothing is read from a disk or written to one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.ldm.modules.diffusionmodules.mmdit
import comfy.ldm.modules.diffusionmodules.openaimodel
import comfy.memory_management
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models_base
import comfy.taesd.taesd
import comfy.text_encoders.sd2_clip
import comfy.text_encoders.sd3_clip
import torch
from in_host import pack_module
from layouts import LAYOUTS, WIDTH, random_weights

ClipTarget = comfy.supported_models_base.ClipTarget
TEXT = {
    "clip_l_model_config": {"num_hidden_layers": 3, "intermediate_size": 192},
    "clip_h_model_config": {"num_hidden_layers": 3, "intermediate_size": 256},
    "clip_g_model_config": {"num_hidden_layers": 3, "intermediate_size": 320},
}
LINEAR = dict(num_heads=-1, num_head_channels=64, use_linear_in_transformer=True)
LABELS = dict(adm_in_channels=2816, num_classes="sequential")
SD3 = dict(input_size=None, patch_size=2, in_channels=16, adm_in_channels=2048, num_patches=36, pos_embed_max_size=6)


def load(family: str, size: str, dtype: torch.dtype, disable_dynamic: bool = False):
    """(MODEL, CLIP, VAE), the weights kept as `dtype` on the host's own devices.

    family: sd15, sd2, sdxl, sd3 or toy; size: full or tiny.  The toy base is what it is, in float32.
    """
    if family == "toy":
        return pack_module("host.toy_base").load_toy_base()
    model = comfy.sd.load_diffusion_model_state_dict(
        model_weights(family, size, dtype), model_options={"dtype": dtype}, disable_dynamic=disable_dynamic
    )
    # The host's trainer loads its own second model by this.
    model.cached_patcher_init = (_model_alone, (family, size, dtype))
    return model, clip_of(family), vae_of(4 if family != "sd3" else 16)


def _model_alone(family: str, size: str, dtype: torch.dtype, disable_dynamic: bool = False):
    return load(family, size, dtype, disable_dynamic)[0]


def model_weights(family: str, size: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random weights by the host's names.  8-bit ones are Linear layers alone, as such files are."""
    with torch.device("meta"), whole_layers():
        network = {"sd3": _sd3}.get(family, _unet)(family, size)
    shapes = {name: value.shape for name, value in network.state_dict().items() if value.is_floating_point()}
    return {
        name: value.to(torch.float16 if dtype.itemsize < 2 and value.dim() != 2 else dtype)
        for name, value in random_weights(shapes).items()
    }


@contextmanager
def whole_layers() -> Iterator[None]:
    """With dynamic memory the host's layers have no weights until a file gives them some; here they are asked for."""
    memory = comfy.memory_management
    before, memory.aimdo_enabled = memory.aimdo_enabled, False
    try:
        yield
    finally:
        memory.aimdo_enabled = before


def _unet(family: str, size: str):
    if family == "sdxl":
        first, second = 2, 10  # by which the host tells the family
        shape = dict(
            channel_mult=[1, 2, 4] if size == "full" else [1, 1, 1],
            num_res_blocks=[2, 2, 2],
            transformer_depth=[0, 0, first, first, second, second],
            transformer_depth_middle=second,
            transformer_depth_output=[0, 0, 0, first, first, first, second, second, second],
            context_dim=2048,
            **LABELS,
            **LINEAR,
        )
    else:
        form = LAYOUTS["full" if size == "full" else "narrow"]
        heads = dict(num_heads=8, num_head_channels=-1) if family == "sd15" else LINEAR
        shape = dict(
            channel_mult=list(form.widths),
            num_res_blocks=[form.blocks] * len(form.widths),
            transformer_depth=[int(has) for has in form.attends for _ in range(form.blocks)],
            transformer_depth_output=[int(has) for has in form.attends for _ in range(form.blocks + 1)],
            transformer_depth_middle=1,
            context_dim={"sd15": 768, "sd2": 1024}[family],
            **heads,
        )
    return comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel(
        image_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=WIDTH,
        use_spatial_transformer=True,
        operations=comfy.ops.disable_weight_init,
        **shape,
    )


def _sd3(_family: str, size: str):
    depth = 24 if size == "full" else 2
    text = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 64 * depth}}
    return comfy.ldm.modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper(
        **SD3, depth=depth, context_embedder_config=text, operations=comfy.ops.disable_weight_init
    )


def clip_of(family: str) -> comfy.sd.CLIP:
    sd3 = comfy.text_encoders.sd3_clip
    target = {
        "sd15": lambda: ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel),
        "sd2": lambda: ClipTarget(comfy.text_encoders.sd2_clip.SD2Tokenizer, comfy.text_encoders.sd2_clip.SD2ClipModel),
        "sdxl": lambda: ClipTarget(comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel),
        "sd3": lambda: ClipTarget(sd3.SD3Tokenizer, sd3.sd3_clip(clip_l=True, clip_g=True, t5=False)),
    }[family]()
    with torch.device("meta"), whole_layers():
        empty = target.clip(device="meta", dtype=torch.float16, model_options=TEXT)
    shapes = {name: value.shape for name, value in empty.state_dict().items() if value.is_floating_point()}
    weights = {
        # A single number is a temperature, which is as it is made.
        name: value if value.dim() else torch.tensor(math.log(100.0))
        for name, value in random_weights(shapes).items()
    }
    weights = {name: value.to(torch.float16) for name, value in weights.items()}
    return comfy.sd.CLIP(target, state_dict=weights, model_options=TEXT)


def vae_of(channels: int) -> comfy.sd.VAE:
    network = comfy.taesd.taesd.TAESD(latent_channels=channels)
    shapes = {name: value.shape for name, value in network.state_dict().items() if value.is_floating_point()}
    return comfy.sd.VAE(sd=random_weights(shapes))
