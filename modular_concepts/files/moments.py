"""Moments beside a concept, NAME.moments: a safetensors file with numbers about inputs and no picture in it.

They hold for the weights that were drawn with and for no others, so the file says which: a mark of the concept's
content and one of the base (`models/fingerprint.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..adapters.low_rank import MAX_SIZE
from ..concept import Concept
from ..errors import AdapterError
from ..merging.moments import Moment
from ..models.fingerprint import concept_mark, same_base
from ..models.layers import check_name
from ..storage.safetensors import read_header, read_safetensors, write_safetensors

FORMAT = "modular-concepts-moments-1"
CONCEPT = ".safetensors"
SUFFIX = ".moments"  # no concept's file ends like this, whatever the concept is called
FORMER = ".moments.safetensors"  # the concept NAME.moments could have this name as well


@dataclass(frozen=True)
class Recorded:
    """What moments were recorded from: a concept's and a base's mark, and how it was drawn, in words; "" is unknown."""

    concept: str = ""
    base: str = ""
    drawing: str = ""


def moments_path(concept: Path | str) -> Path:
    """Where the moments of a concept file lie: kodo.safetensors -> kodo.moments.

    Or kodo.moments.safetensors, as they were called once, where only that is there and no concept of this name.
    """
    concept = Path(concept)
    stem = concept.name.removesuffix(CONCEPT)
    path, former = concept.with_name(stem + SUFFIX), concept.with_name(stem + FORMER)
    return former if not path.exists() and former.is_file() and is_moments(former) else path


def is_moments(path: Path | str) -> bool:
    """Whether a file says that it is one of moments; reads the header alone."""
    try:
        return read_header(path).metadata.get("format") == FORMAT
    except AdapterError:
        return False


def save_moments(moments: Mapping[str, Moment], path: Path | str, origin: Recorded = Recorded()) -> None:
    """Write them, whole or not at all, in half precision scaled to each layer's largest value.

    Raises AdapterError rather than replace a file that is no moments.
    """
    if not moments:
        raise AdapterError("there are no moments to save; record them while the concept is drawn or trained")
    if Path(path).is_file():
        _said(path)
    tensors = {}
    for name, moment in moments.items():
        size = moment.factor.abs().max().clamp(min=1e-30)
        tensors[f"{name}.factor"] = (moment.factor / size).half().contiguous()
        tensors[f"{name}.scale"] = torch.stack([size.double(), torch.tensor(moment.rest, dtype=torch.float64)])
    texts = {"concept": origin.concept, "base": origin.base, "drawing": origin.drawing}
    write_safetensors(path, tensors, {"format": FORMAT} | {key: text for key, text in texts.items() if text})


def recorded_from(path: Path | str) -> Recorded:
    """What a file of moments says that it was recorded from; reads the header alone."""
    texts = _said(path)
    return Recorded(*(texts.get(key, "") for key in ("concept", "base", "drawing")))


def _said(path: Path | str) -> Mapping[str, str]:
    """The metadata of a file of moments.  Raises AdapterError with the way out for any other, which stays as it is."""
    try:
        metadata = read_header(path).metadata
    except AdapterError as error:
        raise AdapterError(f"{error}; move it away, and record the moments again") from error
    if metadata.get("format") != FORMAT:
        raise AdapterError(
            f"{path}: this is not a file of moments, and lies where they would; move it away, or give it another name"
        )
    return metadata


def why_not(origin: Recorded, concept: Concept, base: str = "") -> str:
    """Why moments cannot stand for this concept on this base, to go on from their file's name; "" where they can.

    base: `fingerprint.base_mark`; "" where no base is at hand to compare.
    """
    if not origin.concept or not origin.base:
        return "does not say which weights it was recorded with"
    if origin.concept != concept_mark(concept):
        return f"was recorded with other weights than those of {concept.name} now"
    if base and not same_base(origin.base, base):
        return f"was recorded on another base model, where {concept.name} reads other inputs"
    return ""


def load_moments(path: Path | str) -> dict[str, Moment]:
    """Layer -> moment.  Raises AdapterError for anything but a sound file of moments."""
    path = Path(path)
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != FORMAT:
        raise AdapterError(f"{path.name}: this is not a file of moments; record them again for this concept")
    moments = {}
    for key, factor in tensors.items():
        name, _, part = key.rpartition(".")
        if part != "factor":
            continue
        scale = tensors.get(f"{name}.scale")
        if scale is None or scale.shape != (2,) or factor.dim() != 2 or scale.min() < 0:
            raise AdapterError(f"{path.name}: {ascii(key)[:80]} has no sound scale beside it; the file is damaged")
        size, rest = scale.tolist()
        if not max(size * float(factor.abs().max()), math.sqrt(rest)) <= MAX_SIZE:
            raise AdapterError(f"{path.name}: {ascii(key)[:80]} is too large; the file is damaged")
        try:
            moments[check_name(name)] = Moment((factor.double() * size).float(), rest)
        except AdapterError as error:
            raise AdapterError(f"{path.name}: {error}") from error
    if len(tensors) != 2 * len(moments):
        raise AdapterError(f"{path.name}: it holds tensors that are no moments; the file is damaged")
    if not any(moment.rest or moment.factor.any() for moment in moments.values()):
        raise AdapterError(f"{path.name}: its moments are all 0, so nothing was drawn for them; record them again")
    return moments
