"""Stable Diffusion 3: a diffusion transformer that reads text and picture in one attention, by its own paths."""

import re

from .clip_text import CLIP_TEXT
from .family import NEITHER, POSITIONS, TEXTS, Family, Fused, Network, TextEncoder, equal_parts

_BLOCK = r"joint_blocks\.\d+\.(x|context)_block\."

MMDIT = Network(
    layers=re.compile(r"joint_blocks\.\d+\.|(x|y|t|context)_embedder\b|final_layer\.|context_processor\."),
    targets={
        "attention": re.compile(rf"{_BLOCK}attn2?\.(qkv|proj)$"),
        "feed_forward": re.compile(rf"{_BLOCK}mlp\.(fc|w)[123]$"),
        "all_linear": re.compile(_BLOCK),
    },
    refusal="a diffusion transformer reads text and picture in one attention and has no cross-attention of its own; "
    "choose attention",
    blocks=((re.compile(r"joint_blocks\.(\d+)\."), "joint {}"),),
    tokens=(
        (re.compile(r"adaLN_modulation|[ty]_embedder"), NEITHER),
        (re.compile(r"\.context_block\.|^context_(embedder|processor)"), TEXTS),
        (re.compile(""), POSITIONS),
    ),
    words=(
        *("joint_blocks", "x_block", "context_block", "adaLN_modulation", "x_embedder", "y_embedder", "t_embedder"),
        *("context_embedder", "context_processor", "final_layer"),
    ),
    checkpointed=("JointTransformerBlock", "JointBlock"),
    joint=True,
    in_diffusers=False,  # which keeps queries, keys and values apart, under other names
    fused=(Fused(re.compile(rf"{_BLOCK}attn2?\.qkv"), equal_parts("q", "k", "v")),),
)
SD3 = Family(
    name="sd3",
    title="Stable Diffusion 3",
    modelspec="stable-diffusion-3",
    kohya_versions=("sd3",),
    side=1024,
    denoiser=MMDIT,
    text_encoders=(
        TextEncoder("text_encoder", "clip_l", 768, CLIP_TEXT),
        TextEncoder("text_encoder_2", "clip_g", 1280, CLIP_TEXT, projected=True),
    ),
    readers=("t5xxl",),
)
