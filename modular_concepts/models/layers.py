"""One canonical name per layer: dotted paths under `unet.`, `text_encoder.` and `text_encoder_2.`.

Paths are diffusers' for U-Nets and the model's own for a diffusion transformer; `families` knows what each means.
`text_encoder.` is CLIP-L, `text_encoder_2.` CLIP-G; their names always carry the `text_model.` level, which some
versions of transformers have dropped from the module tree.  In files a name is its kohya key: `lora_unet_`,
`lora_te_`, `lora_te1_` or `lora_te2_` and the path with underscores.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import nn

from ..adapters.sites import Layer, apart
from ..errors import AdapterError
from ..families import find_family, network_of, networks, titles
from ..families.family import Network
from ..settings.training import TARGETS

PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
MAX_NAME = 256

_NAME = re.compile(r"(unet|text_encoder|text_encoder_2)(\.[A-Za-z0-9_]+)+")
_KOHYA = {
    "unet": ("lora_unet_",),
    "text_encoder": ("lora_te_", "lora_te1_"),  # where there are two of them
    "text_encoder_2": ("lora_te2_",),
}


def find_layers(
    unet: nn.Module | None,
    text_encoder: nn.Module | None,
    targets: str | Iterable[str] = "attention",
    text_encoder_targets: str | Iterable[str] | None = None,
    text_encoder_2: nn.Module | None = None,
) -> dict[str, Layer]:
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
) -> dict[str, Layer]:
    """Canonical name -> what adapters go to: a Linear, or the sites of one that is fused, in reading order.

    From the U-Net's first block to the last text encoder's.

    named: any modules of a model by canonical name; what is no Linear is passed over.
    attention: queries, keys, values and outputs of every attention, fused or not.
    cross_attention: those that read the text alone; cross_attention_kv: their keys and values (Custom Diffusion's
    choice).  Neither means anything in a text encoder, nor where one attention reads text and picture.
    feed_forward: the Linear layers behind each attention.
    all_linear: every Linear within the attention blocks, so also proj_in and proj_out where they are Linear (they are
    1x1 convolutions in SD 1.5), and modulation; time embeddings and ResNets are left alone.
    Each family's record says which those are (`families/family.py`).
    Several targets add up; None leaves the text encoders out.  Raises AdapterError when nothing matches.
    """
    wanted = {"unet": _names(targets), "text_encoder": _names(text_encoder_targets)}
    wanted["text_encoder_2"] = wanted["text_encoder"]
    for part, names in wanted.items():
        _check_targets(part, names, [network for network in networks(part) if _holds(network, part, named)])
    chosen: dict[str, Layer] = {}
    for name in sorted(named, key=_reading_order):
        layer = named[name]
        if isinstance(layer, nn.Linear) and _is_target(name, wanted[name.split(".", 1)[0]]):
            network = network_of(name)
            chosen |= apart({name: layer}) if network is not None and network.apart else {name: layer}
    if not chosen:
        raise AdapterError(
            f"no layer matches the targets {targets!r} and {text_encoder_targets!r}; "
            "the model has no attention blocks that we know, or no model was given"
        )
    return chosen


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
    family = find_family(architecture)
    two = family is not None and len(family.text_encoders) > 1
    return f"{'lora_te1' if part == 'text_encoder' and two else PREFIXES[part]}_{path.replace('.', '_')}"


def name_of_key(key: str) -> str | None:
    """The canonical name of a kohya key, or None; `file_key` of it is the key again, or our spelling of another's.

    Underscores are ambiguous, so this knows the words of the families' module paths; where the model is at hand, match
    its own names instead.
    """
    for part, prefixes in _KOHYA.items():
        for prefix in prefixes:
            if not key.startswith(prefix):
                continue
            for network in networks(part):
                path = network.path_of(key.removeprefix(prefix))
                if path is not None and len(f"{part}.{path}") <= MAX_NAME:
                    return f"{part}.{path}"
    return None


def name_of_original(path: str) -> str | None:
    """The canonical name of a denoiser's module by its path in the model's original layout, or None."""
    for network in networks("unet"):
        renamed = network.original(path)
        if renamed is not None and network.has(renamed):
            return f"unet.{renamed}"
    return None


def block_of(name: str) -> str:
    """The block of a layer in a person's words: "down 0", "mid", "up 1", "joint 2", "text 3", else "other"."""
    part, _, path = name.partition(".")
    network = network_of(name)
    block = None if network is None else network.block_of(path)
    if block is None:
        return "other"
    return f"second {block}" if part == "text_encoder_2" else block


def tokens_of(name: str) -> str:
    """What a layer's tokens are by its name: `families.family.POSITIONS`, TEXTS, JOINT or NEITHER.

    Raises AdapterError for a layer of no family that there is: nobody knows what a mask would do to it.
    """
    network = network_of(name)
    if network is None:
        raise AdapterError(
            f"{name}: this layer is of none of the models that concepts are for ({titles()}), so it cannot act by "
            "region; merge the concept into the weights instead"
        )
    return network.tokens_of(name.partition(".")[2])


def is_target(name: str, target: str) -> bool:
    """Whether a layer is one of a target (`chosen_layers`)."""
    return _is_target(name, [target])


def _holds(network: Network, part: str, named: Iterable[str]) -> bool:
    return any(name.startswith(f"{part}.") and network.has(name.partition(".")[2]) for name in named)


def _check_targets(part: str, targets: Iterable[str], there: Iterable[Network]) -> None:
    for target in targets:
        if target not in TARGETS or part != "unet" and not any(target in network.targets for network in networks(part)):
            raise AdapterError(f"target {target!r} is unknown; choose from {', '.join(TARGETS)}")
        refusing = next((network for network in there if target not in network.targets), None)
        if refusing is not None:
            raise AdapterError(f"target {target!r}: {refusing.refusal}")


def _is_target(name: str, targets: Iterable[str]) -> bool:
    network, path = network_of(name), name.partition(".")[2]
    patterns = [] if network is None else [network.targets.get(target) for target in targets]
    return any(pattern is not None and pattern.search(path) for pattern in patterns)


def _names(targets: str | Iterable[str] | None) -> list[str]:
    return [targets] if isinstance(targets, str) else list(targets or ())


def _reading_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts the U-Net before the text encoders and layers.2 before layers.10.

    Libraries list their modules in orders of their own, and the order of layers must not depend on them.
    """
    part = (list(PREFIXES).index(name.split(".", 1)[0]), "")
    return [part, *((int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"(\d+)", name))]
