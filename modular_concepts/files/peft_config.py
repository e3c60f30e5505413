"""peft's adapter_config.json, which lies beside adapter_model.safetensors and says how strongly it acts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..concept import clip
from ..errors import AdapterError
from .safe import parse_json

MODEL, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MAX_CONFIG = 2**20
MAX_ALPHA = 1e12
_PATTERN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.")


@dataclass(frozen=True)
class PeftConfig:
    """What a configuration says of strength: alpha and rank of all layers and of some, by the end of their names.

    rslora: the scale is alpha / sqrt(rank), and not alpha / rank.  where: names the file in messages.
    """

    where: str
    lora_alpha: float
    rank: int
    alphas: Mapping[str, float]
    ranks: Mapping[str, float]
    rslora: bool

    def alpha(self, layer: str, rank: int) -> float:
        """alpha, where scale = alpha / rank, of a layer with this canonical name.

        Raises AdapterError where the configuration speaks of another rank than the file has.
        """
        said = _of(self.ranks, layer, self.rank)
        if said != rank:
            raise AdapterError(
                f"{self.where} says rank {said:g} of {layer}, whose factors have {rank}; it is of another file, so "
                "remove it, or put the right one there"
            )
        return _of(self.alphas, layer, self.lora_alpha) * (math.sqrt(rank) if self.rslora else 1.0)


def config_beside(path: Path) -> PeftConfig | None:
    """The configuration beside a file of peft's own name, or None where there is none.

    Raises AdapterError for one that cannot be read, for without it the LoRA would act at another strength.
    """
    config = path.with_name(CONFIG)
    if path.name != MODEL or not config.exists():
        return None
    where = f"{CONFIG} beside {path.name}"
    try:
        data = _read(config, where)
        return PeftConfig(
            where,
            _number(where, "lora_alpha", data.get("lora_alpha")),
            int(_number(where, "r", data.get("r"))),
            _patterns(where, data, "alpha_pattern"),
            _patterns(where, data, "rank_pattern"),
            data.get("use_rslora") is True,
        )
    except AdapterError as error:
        raise AdapterError(
            f"{error}; it says how strongly the LoRA acts, so mend it, or remove it to have alpha = rank"
        ) from error


def _read(config: Path, where: str) -> Mapping:
    try:
        if not config.is_file():
            raise AdapterError(f"{where} is no file")
        with open(config, "rb") as file:
            raw = file.read(MAX_CONFIG + 1)
        text = raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterError(f"{where} cannot be read ({error})") from error
    if len(raw) > MAX_CONFIG:
        raise AdapterError(f"{where} is longer than {MAX_CONFIG} bytes")
    data = parse_json(text, where)
    if not isinstance(data, dict):
        raise AdapterError(f"{where} is not a JSON object")
    return data


def _patterns(where: str, data: Mapping, name: str) -> dict[str, float]:
    """Ends of layer names -> number.  peft takes them for regular expressions; only names are read here."""
    patterns = data.get(name) or {}
    if not isinstance(patterns, dict):
        raise AdapterError(f"{where}: {name} is not a JSON object")
    found = {}
    for pattern, value in patterns.items():
        end = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not end or not set(end) <= _PATTERN:
            raise AdapterError(f"{where}: {name} has {clip(pattern)}, which is no layer's name")
        found[end] = _number(where, f"{name} of {clip(pattern)}", value)
    return found


def _number(where: str, what: str, value: object) -> float:
    if type(value) not in (int, float) or not 0 < abs(value) <= MAX_ALPHA:
        raise AdapterError(f"{where}: {what} is {clip(value)}, not a number other than 0")
    return float(value)


def _of(patterns: Mapping[str, float], layer: str, otherwise: float) -> float:
    path = f".{layer.partition('.')[2]}"
    return next((value for end, value in patterns.items() if path.endswith(f".{end}")), otherwise)
