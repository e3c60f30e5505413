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
from ..errors import AdapterError
from ..families import find_family, network_of
from ..models.layers import canonical_name, check_name
from ..storage.safetensors import write_safetensors
from ..storage.strict_json import parse_json
from .kohya import require_layers
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
    # Whatever else stands beside factors says how they are meant, a scale of eight-bit numbers for instance.
    (re.compile(r"(.+?)(?:\.lora_(?:[AB]|up|down|mid)|[._]lora\.(?:up|down))\..+"), "unknown"),
    (re.compile(r"(.+)\.[^.]+"), "unknown"),
)
TEXT_PARTS = ("text_encoder", "text_encoder_2")
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def export_diffusers(concept: Concept, path: Path | str, dtype: torch.dtype | None = None) -> Path:
    """Write `pytorch_lora_weights.safetensors` into the folder `path`, or the file `path` itself.

    Returns the file.  dtype: None keeps the adapters' own.  delta is unchanged: lora_B = scale * lora_up.
    """
    require_layers(concept)
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
    where = f"{path.name}: the peft settings"
    settings = parse_json(text, where)
    if not isinstance(settings, dict):
        raise AdapterError(f"{where} are not a JSON object; the file is damaged")

    if not any(key.partition(".")[0] in ("transformer", "unet", *TEXT_PARTS) for key in settings):
        return config_of(where, settings).alpha  # one adapter's, as it is beside peft's own files

    def of_part(part: str) -> PeftConfig:
        return config_of(
            where, {key.removeprefix(part): value for key, value in settings.items() if key.startswith(part)}
        )

    configs = {part: of_part(f"{part}.") for part in ("transformer", "unet", *TEXT_PARTS)}
    if "transformer.lora_alpha" in settings:
        configs["unet"] = configs["transformer"]
    return lambda layer, rank: configs[layer.partition(".")[0]].alpha(layer, rank)
