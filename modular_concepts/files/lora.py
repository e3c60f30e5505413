"""Any program's LoRA as a concept: each key is read as what it is, kohya's, LyCORIS', diffusers', peft's or the host's.

The host writes `diffusion_model.…` and `text_encoders.…`, the modules' paths in Stable Diffusion's original layout.
Where a model is at hand, it knows best what its own keys are called (`Places`); some programs keep queries, keys and
values apart that are one layer in it, and then each is some rows of that layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapters.low_rank import LowRank, check_adapter, shaped_for
from ..concept import Concept
from ..errors import AdapterError
from ..families import families
from ..models.layers import check_name, name_of_key, name_of_original
from ..storage.safetensors import BITS, read_foreign, read_header
from . import diffusers, kohya
from .bundled import bundled_words, is_needed, shapes_of, text_width, with_words
from .concept import KEY, load_concept
from .kohya import Imported, assemble, imported_concept, tell_lost_layers
from .modelspec import tell_left_out

IDLE = "it changes nothing: in every layer alpha is 0 or a factor is all zeros, as before a training"


class Place(NamedTuple):
    """Where a foreign module's adapter belongs: a layer, and which of its output rows, start and count, or all."""

    layer: str
    rows: tuple[int, int] | None = None


Places = Callable[[str], Place | None]

_TEXT = re.compile(r"text_encoders\.(\w+)\.transformer\.(.+)")


def import_lora(
    path: Path | str, name: str | None = None, places: Places | None = None, shapes: Mapping | None = None
) -> Imported:
    """Read a LoRA file of any form; see `lora_concept`."""
    path = Path(path)
    _refuse_embedding(path)
    tensors, metadata = read_foreign(path, lambda key: split_key(key)[1] in kohya.READ or is_needed(key))
    return lora_concept(path, tensors, metadata, name, places, shapes)


def _above(key: str) -> Iterator[str]:
    """The paths that a key lies under, the nearest first."""
    while "." in key:
        key = key.rpartition(".")[0]
        yield key


def _refuse_embedding(path: Path) -> None:
    """Raise AdapterError for a learned word, as embedding files hold it: one tensor of rows, or one an encoder."""
    shapes = {key: shape for key, (_, shape) in read_header(path, tuple(BITS), empty=True).tensors.items()}
    alone = len(shapes) == 1 and split_key(next(iter(shapes)))[1] == "unknown"
    encoders = [{encoder.name for encoder in family.text_encoders} for family in families()]
    if not alone and set(shapes) not in encoders or any(len(shape) not in (1, 2) for shape in shapes.values()):
        return
    (rows, *width), *_ = shapes.values()
    vectors = "one vector" if not width or rows == 1 else f"{rows} vectors"
    raise AdapterError(
        f"{path.name}: this is an embedding, a learned word of {vectors}, and no concept; ComfyUI takes it from its "
        f"embeddings folder, as embedding:{path.stem} in a prompt; give the concept here that it was exported from"
    )


def lora_concept(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    name: str | None = None,
    places: Places | None = None,
    shapes: Mapping | None = None,
) -> Imported:
    """A concept of kind "lora" from a LoRA's tensors with the words they bring, and every key that found no place.

    path: names the LoRA in messages, and the concept unless `name` does.
    places: foreign module path -> where it is in the model at hand; without one, paths are read by rule, which works
    for Stable Diffusion 1.x, 2.x and XL.  shapes: layer -> its weight's shape, needed for rows of a layer.
    Raises AdapterError for a damaged LoRA, or when no key at all matches.
    """
    rows: dict[str, tuple[str, tuple[int, int]]] = {}

    stems = {stem for stem, factor in map(split_key, tensors) if stem and factor in kohya.READ}

    def parse(key: str) -> tuple[str | None, str]:
        stem, factor = split_key(key)
        if factor == "unknown":
            # Whatever else stands beside a layer's factors says how they are meant, a scale of eight-bit numbers for
            # instance.
            stem = next((above for above in _above(key) if above in stems), stem)
        if places is None or stem is None:
            return by_rule(stem) if stem else None, factor
        place = places(stem)
        if place is None:
            return None, factor
        if place.rows is None:
            return place.layer, factor
        # Parts of one layer are told apart until they have been read.
        part = f"{place.layer}.rows_{place.rows[0]}"
        rows[part] = place.layer, place.rows
        return part, factor

    adapters, unmatched, costly = assemble(path, tensors, parse)
    explicit = {parse(key)[0] for key in tensors if key.endswith(".alpha")}
    adapters = diffusers.with_peft_alphas(path, adapters, explicit, metadata)
    whole = _joined(path, adapters, rows, shapes or {})
    kind = "kohya" if any(key.startswith("lora_") for key in tensors) else "diffusers"
    concept = imported_concept(path, name, whole, kind, metadata)
    width = text_width(shapes or shapes_of(whole))
    bundled = bundled_words(tensors, concept.recipe.architecture, width, bool(shapes))
    unmatched = [key for key in unmatched if key not in bundled.keys]
    sentences = [
        *bundled.sentences,
        *tell_lost_layers(costly),
        *diffusers.tell_unknown_parts(metadata),
        *tell_left_out(metadata),
    ]
    concept = with_words(concept, bundled.rows)
    return Imported(concept, unmatched, [*tell_idle(concept), *sentences], bundled.explained)


def told_apart(names: Sequence[str], paths: Sequence[Path]) -> list[str]:
    """Names of concepts of one stack: those that files of several folders share have the folder before them."""
    folders: dict[str, set[Path]] = {}
    for name, path in zip(names, paths, strict=True):
        folders.setdefault(name, set()).add(path.absolute().parent)
    return [
        f"{path.absolute().parent.name}/{name}" if len(folders[name]) > 1 else name
        for name, path in zip(names, paths, strict=True)
    ]


def split_key(key: str) -> tuple[str | None, str]:
    """(module path or kohya's stem, factor) of any form of key; (None, "unknown") for what is no factor's."""
    stem, _, factor = key.partition(".")
    if stem.startswith(("lora_", "lycoris_")):
        return stem, kohya.FACTORS.get(factor, "unknown")
    return diffusers.stem_and_factor(key)


def by_rule(stem: str) -> str | None:
    """Canonical name of a foreign module, by the form of its name alone."""
    layer = _by_rule(stem)
    try:
        return layer and check_name(layer)
    except AdapterError:
        return None


def _by_rule(stem: str) -> str | None:
    if "." not in stem:
        if stem.startswith("lycoris_"):
            stem = f"lora_unet_{stem.removeprefix('lycoris_')}"
        return name_of_key(stem)
    if stem.startswith("diffusion_model."):
        return name_of_original(stem.removeprefix("diffusion_model."))
    if match := _TEXT.fullmatch(stem):
        encoders = (encoder for family in families() for encoder in family.text_encoders)
        part = next((encoder.part for encoder in encoders if encoder.name == match[1]), None)
        return part and f"{part}.{match[2]}"
    return diffusers.name_of_path(stem)


def _joined(
    path: Path, adapters: Mapping[str, LowRank], parts: Mapping[str, tuple[str, tuple[int, int]]], shapes: Mapping
) -> dict[str, LowRank]:
    """Adapters of whole layers; parts that are rows of one layer in the model become one adapter, zero elsewhere."""
    whole = {name: adapter for name, adapter in adapters.items() if name not in parts}
    gathered: dict[str, list[tuple[int, LowRank]]] = {}
    for part, (layer, rows) in parts.items():
        if part in adapters:
            fitted = shaped_for(adapters[part], (rows[1], *shapes[layer][1:]))
            check_adapter(f"{path.name}: {layer}, from row {rows[0]}", fitted, (rows[1], *shapes[layer][1:]))
            gathered.setdefault(layer, []).append((rows[0], fitted))
    for layer, sites in gathered.items():
        if layer in whole:
            raise AdapterError(f"{path.name}: {layer} is there whole and in parts; the file mixes two adapters")
        out, ups = shapes[layer][0], []
        for start, adapter in sites:
            up = adapter.lora_up.new_zeros(out, adapter.rank)
            up[start : start + len(adapter.lora_up)] = adapter.scale * adapter.lora_up
            ups.append(up)
        down = torch.cat([adapter.lora_down for _, adapter in sites])
        whole[layer] = LowRank(torch.cat(ups, dim=1), down, float(len(down)), "lora", None, out)
    return whole


def tell_idle(concept: Concept) -> list[str]:
    """A sentence for a concept without words of whose layers none changes anything."""
    adapters = concept.layers.values()
    return [IDLE] if adapters and not concept.tokens and all(adapter.is_idle for adapter in adapters) else []


def read_concept(path: Path | str) -> Imported:
    """A concept file, or any program's LoRA as a concept with the learned words that came in its file."""
    path = Path(path)
    metadata = read_header(path, tuple(BITS), empty=True).metadata
    if KEY in metadata:
        concept = load_concept(path)
        return Imported(concept, [], [*tell_idle(concept), *tell_left_out(metadata)])
    return import_lora(path)


def concept_of_file(path: Path | str) -> Concept:
    """A concept file, or any program's LoRA as a concept with the learned words that came in its file.

    What finds no place in it is left out; `read_concept` names it.  Raises AdapterError that names the file.
    """
    return read_concept(path).concept
