"""diffusers' LoRA files in peft's keys: `unet.….lora_A.weight` is lora_down, `lora_B` is lora_up.

These files have no alpha of their own (diffusers takes alpha = rank), so the export folds the scale into
lora_B.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping
from pathlib import Path

import torch

from ..adapters.low_rank import LowRank, check_size
from ..concept import Concept
from ..errors import AdapterError, listed
from ..families import find_family, network_of
from ..merging.compatibility import refuse_own_words
from ..models.layers import canonical_name, check_name
from ..storage.safetensors import write_safetensors
from ..storage.strict_json import parse_json
from .kohya import EXPORTED, require_layers
from .modelspec import modelspec
from .peft_config import PeftConfig, config_beside, config_of

FILE_NAME = "pytorch_lora_weights.safetensors"
_SETTINGS_KEY = "lora_adapter_metadata"
_PREFIX = "base_model.model."
_FACTORS = (
    (
        re.compile(r"(.+?)(?:\.lora_A(?:\.default)?|[._]lora\.down|\.lora_linear_layer\.down|\.lora_down)\.weight"),
        "down",
    ),
    (
        re.compile(r"(.+?)(?:\.lora_B(?:\.default)?|[._]lora\.up|\.lora_linear_layer\.up|\.lora_up)\.weight"),
        "up",
    ),
    (re.compile(r"(.+?)\.lora_mid\.weight"), "mid"),
    (re.compile(r"(.+?)(?:[._]lora)?\.alpha"), "alpha"),
    (re.compile(r"(.+?)(?:\.lora_[AB](?:\.default)?|[._]lora\.(?:up|down)|\.lora_(?:up|down))\.bias"), "apart"),
    (re.compile(r"(.+?)\.(?:bias|diff_b)"), "apart"),
    (re.compile(r"(.+?)(?:\.lora_(?:[AB]|up|down|mid)|[._]lora\.(?:up|down))\..+"), "unknown"),
    (re.compile(r"(.+?)\.(?:lora_magnitude_vector|dora_scale|lora_E|lora_ranknum).*"), "unknown"),
)
TEXT_PARTS = ("text_encoder", "text_encoder_2")
_PARTS = ("transformer.", "unet.", *(f"{part}." for part in TEXT_PARTS))
_STRENGTHS = ("lora_alpha", ".r", "use_rslora", "alpha_pattern")
_TAKE_OUT = f"take {_SETTINGS_KEY} out of the file's metadata to have alpha = rank"
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def export_diffusers(concept: Concept, path: Path | str, dtype: torch.dtype | None = None) -> Path:
    """Write `pytorch_lora_weights.safetensors` into the folder `path`, or the file `path` itself.

    Returns the file.  dtype: None keeps the adapters' own.  delta is unchanged: lora_B = scale * lora_up.
    """
    require_layers(concept)
    refuse_own_words([concept], EXPORTED)
    _refuse_other_layouts(concept)
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    tensors = {}
    for name, trained in concept.layers.items():
        adapter = trained.stock()
        up = adapter.full_up()
        up = up if adapter.scale == 1 else (up.float() * adapter.scale).to(up.dtype)
        up = up[:, :, None, None] if adapter.lora_down.dim() == 4 else up
        tensors[f"{check_name(name)}.lora_A.weight"] = adapter.lora_down
        tensors[f"{name}.lora_B.weight"] = up
    if dtype is not None:
        tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    write_safetensors(path, tensors, {"format": "pt"} | modelspec(concept, tensors, "lora/diffusers"))
    return path


def stem_and_factor(key: str) -> tuple[str | None, str]:
    """(module path, factor) of a key with dots, of any of the forms that have been in use."""
    for pattern, factor in _FACTORS:
        if match := pattern.fullmatch(key):
            return match[1], factor
    return None, "unknown"


def with_peft_alphas(
    path: Path, adapters: Mapping[str, LowRank], explicit: Container[str | None], metadata: Mapping[str, str]
) -> dict[str, LowRank]:
    """The adapters with the alpha of their peft settings; explicit: layers whose alpha a key of the file says.

    The settings are in the file, or in adapter_config.json beside it where it has peft's own name.
    """
    if _SETTINGS_KEY in metadata:
        strength = _embedded(path, metadata[_SETTINGS_KEY])
    elif config := config_beside(path):
        strength = config.alpha
    else:
        return dict(adapters)
    scaled = {
        layer: adapter if layer in explicit else adapter.replace(alpha=strength(layer, adapter.rank))
        for layer, adapter in adapters.items()
    }
    for layer, adapter in scaled.items():
        check_size(f"{path.name}: {layer}", adapter)
    return scaled


def _refuse_other_layouts(concept: Concept) -> None:
    """diffusers keeps the layers of some models apart that are one here, under other names."""
    networks = {name: network_of(name) for name in concept.layers}
    other = next((name for name, network in networks.items() if network is not None and not network.in_diffusers), None)
    if other is not None:
        family = find_family(concept.recipe.architecture)
        title = "this model" if family is None else family.title
        raise AdapterError(
            f"{concept.name}, {other}: diffusers' files cannot hold layers of {title} as they were trained; "
            "export to kohya's form, which ComfyUI reads"
        )


def name_of_path(path: str) -> str | None:
    """Canonical name of a diffusers module path, or None."""
    path = path.removeprefix(_PREFIX).replace(".processor.", ".")
    part, _, rest = path.partition(".")
    if part in ("down_blocks", "mid_block", "up_blocks"):
        part, rest = "unet", path
    rest = rest.removeprefix(_PREFIX)
    head, _, last = rest.rpartition(".")
    if part == "unet" and last == "to_out":
        rest = f"{rest}.0"
    if part in TEXT_PARTS and last in _OLD_TEXT:
        rest = f"{head}.{_OLD_TEXT[last]}"
    if part not in ("unet", *TEXT_PARTS) or not rest:
        return None
    try:
        return check_name(canonical_name(part, rest))
    except AdapterError:
        return None


def _embedded(path: Path, text: str) -> Callable[[str, int], float]:
    """(layer, rank) -> alpha, from the settings of each part of a model that diffusers keeps in the file itself."""
    where = f"{path.name}: {_SETTINGS_KEY}"
    settings = _settings(where, text)
    try:
        if not any(key.startswith(_PARTS) for key in settings):  # one adapter's, as it is beside peft's own files
            return config_of(where, {key: settings[key] for key in settings if "." not in key}, _TAKE_OUT).alpha

        def of_part(part: str) -> PeftConfig:
            settings_of = {key.removeprefix(part): value for key, value in settings.items() if key.startswith(part)}
            return config_of(where, settings_of, _TAKE_OUT)

        configs: dict[str, PeftConfig] = {part.removesuffix("."): of_part(part) for part in _PARTS}
    except AdapterError as error:
        raise AdapterError(f"{error}; it says how strongly the LoRA acts, so mend it, or {_TAKE_OUT}") from error
    if "transformer.lora_alpha" in settings:
        configs["unet"] = configs["transformer"]
    return lambda layer, rank: configs[layer.partition(".")[0]].alpha(layer, rank)


def _settings(where: str, text: str) -> dict[str, object]:
    """`PART.NAME` -> value, or NAME -> value of a single adapter's; also where a part's are an object of their own."""
    settings = parse_json(text, where)
    if not isinstance(settings, dict):
        raise AdapterError(f"{where} is not a JSON object; the file is damaged")
    flat: dict[str, object] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and not key.endswith("_pattern"):
            prefix = "" if key == "default" else f"{key}."  # peft's name for an adapter
            flat |= {f"{prefix}{name}": entry for name, entry in value.items()}
        else:
            flat[key] = value
    return flat


def tell_unknown_parts(metadata: Mapping[str, str]) -> list[str]:
    """A sentence on settings in a file that are of no part of a model that is known here; they are sound."""
    if _SETTINGS_KEY not in metadata:
        return []
    strengths = [key for key in _settings(_SETTINGS_KEY, metadata[_SETTINGS_KEY]) if key.endswith(_STRENGTHS)]
    parts = dict.fromkeys(key.rpartition(".")[0] for key in strengths if "." in key and not key.startswith(_PARTS))
    if not parts:
        return []
    return [
        f"its {_SETTINGS_KEY} speaks of {listed(parts)}, no part of a model that is known here, so how strong those "
        "layers are is not read: alpha is their rank"
    ]
