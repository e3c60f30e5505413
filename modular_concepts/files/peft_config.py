"""peft's adapter_config.json, which lies beside adapter_model.safetensors and says how strongly it acts."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..concept import clip, is_number
from ..errors import AdapterError
from ..storage.names import not_a_file
from ..storage.strict_json import parse_json

MODEL, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MAX_CONFIG = 2**20
MAX_ALPHA = 1e12
ON_ANOTHER_BASE = ("pissa", "olora", "corda", "loftq")  # take from the base weights what they put into the factors
_PATTERN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.")


@dataclass(frozen=True)
class PeftConfig:
    """What a configuration says of strength: alpha and rank of all layers and of some, by the end of their names.

    None where it does not say: alpha is the rank then, and the rank that of the factors.
    rslora: the scale is alpha / sqrt(rank), and not alpha / rank.  where: names the file in messages; way_out: what to
    do where it does not fit.
    """

    where: str
    lora_alpha: float | None
    rank: float | None
    alphas: Mapping[str, float]
    ranks: Mapping[str, float]
    rslora: bool
    way_out: str

    def alpha(self, layer: str, rank: int) -> float:
        """alpha, where scale = alpha / rank, of a layer with this canonical name.

        Raises AdapterError where the configuration speaks of another rank than the file has.
        """
        stated = _of(self.ranks, layer, rank if self.rank is None else self.rank)
        if stated != rank:
            raise AdapterError(
                f"{self.where} says rank {stated:g} of {layer}, whose factors have {rank}; it is of another file, so "
                f"{self.way_out}"
            )
        alpha = float(rank) if self.lora_alpha is None else self.lora_alpha
        return _of(self.alphas, layer, alpha) * (math.sqrt(rank) if self.rslora else 1.0)


def config_beside(path: Path) -> PeftConfig | None:
    """The configuration beside a file of peft's own name, or None where there is none.

    Raises AdapterError for one that cannot be read, for without it the LoRA would act at another strength.
    """
    config = path.with_name(CONFIG)
    if path.name != MODEL or not os.path.lexists(config):  # a link to nothing is there, and says nothing
        return None
    where = f"{CONFIG} beside {path.name}"
    try:
        data = _read(config, where)
        for name in ("lora_alpha", "r"):
            _number(where, name, data.get(name))
        return config_of(where, data, "remove it, or put the right one there")
    except AdapterError as error:
        raise AdapterError(
            f"{error}; it says how strongly the LoRA acts, so mend it, or remove it to have alpha = rank"
        ) from error


def config_of(where: str, data: Mapping, way_out: str) -> PeftConfig:
    """A configuration's entries, each of which may be missing.

    Raises AdapterError for what is no strength, and for methods by which factors alone are not the whole change.
    """
    for name in ("use_rslora", "use_dora"):
        if data.get(name) is not None and type(data[name]) is not bool:
            raise AdapterError(f"{where}: {name} is {clip(data[name])}, and not true or false")
    _refuse_other_methods(where, data)
    rank, alpha = (_number(where, name, data[name]) if name in data else None for name in ("r", "lora_alpha"))
    patterns = [_patterns(where, data, name) for name in ("alpha_pattern", "rank_pattern")]
    return PeftConfig(where, alpha, rank, *patterns, data.get("use_rslora") is True, way_out)


def _refuse_other_methods(where: str, data: Mapping) -> None:
    method, start = data.get("peft_type", "LORA"), data.get("init_lora_weights", True)
    if not isinstance(method, str) or method.upper() != "LORA":
        raise AdapterError(f"{where}: peft_type is {clip(method)}, and only LORA is read")
    if data.get("use_dora"):
        raise AdapterError(
            f"{where}: use_dora is true, and lengths of DoRA are not read; its factors alone are another change"
        )
    if isinstance(start, str) and start.lower().startswith(ON_ANOTHER_BASE):
        raise AdapterError(
            f"{where}: init_lora_weights is {clip(start)}, so it was trained beside base weights that peft changed; "
            "save it with path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )


def _read(config: Path, where: str) -> Mapping:
    try:
        if not config.is_file():
            raise AdapterError(f"{where} is no file: {not_a_file(config).partition(';')[0]}")
        with open(config, "rb") as file:
            raw = file.read(MAX_CONFIG + 1)
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise AdapterError(f"{where} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise AdapterError(f"{where} is not UTF-8 text (byte {error.start + 1} is {raw[error.start]:#04x})") from error
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
    numbers = {}
    for pattern, value in patterns.items():
        end = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not end or not set(end) <= _PATTERN:
            raise AdapterError(f"{where}: {name} has {clip(pattern)}, which is no layer's name")
        numbers[end] = _number(where, f"{name} of {clip(pattern)}", value)
    return numbers


def _number(where: str, what: str, value: object) -> float:
    if not is_number(value) or not 0 < abs(value) <= MAX_ALPHA:
        raise AdapterError(f"{where}: {what} is {clip(value)}, not a number other than 0 of at most {MAX_ALPHA:g}")
    return float(value)


def _of(patterns: Mapping[str, float], layer: str, otherwise: float) -> float:
    path = f".{layer.partition('.')[2]}"
    return next((value for end, value in patterns.items() if path.endswith(f".{end}")), otherwise)
