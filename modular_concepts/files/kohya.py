"""kohya's LoRA files, which ComfyUI and most programs read: `lora_unet_….lora_up.weight` and so on."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..adapters import LowRank, check_adapter
from ..concept import Concept, Recipe, clip
from ..errors import AdapterError
from ..layers import by_level, file_key, name_of_key
from .concept import layer_tensors, stock_metadata
from .safe import read_safetensors, write_safetensors

Layers = Mapping[str, nn.Module] | Iterable[str]
_FACTORS = {"lora_up.weight": "up", "lora_down.weight": "down", "alpha": "alpha"}


class Imported(NamedTuple):
    """A concept from another program's file, and every key of the file that found no place in it."""

    concept: Concept
    unmatched: list[str]


def export_kohya(concept: Concept, path: Path | str, dtype: torch.dtype | None = None) -> Path:
    """Write the adapters as a plain kohya file; learned words go to `embeddings.export_embeddings`.

    Returns the file.  dtype: None keeps the adapters' own.  Frozen factors, blocks and whole weights become
    ordinary factors; delta is unchanged.
    """
    require_layers(concept)
    tensors = {}
    for name, adapter in concept.layers.items():
        stock, key = adapter.stock(), file_key(name, concept.recipe.architecture)
        tensors |= layer_tensors(key, stock.to(dtype=dtype) if dtype else stock)
    write_safetensors(path, tensors, stock_metadata(concept))
    return Path(path)


def import_kohya(path: Path | str, layers: Layers | None = None, name: str | None = None) -> Imported:
    """Read a kohya file as a concept of kind "lora".

    layers: the model's canonical names, or name -> module (`find_layers`), whose weight shapes are then
    checked too; None derives the names from the keys, which works for SD's module paths.
    A layer with a factor that we do not know (DoRA, LoHa, Tucker) is left out whole and all its keys are
    reported.
    Raises AdapterError for a damaged file, a wrong shape, or when no key at all matches.
    """
    path = Path(path)
    tensors, metadata = read_safetensors(path)
    known = None if layers is None else {file_key(layer): layer for layer in layers}

    def parse(key: str) -> tuple[str | None, str]:
        stem, _, factor = key.partition(".")
        if known is None:
            return name_of_key(stem), _FACTORS.get(factor, "unknown")
        ours = by_level(stem).replace("lora_te1_", "lora_te_")
        return known.get(ours), _FACTORS.get(factor, "unknown")

    adapters, unmatched = assemble(path, tensors, parse, layers)
    return Imported(imported_concept(path, name, adapters, "kohya", metadata), unmatched)


def assemble(
    path: Path,
    tensors: Mapping[str, Tensor],
    parse: Callable[[str], tuple[str | None, str]],
    layers: Layers | None,
) -> tuple[dict[str, LowRank], list[str]]:
    """Adapters from foreign keys, and the keys that fit nowhere.

    parse: key -> (canonical name or None, "up" | "down" | "alpha" | "unknown").  Missing alpha means alpha =
    rank.
    """
    parts: dict[str, dict[str, str]] = defaultdict(dict)
    unmatched = []
    for key in sorted(tensors):
        name, factor = parse(key)
        if name is None:
            unmatched.append(key)
        elif factor in parts[name] and factor != "unknown":
            raise AdapterError(f"{path.name}: {key} and {parts[name][factor]} are the same factor of one layer")
        else:
            parts[name][factor if factor != "unknown" else key] = key
    adapters = {}
    for name, keys in sorted(parts.items()):
        if not {"up", "down"} <= set(keys) <= {"up", "down", "alpha"}:
            if ("up" in keys) != ("down" in keys):
                raise AdapterError(f"{path.name}: {min(keys.values())}: only one factor is there; the file is damaged")
            unmatched += keys.values()
            continue
        factors = {factor: tensors[key] for factor, key in keys.items()}
        module = layers[name] if isinstance(layers, Mapping) else None
        try:
            adapters[name] = _adapter(name, factors, module)
        except AdapterError as error:
            raise AdapterError(f"{path.name}: {error}") from error
    if not adapters:
        raise AdapterError(
            f"{path.name}: none of its {len(tensors)} keys fits a layer of this model, for example "
            f"{', '.join(clip(key) for key in sorted(tensors)[:3])}; it is for another architecture or method"
        )
    return adapters, sorted(unmatched)


def imported_concept(
    path: Path, name: str | None, adapters: dict[str, LowRank], kind: str, metadata: Mapping[str, str]
) -> Concept:
    """A concept around foreign adapters; what the file says of itself is kept as its origin."""
    rank, _ = Counter(adapter.rank for adapter in adapters.values()).most_common(1)[0]
    alpha, _ = Counter(adapter.alpha for adapter in adapters.values()).most_common(1)[0]
    said = {key: metadata[key][:200] for key in ("ss_base_model_version", "ss_sd_model_name") if key in metadata}
    recipe = Recipe(method="lora", rank=rank, alpha=alpha, origin={"imported_from": kind, **said})
    title = "".join(letter for letter in name or path.stem if letter.isprintable())[:100].strip()
    return Concept(title or "imported", adapters, {}, recipe)


def require_layers(concept: Concept) -> None:
    """A LoRA file holds adapters; a concept of learned words alone has none to give."""
    if not concept.layers:
        raise AdapterError(f"{concept.name}: the concept has no adapters; export its learned words as embeddings")


def _adapter(name: str, factors: Mapping[str, Tensor], module: nn.Module | None) -> LowRank:
    up, down = factors["up"], factors["down"]
    if up.dim() == 4 and up.shape[2:] == (1, 1):
        up = up[:, :, 0, 0]
    weight = getattr(module, "weight", None)
    if weight is not None and weight.dim() == 2 and down.dim() == 4 and down.shape[2:] == (1, 1):
        down = down[:, :, 0, 0]
    if weight is not None and weight.dim() == 4 and down.dim() == 2:
        down = down[:, :, None, None]
    if "alpha" in factors and factors["alpha"].numel() != 1:
        raise AdapterError(f"{name}: alpha has shape {tuple(factors['alpha'].shape)}; it must be one number")
    rank = down.shape[0] if down.dim() else 0
    alpha = float(factors["alpha"]) if "alpha" in factors else float(rank)
    adapter = LowRank(up.contiguous(), down.contiguous(), alpha, "lora", None, up.shape[0] if up.dim() else 0)
    check_adapter(name, adapter, None if weight is None else weight.shape)
    return adapter
