"""Shared orthogonal bases: every concept freezes lora_down to its own columns of one n x n matrix.

Source: Po et al. 2024, section 3.5.  Concepts with disjoint columns have exactly zero crosstalk.

Columns are the same bits on every machine, torch and numpy version.  Random bits come from SHAKE-256 (FIPS
202); all arithmetic is float64 addition, multiplication, division and square root, elementwise and in a fixed
order (no BLAS, no FFT, no libm, no library's random distribution), rounded once to float32.

hadamard (default)  product of ROUNDS x (signs, permutation, Walsh-Hadamard on 2^k coordinates, in turn the
                    leading and the trailing ones).  Any width, O(n log n) a column, no n x n matrix.
haar                Haar-random: the Q of a Gaussian matrix' QR with diag(R) > 0, as Householder reflections
                    (Stewart 1980).  O(n^2) a column, so up to HAAR_WIDTH; the reference for the other.
file                matrices that were loaded; see `load_basis`.

Measured, hadamard against LAPACK's Haar, 5 seeds: the share that slots of 20 columns take of unit directions
(axes, four-sparse, constant, cosines, square waves), relative to 20 / n: how loudly a concept answers
activations that are not its own.  Width 320: standard deviation 0.313 against 0.304, worst 2.54 against 2.46;
width 1280: 0.312 against 0.313, worst 3.04 against 2.96.  Kurtosis of the entries 2.98 and 3.00, as Haar's.
Weight crosstalk is the same by construction: it sees only which columns are shared.  The Gram matrix is off
by at most 5.1e-8 (widths 1 to 20480); 20 columns of width 20480 take 0.2 s on one core.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import AdapterError, listed
from ..settings import basis as declared

if TYPE_CHECKING:
    from jaxtyping import Float32

Array = NDArray[np.float64]

KINDS = (*declared.KIND.choices, "file")
ROUNDS = 6
HAAR_WIDTH = 2048
FILE_TOLERANCE = 1e-5
_PRINTED = 8  # columns that a fingerprint looks at
_NUMBERS = 2**17  # of float64 that are generated together, so that they stay in a processor's cache
_CHUNK = 1024  # columns of a file's matrix that are looked at together


@dataclass(frozen=True, eq=False)
class OrthogonalBasis:
    """One n x n orthogonal matrix for each width n, shared by all concepts and by all layers of that width.

    kind: "hadamard" | "haar" | "file".  seed: any int (not for "file").
    matrices: width -> (width, width) orthogonal, for "file" only.
    """

    kind: str = declared.KIND.default
    seed: int = declared.SEED.default
    matrices: Mapping[int, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        if self.kind not in KINDS:
            raise AdapterError(f"basis kind {self.kind!r} is unknown; choose one of {', '.join(KINDS)}")
        if (self.kind == "file") != bool(self.matrices):
            raise AdapterError(
                f"a basis of kind {self.kind!r} {'needs' if self.kind == 'file' else 'takes no'} matrices"
            )

    def columns(self, width: int, indices: Sequence[int] | Tensor) -> Float32[Tensor, "rank {width}"]:
        """Row i is column indices[i] of the width x width matrix: (len(indices), width) float32, orthonormal.

        Raises AdapterError for an index that is outside the matrix or named twice.
        """
        chosen = _checked_indices(width, indices)
        if self.kind == "file":
            return self._matrix(width)[:, list(chosen)].mT.contiguous()
        if self.kind == "haar" and width > HAAR_WIDTH:
            raise AdapterError(
                f"the haar basis stops at width {HAAR_WIDTH}, this layer has {width}; use the hadamard basis"
            )
        return torch.from_numpy(_generated(self.kind, self.seed, width, chosen).copy())

    def fingerprint(self, width: int) -> str:
        """Short sha256 of this basis at one width: of spread columns' bits, or of a file's whole matrix."""
        if self.kind == "file":
            return _digest(f"file {width}", _bytes(self._matrix(width)))
        return _digest(f"{self.kind} {self.seed} {width}", _bytes(self.columns(width, printed(width))))

    @property
    def identity(self) -> str:
        """Short sha256 of the basis as such: of kind and seed, or of all matrices of a file."""
        if self.kind != "file":
            return _digest(f"{self.kind} {self.seed}")
        return _digest("file", *(self.fingerprint(width).encode() for width in sorted(self.matrices)))

    def _matrix(self, width: int) -> Tensor:
        if width not in self.matrices:
            raise AdapterError(
                f"the basis file has no matrix for width {width}, only for {sorted(self.matrices)}; "
                "add that matrix, leave out these layers, or use a generated basis"
            )
        return self.matrices[width]


def printed(width: int) -> list[int]:
    """The columns that a fingerprint looks at."""
    return sorted({i * (width - 1) // (_PRINTED - 1) for i in range(_PRINTED)})


def work_of(kind: str, width: int, indices: Sequence[int]) -> int:
    """About how much work so many columns are, in numbers of the hadamard basis; 7 million take a second."""
    if kind != "haar":
        return width * len(indices)
    deepest = max(indices, default=0) + 1
    return deepest * (width - deepest // 2) * (len(indices) + 16) // 12


def capacity(width: int, rank: int) -> int:
    """How many concepts of this rank fit a width without sharing a column: floor(width / rank)."""
    if rank < 1:
        raise AdapterError(f"rank is {rank}; it must be at least 1")
    if rank > width:
        raise AdapterError(
            f"rank {rank} is larger than the layer's input width {width}; choose a rank of at most {width}"
        )
    return width // rank


def slot_indices(width: int, rank: int, slot: int) -> list[int]:
    """Columns [slot * rank, (slot + 1) * rank): disjoint from every other slot of the same rank.

    The same in all layers of one width.  Concepts of different ranks have disjoint slots only by luck: see
    `crosstalk.measures.column_overlap`.  Raises AdapterError that states the capacity when the slot does not exist.
    """
    slots = capacity(width, rank)
    if not 0 <= slot < slots:
        raise AdapterError(
            f"slot {slot} does not exist: width {width} holds {slots} concepts of rank {rank}, slots 0 to "
            f"{slots - 1}; choose a free slot or a smaller rank"
        )
    return list(range(slot * rank, (slot + 1) * rank))


def hashed_indices(width: int, rank: int, name: str, layer: str) -> list[int]:
    """`rank` distinct columns chosen by the concept's and the layer's name; another set in every layer.

    Needs no agreement between trainers, but two concepts share rank^2 / width columns on average.
    """
    capacity(width, rank)
    return sorted(_permutation(f"columns {name!r} {layer!r}", width)[:rank].tolist())


def load_basis(path: Path | str) -> OrthogonalBasis:
    """Read a basis from a .safetensors file, a .npy file or a folder of .npy files (orthogonal_mats/320.npy).

    Each matrix is square; its size is its width; its columns (not rows) are the basis.  Never unpickles.
    A name that is a number, of a tensor or of a file in a folder, is the width in plain decimal digits.
    Raises AdapterError for anything else, and for a matrix that is not orthogonal to 1e-5.
    """
    # Here and not at the top: what reads files stands above bases.
    from ..storage.names import nameable, printed
    from ..storage.npy import read_square
    from ..storage.safetensors import read_safetensors

    if not str(path).strip():
        raise AdapterError("the basis has no name; give a file or a folder of matrices")
    path = nameable(path)
    matrices: dict[int, Tensor] = {}
    if path.suffix.lower() == ".safetensors":
        try:
            named = read_safetensors(path)[0].items()
        except AdapterError as error:
            fault = str(error).removeprefix(f"{path.name}: ")
            raise AdapterError(f"{path.name}: this basis file cannot be read: {fault}") from error
    else:
        files = _npy_files(path) if path.is_dir() else [path]
        named = ((file.name, _npy(file, *read_square(file))) for file in files)
    for key, matrix in named:
        where = f"{path.name}, {printed(key)}" if path.name != key else key
        width = _checked_width(where, matrix)
        if where != key:
            _check_name(where, re.sub(r"\.npy$", "", key, flags=re.IGNORECASE), width)
        if width in matrices:
            raise AdapterError(f"{path.name}, {key}: a second matrix of width {width}; keep one for each width")
        matrices[width] = matrix.float().contiguous()
    if not matrices:
        raise AdapterError(f"{path.name}: no basis matrices here; expected .npy files or one .safetensors file")
    return OrthogonalBasis("file", 0, matrices)


def _npy_files(folder: Path) -> list[Path]:
    """The folder's .npy files, but for hidden ones.  Raises AdapterError for matrices in another form beside them."""
    there = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    other = [path.name for path in there if path.suffix.lower() in (".safetensors", ".pt", ".pth", ".npz", ".bin")]
    if other:
        raise AdapterError(
            f"{folder.name}: {listed(other)} is not read beside .npy files; save it as .npy, or move it away"
        )
    return [path for path in there if path.suffix.lower() == ".npy"]


def _check_name(where: str, name: str, width: int) -> None:
    """Raise AdapterError for a number, however it is written, that is not the matrix' width as a program writes it."""
    try:
        number = float(name)
    except ValueError:
        return
    if math.isfinite(number) and name != str(width):
        raise AdapterError(f"{where}: the name is a number, but the matrix is {width} wide; call it {width}")


def _npy(path: Path, dtype: np.dtype, by_columns: bool, width: int, start: int) -> Tensor:
    """(width, width) float32, some rows at a time: the first that cannot be an orthogonal matrix' ends it."""
    from ..storage.npy import read_rows

    some = max(1, _CHUNK**2 // width)
    matrix = torch.empty(0, 0)
    for first in range(0, width, some):
        rows = read_rows(path, dtype, width, start, first, min(some, width - first))
        _check_lengths(path.name, rows)
        matrix = matrix if first else torch.empty(width, width)
        matrix[first : first + len(rows)] = rows
    return matrix.mT if by_columns else matrix


def _checked_width(key: str, matrix: Tensor) -> int:
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise AdapterError(f"{key}: shape {tuple(matrix.shape)}; a basis matrix is square")
    _check_lengths(key, matrix)
    width = len(matrix)
    for first in range(0, width, _CHUNK):
        some = matrix[:, first : first + _CHUNK].double()
        for second in range(first, width, _CHUNK):
            others = some if second == first else matrix[:, second : second + _CHUNK].double()
            gram = some.mT @ others
            if second == first:
                gram.diagonal().sub_(1)
            _check_error(key, gram.abs().max().item())
    return width


def _check_lengths(key: str, rows: Tensor) -> None:
    """Rows of an orthogonal matrix have length 1: a look at each tells most others apart before they cost anything."""
    _check_error(key, (rows.double().square().sum(1) - 1).abs().max().item())


def _check_error(key: str, error: float) -> None:
    if not error <= FILE_TOLERANCE:
        raise AdapterError(
            f"{key}: the matrix is not orthogonal (off by {error:.1e}, we need {FILE_TOLERANCE:.0e}); "
            "orthonormalise it in double precision first"
        )


def _checked_indices(width: int, indices: Sequence[int] | Tensor) -> tuple[int, ...]:
    chosen = tuple(int(index) for index in indices)
    outside = [index for index in chosen if not 0 <= index < width]
    if outside:
        raise AdapterError(f"basis column {outside[0]} does not exist: width {width} has 0 to {width - 1}")
    if len(set(chosen)) != len(chosen):
        raise AdapterError("a basis column is named twice; an adapter's columns must be distinct")
    return chosen


@functools.lru_cache(maxsize=32)
def _generated(kind: str, seed: int, width: int, indices: tuple[int, ...]) -> NDArray[np.float32]:
    """(len(indices), width), some columns at a time: each comes out the same whatever others there are."""
    grow, numbers = (_hadamard, _NUMBERS) if kind == "hadamard" else (_haar, 8 * _NUMBERS)
    generated = np.empty((len(indices), width), np.float32)
    some = max(1, numbers // width)
    for start in range(0, len(indices), some):
        chosen = indices[start : start + some]
        columns = np.zeros((width, len(chosen)))
        columns[list(chosen), np.arange(len(chosen))] = 1.0
        generated[start : start + some] = grow(seed, columns).T
    generated.flags.writeable = False
    return generated


def _hadamard(seed: int, columns: Array) -> Array:
    """Apply ROUNDS of signs, permutation and a Walsh-Hadamard transform of one part to (width, k)."""
    width = len(columns)
    part = 1 << (width.bit_length() - 1)
    for turn in range(ROUNDS):
        mixed = slice(0, width) if turn % 2 == 0 else slice(0, part)
        where = slice(0, part) if turn % 2 == 0 else slice(width - part, width)
        purpose = f"hadamard {seed} {width} {turn}"
        signs = 1.0 - 2.0 * (_words(f"{purpose} signs", width, 1) & 1)
        columns = columns * signs[:, None]
        columns[mixed] = columns[mixed][_permutation(f"{purpose} order", mixed.stop)]
        columns[where] = _walsh_hadamard(columns[where])
    return columns


def _walsh_hadamard(columns: Array) -> Array:
    """Orthonormal Walsh-Hadamard transform along axis 0, whose length is a power of two."""
    length, half = len(columns), 1
    while half < length:
        pairs = columns.reshape(length // (2 * half), 2, half, -1)
        columns = np.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), axis=1)
        half *= 2
    return columns.reshape(length, -1) / np.sqrt(float(length))


def _haar(seed: int, columns: Array) -> Array:
    """Apply Q = H_0 ... H_{n-1} diag(s) to unit columns (width, k): H_j maps axis j to a random direction.

    H_j reflects coordinates j and beyond.  Directions: each coordinate is the sum of twelve 16-bit words,
    Gaussian to an excess kurtosis of -0.1, and exact in float64.
    """
    width = len(columns)
    deepest = int(np.flatnonzero(columns.any(axis=1))[-1])
    for axis in range(deepest, -1, -1):
        words = _words(f"haar {seed} {width} {axis}", 12 * (width - axis), 2)
        mirror = words.reshape(-1, 12).astype(np.int64).sum(axis=1).astype(np.float64) - 6.0 * 65535.0
        sign = 1.0 if mirror[0] >= 0 else -1.0
        mirror[0] += sign * np.sqrt(_sum((mirror * mirror)[:, None])[0])
        columns[axis] *= -sign
        active = columns[axis:]
        share = _sum(mirror[:, None] * active) * (2.0 / _sum((mirror * mirror)[:, None])[0])
        columns[axis:] = active - mirror[:, None] * share
    return columns


def _sum(values: Array) -> Array:
    """Sum along axis 0 by halving, in an order that no library decides."""
    while len(values) > 1:
        half = len(values) // 2
        folded = values[:half] + values[half : 2 * half]
        if len(values) % 2:
            folded[0] += values[-1]
        values = folded
    return values[0]


def _permutation(purpose: str, size: int) -> NDArray[np.int64]:
    return np.argsort(_words(purpose, size, 8), kind="stable")


def _words(purpose: str, count: int, size: int) -> np.ndarray:
    """`count` random unsigned words of `size` bytes, little-endian, from SHAKE-256 of the purpose."""
    stream = hashlib.shake_256(f"modular concepts basis 1 {purpose}".encode()).digest(count * size)
    return np.frombuffer(stream, dtype=f"<u{size}")


def _bytes(matrix: Tensor) -> bytes:
    return np.ascontiguousarray(matrix.cpu().numpy(), dtype="<f4").tobytes()


def _digest(title: str, *parts: bytes) -> str:
    digest = hashlib.sha256(f"modular concepts basis 1 {title}".encode())
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]
