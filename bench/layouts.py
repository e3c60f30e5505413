"""Stable Diffusion 1.5's layout with random weights, for the host and for diffusers: the whole of it, or a narrow one.

Weights are normal with variance 1 / fan-in, so that signals stay about as large as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

CONTEXT = (77, 768)
WIDTH = 320


@dataclass(frozen=True)
class Layout:
    """widths: of each level, in units of 320 channels; blocks: in each level; attends: which levels have attention."""

    widths: tuple[int, ...]
    blocks: int
    attends: tuple[bool, ...]


LAYOUTS = {
    "full": Layout((1, 2, 4, 4), 2, (True, True, True, False)),
    "narrow": Layout((1,), 1, (True,)),
}


def diffusers_unet(layout: Layout) -> nn.Module:
    unet = empty_unet(layout)
    weights = {name: value.shape for name, value in unet.state_dict().items()}
    unet.load_state_dict(random_weights(weights), assign=True)
    return unet.eval().requires_grad_(False)


def empty_unet(layout: Layout) -> nn.Module:
    """Without memory for weights, to read shapes from."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=64,
            block_out_channels=tuple(WIDTH * width for width in layout.widths),
            layers_per_block=layout.blocks,
            down_block_types=tuple("CrossAttnDownBlock2D" if has else "DownBlock2D" for has in layout.attends),
            up_block_types=tuple("CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(layout.attends)),
            cross_attention_dim=CONTEXT[1],
            attention_head_dim=8,
        )


def write_checkpoint(layout: Layout, path: Path) -> None:
    """In the host's interpreter: U-Net in float32, the whole text encoder in half precision, a tiny autoencoder."""
    import comfy.ldm.modules.diffusionmodules.openaimodel as unets
    import comfy.ops
    import comfy.sd1_clip
    import comfy.taesd.taesd
    from safetensors.torch import save_file

    with torch.device("meta"):
        unet = unets.UNetModel(
            image_size=32,
            in_channels=4,
            out_channels=4,
            model_channels=WIDTH,
            channel_mult=list(layout.widths),
            num_res_blocks=[layout.blocks] * len(layout.widths),
            num_heads=8,
            num_head_channels=-1,
            context_dim=CONTEXT[1],
            use_spatial_transformer=True,
            transformer_depth=[int(has) for has in layout.attends for _ in range(layout.blocks)],
            transformer_depth_output=[int(has) for has in layout.attends for _ in range(layout.blocks + 1)],
            transformer_depth_middle=1,
            operations=comfy.ops.disable_weight_init,
        )
        text = comfy.sd1_clip.SDClipModel(device="meta", dtype=torch.float32)
    parts = {
        "model.diffusion_model.": (unet, torch.float32),
        "cond_stage_model.transformer.": (text.transformer, torch.float16),
        "first_stage_model.": (comfy.taesd.taesd.TAESD(), torch.float32),
    }
    weights = {}
    for prefix, (network, dtype) in parts.items():
        own = {name: value.shape for name, value in network.state_dict().items() if value.is_floating_point()}
        own = {name: shape for name, shape in own.items() if "text_projection" not in name}
        weights |= {prefix + name: value.to(dtype) for name, value in random_weights(own).items()}
    save_file(weights, path)


def random_weights(shapes: Mapping[str, torch.Size], seed: int = 0) -> dict[str, Tensor]:
    """Norms and biases as they are made; the rest from one pool of normal numbers, since drawing all takes minutes."""
    pool = torch.randn(4_000_037, generator=torch.Generator().manual_seed(seed))
    weights = {}
    for name, shape in shapes.items():
        if len(shape) < 2:
            weights[name] = torch.full(shape, float(name.endswith("weight")))
        else:
            drawn = pool.repeat(-(-shape.numel() // len(pool)))[: shape.numel()].reshape(shape)
            weights[name] = drawn * shape[1:].numel() ** -0.5
    return weights
