"""One canonical name per layer: dotted paths under `unet.`, `text_encoder.` and `text_encoder_2.`.

Paths are diffusers' for U-Nets and the model's own for a diffusion transformer (`unet.joint_blocks.0.…`).
`text_encoder.` is CLIP-L, `text_encoder_2.` CLIP-G; their names always carry the `text_model.` level, which some
versions of transformers have dropped from the module tree.  In files a name is its kohya key: `lora_unet_`,
`lora_te_`, `lora_te1_` or `lora_te2_` and the path with underscores.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import nn

from .choices import TARGETS
from .errors import AdapterError

PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
TWO_TEXT_MODELS = ("sdxl", "sd3")  # where kohya's key of the first is lora_te1
MAX_NAME = 256

_NAME = re.compile(r"(unet|text_encoder|text_encoder_2)(\.[A-Za-z0-9_]+)+")
_JOINT = r"\.joint_blocks\.\d+\.(x|context)_block\."
_UNET = {
    "attention": re.compile(rf"\.attentions\..*\.attn[12]\.to_(q|k|v|out\.0)$|{_JOINT}attn2?\.(qkv|proj)$"),
    "cross_attention": re.compile(r"\.attentions\..*\.attn2\.to_(q|k|v|out\.0)$"),
    "cross_attention_kv": re.compile(r"\.attentions\..*\.attn2\.to_[kv]$"),
    "feed_forward": re.compile(rf"\.attentions\..*\.ff\.net\.(0\.proj|2)$|{_JOINT}mlp\.(fc|w)[123]$"),
    "all_linear": re.compile(rf"\.attentions\.|{_JOINT}"),
}
_TEXT = {
    "attention": re.compile(r"\.self_attn\.(q|k|v|out)_proj$"),
    "feed_forward": re.compile(r"\.mlp\.fc[12]$"),
    "all_linear": re.compile(r"\.encoder\.layers\."),
}
_BLOCKS = (
    (re.compile(r"unet\.down_blocks\.(\d+)\."), "down {}"),
    (re.compile(r"unet\.mid_block\."), "mid"),
    (re.compile(r"unet\.up_blocks\.(\d+)\."), "up {}"),
    (re.compile(r"unet\.joint_blocks\.(\d+)\."), "joint {}"),
    (re.compile(r"text_encoder\..*encoder\.layers\.(\d+)\."), "text {}"),
    (re.compile(r"text_encoder_2\..*encoder\.layers\.(\d+)\."), "second text {}"),
)
# Words of the models' module paths that hold an underscore of their own.
_COMPOUND = (
    "down_blocks|up_blocks|mid_block|transformer_blocks|to_q|to_k|to_v|to_out|proj_in|proj_out|conv_in|conv_out|"
    "conv_shortcut|time_emb_proj|time_embedding|add_embedding|linear_1|linear_2|text_model|self_attn|q_proj|k_proj|"
    "v_proj|out_proj|text_projection|joint_blocks|x_block|context_block|adaLN_modulation"
)
# kohya's trainers and LyCORIS count the blocks of SDXL's U-Net through as Stability's code does, three to a level.
_RESNET = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_RESNET_PART = f"({'|'.join(_RESNET)})"
_COUNTED = (
    (re.compile(r"input_blocks_(\d+)_1_"), lambda found: "{}_attentions_{}_".format(*_down(found))),
    (re.compile(r"middle_block_(1)_"), lambda found: "mid_block_attentions_0_"),
    (re.compile(r"output_blocks_(\d+)_1_"), lambda found: "{}_attentions_{}_".format(*_up(found))),
)
_BESIDE_ATTENTIONS = (
    (re.compile(r"input_blocks_0_0"), lambda found: "conv_in"),
    (re.compile(r"out_2"), lambda found: "conv_out"),
    (re.compile(r"time_embed_([02])"), lambda found: f"time_embedding.linear_{1 + int(found[1]) // 2}"),
    (re.compile(r"label_emb_0_([02])"), lambda found: f"add_embedding.linear_{1 + int(found[1]) // 2}"),
    (re.compile(r"input_blocks_(\d+)_0_op"), lambda found: f"{_dotted(_down(found)[0])}.downsamplers.0.conv"),
    (re.compile(r"output_blocks_(\d+)_[12]_conv"), lambda found: f"{_dotted(_up(found)[0])}.upsamplers.0.conv"),
    (re.compile(rf"input_blocks_(\d+)_0_{_RESNET_PART}"), lambda found: _resnet(*_down(found), found[2])),
    (
        re.compile(rf"middle_block_([02])_{_RESNET_PART}"),
        lambda found: _resnet("mid_block", int(found[1]) // 2, found[2]),
    ),
    (re.compile(rf"output_blocks_(\d+)_0_{_RESNET_PART}"), lambda found: _resnet(*_up(found), found[2])),
)
_COUNTED_THROUGH = tuple(
    f"lora_unet_{part}_" for part in ("input_blocks", "middle_block", "output_blocks", "time_embed", "label_emb", "out")
)
_WORD = re.compile(rf"({_COMPOUND}|[A-Za-z0-9]+)(?:_|$)")


def find_layers(
    unet: nn.Module | None,
    text_encoder: nn.Module | None,
    targets: str | Iterable[str] = "attention",
    text_encoder_targets: str | Iterable[str] | None = None,
    text_encoder_2: nn.Module | None = None,
) -> dict[str, nn.Module]:
    """`chosen_layers` of a diffusers U-Net and transformers text encoders; None leaves a model out.

    unet: diffusers' UNet2DConditionModel.  text_encoder, text_encoder_2: transformers' CLIPTextModel, with or without
    `text_model`.
    """
    named = {
        canonical_name(part, path): module
        for part, model in (("unet", unet), ("text_encoder", text_encoder), ("text_encoder_2", text_encoder_2))
        if model is not None
        for path, module in model.named_modules()
    }
    return chosen_layers(named, targets, text_encoder_targets)


def chosen_layers(
    named: Mapping[str, nn.Module],
    targets: str | Iterable[str] = "attention",
    text_encoder_targets: str | Iterable[str] | None = None,
) -> dict[str, nn.Module]:
    """Canonical name -> Linear module, from the U-Net's first block to the last text encoder's: what adapters go to.

    named: any modules of a model by canonical name; what is no Linear is passed over.
    attention: to_q, to_k, to_v, to_out of attn1 and attn2; qkv and proj of a diffusion transformer's joint blocks; in
    the text encoders the four projections of self_attn.
    cross_attention: those of attn2 alone; cross_attention_kv: its to_k and to_v, which read the text (Custom
    Diffusion's choice).  Neither means anything in the text encoder, nor in a diffusion transformer.
    feed_forward: both Linear layers of ff; in joint blocks and the text encoders those of mlp.
    all_linear: every Linear within the attention blocks, so also proj_in and proj_out where they are Linear
    (they are 1x1 convolutions in SD 1.5), and adaLN_modulation; time embeddings and ResNets are left alone.
    Several targets add up; None leaves the text encoders out.  Raises AdapterError when nothing matches.
    """
    absent = [name for name in _names(targets) if name.startswith("cross_attention")]
    if absent and any(name.startswith("unet.joint_blocks.") for name in named):
        raise AdapterError(
            f"target {absent[0]!r}: a diffusion transformer reads text and picture in one attention and has no "
            "cross-attention of its own; choose attention"
        )
    patterns = {
        "unet": _patterns(targets, _UNET),
        "text_encoder": _patterns(text_encoder_targets, _TEXT),
    }
    patterns["text_encoder_2"] = patterns["text_encoder"]
    found = {
        name: named[name]
        for name in sorted(named, key=_reading_order)
        if isinstance(named[name], nn.Linear)
        and any(pattern.search(name) for pattern in patterns[name.split(".", 1)[0]])
    }
    if not found:
        raise AdapterError(
            f"no layer matches the targets {targets!r} and {text_encoder_targets!r}; "
            "the model has no attention blocks that we know, or no model was given"
        )
    return found


def canonical_name(part: str, path: str) -> str:
    """Name of the module at `path` inside `part` ("unet", "text_encoder" or "text_encoder_2")."""
    if part != "unet" and not path.startswith(("text_model.", "text_projection")):
        path = f"text_model.{path}"
    return f"{part}.{path}"


def check_name(name: object) -> str:
    """A canonical name from an untrusted source, or AdapterError."""
    if not isinstance(name, str) or len(name) > MAX_NAME or not _NAME.fullmatch(name):
        raise AdapterError(
            f"layer name {ascii(name)[:80]} is not a dotted path that begins with unet. or text_encoder.; "
            "the file is damaged"
        )
    return name


def file_key(name: str, architecture: str = "") -> str:
    """unet.a.b_c -> lora_unet_a_b_c; text_encoder.a.b -> lora_te_a_b, or lora_te1_a_b where there are two of them."""
    part, path = check_name(name).split(".", 1)
    prefix = "lora_te1" if part == "text_encoder" and architecture in TWO_TEXT_MODELS else PREFIXES[part]
    return f"{prefix}_{path.replace('.', '_')}"


def name_of_key(key: str) -> str | None:
    """The canonical name of a kohya key, or None; `file_key` of it is the key again, or our spelling of another's.

    Underscores are ambiguous, so this knows the words of SD's module paths; where the model is at hand, match
    its own names instead.
    """
    key = by_level(key)
    if key.startswith(_COUNTED_THROUGH):
        return None
    known = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}
    for part, prefixes in known.items():
        for prefix in prefixes:
            if not key.startswith(prefix):
                continue
            words = _WORD.findall(key.removeprefix(prefix))
            name = f"{part}.{'.'.join(words)}"
            if words and key == prefix + "_".join(words) and len(name) <= MAX_NAME:
                return name
    return None


def by_level(key: str) -> str:
    """A key whose blocks are counted through, as kohya's trainers write SDXL's, in the words of diffusers' levels."""
    for pattern, words in _COUNTED:
        if match := pattern.match(key, len("lora_unet_")):
            return f"lora_unet_{words(match)}{key[match.end() :]}"
    return key


def name_of_counted(key: str) -> str | None:
    """The canonical name of a kohya key whose blocks are counted through, of a layer beside the attentions, or None."""
    path = key.removeprefix("lora_unet_")
    for pattern, words in _BESIDE_ATTENTIONS if path != key else ():
        if match := pattern.fullmatch(path):
            name = f"unet.{words(match)}"
            return name if len(name) <= MAX_NAME and _NAME.fullmatch(name) else None
    return None


def _down(found: re.Match) -> tuple[str, int]:
    """(level, place in it) of an input block."""
    level, place = divmod(int(found[1]) - 1, 3)
    return f"down_blocks_{level}", place


def _up(found: re.Match) -> tuple[str, int]:
    level, place = divmod(int(found[1]), 3)
    return f"up_blocks_{level}", place


def _dotted(level: str) -> str:
    return level.replace("blocks_", "blocks.")


def _resnet(level: str, place: int, part: str) -> str:
    return f"{_dotted(level)}.resnets.{place}.{_RESNET[part]}"


def block_of(name: str) -> str:
    """The block of a layer in a person's words: "down 0", "mid", "up 1", "joint 2", "text 3", else "other"."""
    for pattern, words in _BLOCKS:
        if match := pattern.match(name):
            return words.format(*match.groups())
    return "other"


def _patterns(targets: str | Iterable[str] | None, known: dict[str, re.Pattern]) -> list[re.Pattern]:
    names = _names(targets)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise AdapterError(f"target {unknown[0]!r} is unknown; choose from {', '.join(TARGETS)}")
    return [known[name] for name in names]


def _names(targets: str | Iterable[str] | None) -> list[str]:
    return [targets] if isinstance(targets, str) else list(targets or ())


def _reading_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts the U-Net before the text encoders and layers.2 before layers.10.

    Libraries list their modules in orders of their own, and the order of layers must not depend on them.
    """
    part = (list(PREFIXES).index(name.split(".", 1)[0]), "")
    return [part, *((int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"(\d+)", name))]
