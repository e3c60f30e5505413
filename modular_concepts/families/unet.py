"""Stable Diffusion's U-Net, by diffusers' paths; SD 1.x, 2.x, XL and the toy base are four sizes of it.

kohya's trainers and LyCORIS count the blocks of SDXL's through as Stability's code does, three to a level; that is also
how hosts' own keys count them.
"""

from __future__ import annotations

import re

from .family import NEITHER, POSITIONS, TEXTS, Network

CROSS_ATTENTION = "attn2"  # what diffusers and hosts call it in each of the transformers' blocks

_RESNET = {
    "in_layers.2": "conv1",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_SINGLE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
}
_BLOCK = re.compile(r"(input_blocks|middle_block|output_blocks)\.(\d+)\.(.+)")
# The same in kohya's stems: the parts before and behind the numbers, whose underscores are dots.
_COUNTED = re.compile(r"(input_blocks|middle_block|output_blocks)_(\d+)_(?:(\d)_)?(.+)")
_SINGLE_STEMS = {key.replace(".", "_"): path for key, path in _SINGLE.items()}
_RESNET_STEMS = {key.replace(".", "_"): key for key in _RESNET}


def original(path: str) -> str | None:
    """A path of the original layout, whose blocks are counted through, three to a level, in diffusers' words."""
    if path in _SINGLE:
        return _SINGLE[path]
    match = _BLOCK.fullmatch(path)
    if match is None:
        return None
    kind, number, rest = match[1], int(match[2]), match[3]
    if kind == "middle_block":
        place, inner = "mid_block", {0: "resnets.0", 1: "attentions.0", 2: "resnets.1"}.get(number)
    else:
        level, index = divmod(number - 1, 3) if kind == "input_blocks" else divmod(number, 3)
        place = f"{'down' if kind == 'input_blocks' else 'up'}_blocks.{level}"
        part, _, rest = rest.partition(".")
        if rest == "op" and kind == "input_blocks":
            return f"{place}.downsamplers.0.conv"
        if rest == "conv" and kind == "output_blocks":
            return f"{place}.upsamplers.0.conv"
        inner = {"0": f"resnets.{index}", "1": f"attentions.{index}"}.get(part)
    if inner is None or not rest:
        return None
    if inner.startswith("resnets"):
        rest = _RESNET.get(rest)
    return f"{place}.{inner}.{rest}" if rest else None


def respelled(stem: str) -> str | None:
    """A kohya stem whose blocks are counted through as ours; others as they are."""
    if stem in _SINGLE_STEMS:
        return _SINGLE_STEMS[stem].replace(".", "_")
    match = _COUNTED.fullmatch(stem)
    if match is None:
        return stem
    kind, number, part, rest = match.groups()
    rest = _RESNET_STEMS.get(rest, rest)
    if (kind == "middle_block") != (part is None):  # whose blocks alone have one part each
        return None
    # A transformer's own path keeps its underscores, which nothing here looks at.
    path = original(".".join((kind, number, *(() if part is None else (part,)), rest)))
    return None if path is None else path.replace(".", "_")


_PARTS = r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.(attentions|resnets|downsamplers|upsamplers|motion_modules)\."

UNET = Network(
    layers=re.compile(rf"{_PARTS}|(conv_in|conv_out)$|(time|add|class)_embedding\."),
    targets={
        "attention": re.compile(r"\.attentions\..*\.attn[12]\.to_(q|k|v|out\.0)$"),
        "cross_attention": re.compile(r"\.attentions\..*\.attn2\.to_(q|k|v|out\.0)$"),
        "cross_attention_kv": re.compile(r"\.attentions\..*\.attn2\.to_[kv]$"),
        "feed_forward": re.compile(r"\.attentions\..*\.ff\.net\.(0\.proj|2)$"),
        "all_linear": re.compile(r"\.attentions\."),
    },
    blocks=(
        (re.compile(r"down_blocks\.(\d+)\."), "down {}"),
        (re.compile(r"mid_block\."), "mid"),
        (re.compile(r"up_blocks\.(\d+)\."), "up {}"),
    ),
    tokens=(
        (re.compile(r"\.time_emb_proj$|(time|add|class)_embedding\."), NEITHER),
        (re.compile(r"\.attn2\.to_[kv]$"), TEXTS),
        (re.compile(""), POSITIONS),
    ),
    words=(
        *("down_blocks", "up_blocks", "mid_block", "transformer_blocks", "to_q", "to_k", "to_v", "to_out"),
        *("proj_in", "proj_out", "conv_in", "conv_out", "conv_shortcut", "time_emb_proj", "time_embedding"),
        *("add_embedding", "linear_1", "linear_2"),
    ),
    original=original,
    respelled=respelled,
    checkpointed=("ResnetBlock2D", "BasicTransformerBlock", "ResBlock", "SpatialTransformer"),
)
