"""One canonical name per layer: dotted diffusers paths under `unet.` and `text_encoder.`.

`text_encoder.` names always carry the `text_model.` level, which some versions of transformers have dropped
from the module tree.  In files a name is its kohya key: `lora_unet_` or `lora_te_` and the path with
underscores.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import nn

from .errors import AdapterError

TARGETS = ("attention", "cross_attention", "cross_attention_kv", "feed_forward", "all_linear")
PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te"}
MAX_NAME = 256

_NAME = re.compile(r"(unet|text_encoder)(\.[A-Za-z0-9_]+)+")
_UNET = {
    "attention": re.compile(r"\.attentions\..*\.attn[12]\.to_(q|k|v|out\.0)$"),
    "cross_attention": re.compile(r"\.attentions\..*\.attn2\.to_(q|k|v|out\.0)$"),
    "cross_attention_kv": re.compile(r"\.attentions\..*\.attn2\.to_[kv]$"),
    "feed_forward": re.compile(r"\.attentions\..*\.ff\.net\.(0\.proj|2)$"),
    "all_linear": re.compile(r"\.attentions\."),
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
    (re.compile(r"text_encoder\..*encoder\.layers\.(\d+)\."), "text {}"),
)
# Words of diffusers' and transformers' module paths that hold an underscore of their own.
_COMPOUND = (
    "down_blocks|up_blocks|mid_block|transformer_blocks|to_q|to_k|to_v|to_out|proj_in|proj_out|conv_in|conv_out|"
    "conv_shortcut|time_emb_proj|time_embedding|add_embedding|linear_1|linear_2|text_model|self_attn|q_proj|k_proj|"
    "v_proj|out_proj|text_projection"
)
_WORD = re.compile(rf"({_COMPOUND}|[A-Za-z0-9]+)(?:_|$)")


def find_layers(
    unet: nn.Module | None,
    text_encoder: nn.Module | None,
    targets: str | Iterable[str] = "attention",
    text_encoder_targets: str | Iterable[str] | None = None,
) -> dict[str, nn.Module]:
    """`chosen_layers` of a diffusers U-Net and a transformers text encoder; None leaves a model out.

    unet: diffusers' UNet2DConditionModel.  text_encoder: transformers' CLIPTextModel, with or without
    `text_model`.
    """
    named = {
        canonical_name(part, path): module
        for part, model in (("unet", unet), ("text_encoder", text_encoder))
        if model is not None
        for path, module in model.named_modules()
    }
    return chosen_layers(named, targets, text_encoder_targets)


def chosen_layers(
    named: Mapping[str, nn.Module],
    targets: str | Iterable[str] = "attention",
    text_encoder_targets: str | Iterable[str] | None = None,
) -> dict[str, nn.Module]:
    """Canonical name -> Linear module, from the U-Net's first block to the text encoder's last: what adapters go to.

    named: any modules of a model by canonical name; what is no Linear is passed over.
    attention: to_q, to_k, to_v, to_out of attn1 and attn2; in the text encoder the four projections of
    self_attn.
    cross_attention: those of attn2 alone; cross_attention_kv: its to_k and to_v, which read the text (Custom
    Diffusion's choice).  Neither means anything in the text encoder.
    feed_forward: both Linear layers of ff; in the text encoder mlp.fc1 and fc2.
    all_linear: every Linear within the attention blocks, so also proj_in and proj_out where they are Linear
    (they are 1x1 convolutions in SD 1.5); time embeddings and ResNets are left alone.
    Several targets add up; None leaves the text encoder out.  Raises AdapterError when nothing matches.
    """
    patterns = {
        "unet": _patterns(targets or (), _UNET),
        "text_encoder": _patterns(text_encoder_targets or (), _TEXT),
    }
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
    """Name of the module at `path` inside `part` ("unet" or "text_encoder")."""
    if part == "text_encoder" and not path.startswith(("text_model.", "text_projection")):
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


def file_key(name: str) -> str:
    """unet.a.b_c -> lora_unet_a_b_c; text_encoder.a.b -> lora_te_a_b."""
    part, path = check_name(name).split(".", 1)
    return f"{PREFIXES[part]}_{path.replace('.', '_')}"


def name_of_key(key: str) -> str | None:
    """The canonical name of a kohya key, or None; `file_key(name_of_key(key)) == key` but for lora_te1_.

    Underscores are ambiguous, so this knows the words of SD's module paths; where the model is at hand, match
    its own names instead.
    """
    for part, prefixes in (("unet", ("lora_unet_",)), ("text_encoder", ("lora_te_", "lora_te1_"))):
        for prefix in prefixes:
            if not key.startswith(prefix):
                continue
            words = _WORD.findall(key.removeprefix(prefix))
            name = f"{part}.{'.'.join(words)}"
            if words and key == prefix + "_".join(words) and len(name) <= MAX_NAME:
                return name
    return None


def block_of(name: str) -> str:
    """The block of a layer in a person's words: "down 0", "mid", "up 1", "text 3", else "other"."""
    for pattern, words in _BLOCKS:
        if match := pattern.match(name):
            return words.format(*match.groups())
    return "other"


def _patterns(targets: str | Iterable[str], known: dict[str, re.Pattern]) -> list[re.Pattern]:
    names = [targets] if isinstance(targets, str) else list(targets)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise AdapterError(f"target {unknown[0]!r} is unknown; choose from {', '.join(TARGETS)}")
    return [known[name] for name in names]


def _reading_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts the U-Net before the text encoder and layers.2 before layers.10.

    Libraries list their modules in orders of their own, and the order of layers must not depend on them.
    """
    part = (int(name.startswith("text_encoder.")), "")
    return [part, *((int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"(\d+)", name))]
