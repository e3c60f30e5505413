"""Whether two sets of weights are one checkpoint, told from a few of their numbers in milliseconds.

`models.base.tables_hash` is exact but reads every byte, which takes seconds, and calls a checkpoint that was loaded in
half precision another one.  A sample of single numbers is kept as float32 and compared as the coarser side has them.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..storage.safetensors import tensor_bytes

if TYPE_CHECKING:
    from ..concept import Concept

NUMBERS = 128
_GOLDEN = 0.6180339887498949  # places within a weight that no layout's stride falls in with
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def weights_sample(table: Mapping[str, Tensor]) -> str:
    """One number each of 128 weights, evenly chosen by name, as base64 of float32.

    table: name -> weight of a denoiser, in diffusers' names (SD3: its own).  "" where weights are quantised, so that
    their numbers are not the checkpoint's, or where there are none.
    """
    names = sorted(name for name, value in table.items() if value.dim() > 1)
    if not names or any(table[name].dtype not in (*_FLOATS, torch.float64) for name in names):
        return ""
    chosen = [names[number * len(names) // NUMBERS] for number in range(NUMBERS)]
    numbers = []
    for place, name in enumerate(chosen):
        value = table[name].detach()
        numbers.append(value.reshape(-1)[int(value.numel() * (place * _GOLDEN % 1.0))].float().cpu())
    return base64.b64encode(tensor_bytes(torch.stack(numbers))).decode("ascii")


def same_weights(one: object, other: object) -> bool | None:
    """Whether two samples are of one checkpoint, in whatever floating precision each was; None where one is missing."""
    first, second = _numbers(one), _numbers(other)
    if first is None or second is None:
        return None
    return any(torch.equal(first.to(dtype), second.to(dtype)) for dtype in _FLOATS)


def base_mark(tables: Sequence[Mapping[str, Tensor]], exact: Callable[[], str]) -> str:
    """What base moments were recorded on: a sample of each network's weights, or `exact()` where one is quantised.

    tables: name -> weight of the denoiser and of each text encoder, as `models.base.tables_hash` takes them.
    """
    samples = [weights_sample({name: value for name, value in table.items() if _is_weight(value)}) for table in tables]
    return ".".join(samples) if all(samples) else f"hash:{exact()}"


def same_base(one: str, other: str) -> bool:
    """Whether two marks are of one base, in whatever floating precision each network was."""
    first, second = one.split("."), other.split(".")
    if len(first) != len(second) or not one:
        return False
    return one == other or all(same_weights(a, b) for a, b in zip(first, second, strict=True))


def _is_weight(value: Tensor) -> bool:
    """Not a table of positions, which is whole numbers and no layer."""
    return value.dtype not in (torch.int64, torch.int32)


def concept_mark(concept: Concept) -> str:
    """sha256 over what a concept draws with: its adapters, its words and triggers; 32 hexadecimal digits.

    The same for a file and for the concept that it was written from, whatever its name, title and order of layers.
    """
    digest = hashlib.sha256()
    for name, adapter in sorted(concept.layers.items()):
        digest.update(f"{name} {adapter.kind} ".encode() + struct.pack("<f", adapter.alpha))
        for part in (adapter.lora_up, adapter.lora_down, adapter.rows):
            _digest(digest, part)
    for word, rows in sorted(concept.tokens.items()):
        digest.update(ascii(word).encode())
        _digest(digest, rows.float())
    digest.update(ascii(tuple(concept.recipe.triggers or concept.tokens)).encode())
    return digest.hexdigest()[:32]


def _digest(digest, part: Tensor | None) -> None:
    digest.update(b"-" if part is None else f"{part.dtype}{tuple(part.shape)}".encode() + tensor_bytes(part.detach()))


def _numbers(text: object) -> Tensor | None:
    if not isinstance(text, str) or len(text) > 8 * NUMBERS:
        return None
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return torch.frombuffer(bytearray(data), dtype=torch.float32) if len(data) == 4 * NUMBERS else None
