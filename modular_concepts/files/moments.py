"""Moments beside a concept: NAME.moments.safetensors, with numbers about inputs and no picture in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from ..errors import AdapterError
from ..layers import check_name
from ..moments import Moment
from .safe import read_safetensors, write_safetensors

FORMAT = "modular-concepts-moments-1"
SUFFIX = ".moments.safetensors"


def moments_path(concept: Path | str) -> Path:
    """Where the moments of a concept file lie: kodo.safetensors -> kodo.moments.safetensors."""
    concept = Path(concept)
    return concept.with_name(concept.name.removesuffix(".safetensors") + SUFFIX)


def save_moments(moments: Mapping[str, Moment], path: Path | str) -> None:
    """Write them, whole or not at all, in half precision scaled to each layer's largest value."""
    if not moments:
        raise AdapterError("there are no moments to save; record them while the concept is drawn or trained")
    tensors = {}
    for name, moment in moments.items():
        size = moment.factor.abs().max().clamp(min=1e-30)
        tensors[f"{name}.factor"] = (moment.factor / size).half().contiguous()
        tensors[f"{name}.scale"] = torch.stack([size.double(), torch.tensor(moment.rest, dtype=torch.float64)])
    write_safetensors(path, tensors, {"format": FORMAT})


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
        if not math.isfinite(size * float(factor.abs().max()) ** 2):
            raise AdapterError(f"{path.name}: {ascii(key)[:80]} is too large; the file is damaged")
        try:
            moments[check_name(name)] = Moment(factor.float() * size, rest)
        except AdapterError as error:
            raise AdapterError(f"{path.name}: {error}") from error
    if len(tensors) != 2 * len(moments):
        raise AdapterError(f"{path.name}: it holds tensors that are no moments; the file is damaged")
    return moments
