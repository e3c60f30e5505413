"""Square matrices from NumPy's .npy files, which nobody vouches for.

The header is a line of Python that NumPy hands to Python's own parser; here it is three entries, each of one form.
Format: the mark, a version, the header's length, the header, the numbers: numpy.lib.format.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..errors import AdapterError
from .names import not_a_file

MARK = b"\x93NUMPY"
MAX_HEADER = 4096
_ENTRIES = {
    "descr": re.compile(r"""(['"])descr\1\s*:\s*(['"])([<>=]?f[248])\2"""),
    "fortran_order": re.compile(r"""(['"])fortran_order\1\s*:\s*(True|False)"""),
    "shape": re.compile(r"""(['"])shape\1\s*:\s*\(\s*(\d{1,7})L?\s*,\s*(\d{1,7})L?\s*,?\s*\)"""),
}
_NUMBERS = re.compile(r"""(['"])descr\1\s*:\s*(['"])[<>=|]?[biufc]\d{1,2}\2""")


def read_square(path: Path | str) -> tuple[np.dtype, bool, int, int]:
    """(numbers' type, column by column, width, where they begin) of a .npy file whose numbers fill it exactly.

    Reads the header alone.  Raises AdapterError, in one sentence that names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise AdapterError(f"{path.name}: this basis file cannot be read: {not_a_file(path)}")
    try:
        with open(path, "rb") as file:
            text, start = _header(path.name, file)
            size = os.fstat(file.fileno()).st_size
    except (OSError, ValueError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{path.name}: this basis file cannot be read ({error})") from error
    dtype, by_columns, shape = _entries(path.name, text)
    if shape[0] != shape[1] or not shape[0]:
        raise AdapterError(f"{path.name}: shape {shape}; a basis matrix is square")
    if size - start != shape[0] ** 2 * dtype.itemsize:
        raise AdapterError(
            f"{path.name}: {shape[0]} x {shape[1]} numbers need {shape[0] ** 2 * dtype.itemsize} bytes, "
            f"{max(0, size - start)} are there; the file is damaged"
        )
    return dtype, by_columns, shape[0], start


def read_rows(path: Path | str, dtype: np.dtype, width: int, start: int, first: int, count: int) -> Tensor:
    """(count, width) float64: so many rows of what `read_square` found, as they lie in the file."""
    path = Path(path)
    try:
        values = np.fromfile(path, dtype, count * width, offset=start + first * width * dtype.itemsize)
        rows = values.reshape(count, width).astype(np.float64)
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{path.name}: this basis file cannot be read ({error}), or changed while it was read"
        ) from error
    return torch.from_numpy(rows)


def _header(name: str, file: BinaryIO) -> tuple[str, int]:
    """The header's text, and where it ends."""
    prefix = file.read(8)
    sizes = {1: 2, 2: 4, 3: 4}
    if len(prefix) != 8 or prefix[:6] != MARK or prefix[6] not in sizes or prefix[7]:
        raise AdapterError(f"{name}: this basis file cannot be read: it is no .npy file of version 1, 2 or 3")
    length = int.from_bytes(file.read(sizes[prefix[6]]), "little")
    raw = file.read(length) if length <= MAX_HEADER else b""
    if len(raw) != length:
        raise AdapterError(
            f"{name}: this basis file cannot be read: its header is cut short or longer than {MAX_HEADER} bytes"
        )
    return raw.decode("latin-1"), 8 + sizes[prefix[6]] + length


def _entries(name: str, text: str) -> tuple[np.dtype, bool, tuple[int, int]]:
    """descr, fortran_order and shape; nothing else may stand there."""
    entries, rest = {}, text.strip()
    for key, pattern in _ENTRIES.items():
        matches = list(pattern.finditer(rest))
        if len(matches) != 1:
            wrong = f"this basis file cannot be read: its header does not say a sound {key}"
            if key == "descr" and _NUMBERS.search(text):
                wrong = "not a matrix of real numbers in 2, 4 or 8 bytes each"
            raise AdapterError(f"{name}: {wrong}; save a square matrix of float32 or float64 with numpy.save")
        entries[key] = matches[0]
        rest = rest[: matches[0].start()] + rest[matches[0].end() :]
    if not re.fullmatch(r"\{[\s,]*\}", rest):
        raise AdapterError(
            f"{name}: this basis file cannot be read: its header says more than a type, an order and a shape"
        )
    shape = int(entries["shape"][2]), int(entries["shape"][3])
    return np.dtype(entries["descr"][3]), entries["fortran_order"][2] == "True", shape
