"""Reading safetensors that nobody vouches for, and writing files whole or not at all.

The reader checks the whole header against the file's size before it allocates anything.  It is our own because the
library maps files into memory, and one that another program writes over meanwhile would end the whole process; so is
the writer, because the library orders metadata by chance, and a file saved twice must be the same bytes.  Format: 8
bytes little-endian length, a JSON header, the tensors.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import AdapterError
from .atomic import reason, replacing
from .names import not_a_file, printed
from .room import free_memory
from .strict_json import parse_json

MAX_HEADER = 64 * 2**20  # other programs keep the tags of a data set and pictures in the metadata
MAX_WRITTEN_HEADER = 4 * 2**20
MAX_TENSORS = 16384
MAX_DIMENSIONS = 8
MAX_TENSOR_NAME = 512
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOATS = ("F64", "F32", "F16", "BF16")
BITS = {  # of every type that the format knows
    **{name: 64 for name in ("F64", "I64", "U64", "C64")},
    **{name: 32 for name in ("F32", "I32", "U32")},
    **{name: 16 for name in ("F16", "BF16", "I16", "U16")},
    **{name: 8 for name in ("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")},
    **{"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MORE = {  # torch has these too
    "I16": torch.int16,
    "I8": torch.int8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
BUNDLED = "bundle_emb."  # before a word that people chose, in other programs' files
_SMALL = 2**26


@dataclass(frozen=True)
class Header:
    """A validated header: tensor name -> (dtype name, shape), and the string metadata.

    starts: tensor name -> where in the file its numbers begin.  digest: of the header's bytes.
    """

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    metadata: Mapping[str, str]
    starts: Mapping[str, int]
    digest: bytes


def read_safetensors(
    path: Path | str, dtypes: tuple[str, ...] = FLOATS, empty: bool = False
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors (own memory, stored dtype, finite) and the metadata of an untrusted file.

    empty: tensors without a number may be there.  Raises AdapterError, in one sentence that names the file, for
    anything that is not a sound safetensors file.
    """
    path = Path(path)
    header = read_header(path, dtypes, empty)
    check_fits(path, sum(_size(*entry) for entry in header.tensors.values()))
    tensors = _tensors(path, header, sorted(header.tensors))
    for name, tensor in tensors.items():
        if tensor.numel() or not empty:
            check_finite(f"{path.name}: {name}", tensor)
    return tensors, dict(header.metadata)


def read_foreign(path: Path | str, needed: Callable[[str], bool]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of another program's file, and its metadata: what is not needed is no reason to refuse the file.

    needed: whether a tensor of this name is read.  All others, and those of a type that torch does not have, come as
    empty tensors; those that are read may be of any type, and hold whatever they hold.
    Raises AdapterError, in one sentence that names the file, for anything that is not a sound safetensors file.
    """
    path = Path(path)
    header = read_header(path, tuple(BITS), empty=True)
    wanted = {
        name for name, (dtype, _) in header.tensors.items() if needed(name) and (dtype in DTYPES or dtype in _MORE)
    }
    check_fits(path, sum(_size(*header.tensors[name]) for name in wanted))
    tensors = {name: torch.empty(0) for name in header.tensors} | _tensors(path, header, sorted(wanted))
    return tensors, dict(header.metadata)


def _tensors(path: Path, header: Header, names: Sequence[str]) -> dict[str, Tensor]:
    """Some tensors of a file whose header was read before, each in memory of its own."""
    tensors = {}
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER or hashlib.sha256(file.read(length)).digest() != header.digest:
                raise _changed(path)
            for name in names:
                dtype, shape = header.tensors[name]
                numbers = bytearray(int(_size(dtype, shape)))
                file.seek(header.starts[name])
                if file.readinto(numbers) != len(numbers):
                    raise _changed(path)
                kind = DTYPES.get(dtype) or _MORE[dtype]
                flat = torch.frombuffer(numbers, dtype=kind) if numbers else torch.empty(0, dtype=kind)
                tensors[name] = flat.reshape(shape)
    except OSError as error:
        raise AdapterError(f"{path.name}: cannot be read ({reason(error, 'read')})") from error
    return tensors


def _changed(path: Path) -> AdapterError:
    return AdapterError(f"{path.name}: the file changed while it was read; try again")


def check_fits(path: Path, size: float) -> None:
    """Raise AdapterError where so many bytes of a file are more than memory holds, or lie on no disk at all."""
    if size <= _SMALL:
        return
    if _is_sparse(path):
        raise AdapterError(
            f"{path.name}: nearly all of its bytes were never written; the copy broke off, so make it again"
        )
    if (free := free_memory()) is not None and size > free:
        raise AdapterError(
            f"{path.name}: reading it takes {size / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free; "
            "close other programs, or take a smaller file"
        )


def _is_sparse(path: Path) -> bool:
    """Whether less than a sixty-fourth of a large file is there; the rest reads as zeros, of which no disk tells."""
    if not hasattr(os, "SEEK_DATA"):
        return False
    try:
        with open(path, "rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            there = position = 0
            while size > _SMALL and position < size and 64 * there < size:
                begin = os.lseek(handle.fileno(), position, os.SEEK_DATA)
                position = os.lseek(handle.fileno(), begin, os.SEEK_HOLE)
                there += position - begin
    except OSError as error:
        return error.errno == errno.ENXIO  # no more data behind what was found
    return size > _SMALL and 64 * there < size


def read_header(path: Path | str, dtypes: tuple[str, ...] = FLOATS, empty: bool = False) -> Header:
    """Validate a file's header against its size; reads at most `MAX_HEADER` bytes and no tensor.

    Refused: unknown dtypes, holes, overlaps, trailing or missing bytes, duplicate keys, path-like names, and tensors
    without a number unless `empty`.
    """
    path = Path(path)
    raw, data_size = _raw_header(path)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise AdapterError(f"{path.name}: the header is not UTF-8 text; the file is damaged") from error
    entries = parse_json(text, f"{path.name}: the header")
    if not isinstance(entries, dict) or not text.startswith("{"):
        raise AdapterError(f"{path.name}: the header is not a JSON object; the file is damaged")
    metadata = _metadata(path, entries.pop("__metadata__", {}))
    if len(entries) > MAX_TENSORS:
        raise AdapterError(f"{path.name}: {len(entries)} tensors; we read at most {MAX_TENSORS}")
    spans, tensors, starts = [], {}, {}
    for name, entry in entries.items():
        _check_tensor_name(path.name, name)
        dtype, shape, begin, end = _entry(f"{path.name}: {printed(name)}", entry, dtypes)
        if begin == end and not empty:
            raise AdapterError(
                f"{path.name}: {printed(name)}: shape {list(shape)} does not fit its 0 bytes; the file is damaged"
            )
        tensors[name] = (dtype, shape)
        starts[name] = 8 + len(raw) + begin
        spans.append((begin, end, name))
    _check_spans(path, sorted(spans), data_size)
    return Header(tensors, metadata, starts, hashlib.sha256(raw).digest())


def write_safetensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file that `read_safetensors` and every stock reader takes; the same input gives the same bytes.

    Tensors lie by falling element size, then by name.  Atomic: see `replacing`.
    Raises AdapterError for what the reader would refuse, before anything is written.
    """
    path = Path(path)
    ordered = _in_order(tensors)
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name, tensor in ordered:
        _check_tensor_name(path.name, name)
        check_finite(f"{path.name}: {name}", tensor)
        if tensor.dtype not in _NAMES:
            raise AdapterError(f"{path.name}: {name} has dtype {tensor.dtype}, which we do not write")
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    raw = json.dumps(header, separators=(",", ":"), allow_nan=False).encode("ascii")
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_WRITTEN_HEADER:
        raise AdapterError(
            f"{path.name}: the header would be {len(raw)} bytes; at most {MAX_WRITTEN_HEADER} are written, so shorten "
            "what the file says of itself"
        )
    with replacing(path) as handle:
        handle.write(len(raw).to_bytes(8, "little"))
        handle.write(raw)
        for _, tensor in ordered:
            handle.write(tensor_bytes(tensor))


def data_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of all that `write_safetensors` puts behind the header."""
    digest = hashlib.sha256()
    for _, tensor in _in_order(tensors):
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def _in_order(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    return sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))


def tensor_bytes(tensor: Tensor) -> bytes:
    """Little-endian bytes of a tensor, any dtype and device."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def check_finite(what: str, tensor: Tensor) -> None:
    """Raise AdapterError when a floating tensor is empty or holds NaN or infinity."""
    if tensor.numel() == 0:
        raise AdapterError(f"{what} is empty; the file is damaged")
    if tensor.is_floating_point():
        low, high = torch.aminmax(tensor.detach())
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise AdapterError(f"{what} holds NaN or infinity; the training diverged or the file is damaged")


def is_text(path: Path) -> bool:
    """Whether a path is UTF-8: no other is opened by the library with which most programs read tensors."""
    return not any("\ud800" <= letter <= "\udfff" for letter in str(path))


def _raw_header(path: Path) -> tuple[bytes, int]:
    """Header bytes and the size of the data behind them."""
    try:
        if not path.is_file():
            raise AdapterError(f"{path}: {not_a_file(path)}")
        with open(path, "rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            prefix = handle.read(8)
            length = int.from_bytes(prefix, "little")
            if prefix.startswith((b"\x80", b"PK\x03\x04")) and length > MAX_HEADER:
                raise AdapterError(
                    f"{path.name}: this is a pickle or zip archive, not safetensors; pickles can run programs"
                    " and are never opened here, so convert it to safetensors first"
                )
            if len(prefix) < 8 or length < 2 or (length > MAX_HEADER and 8 + length > size):
                raise AdapterError(f"{path.name}: this is not a safetensors file")
            if length > MAX_HEADER:
                raise AdapterError(
                    f"{path.name}: its metadata is too long: {length} bytes with the list of tensors, and at most "
                    f"{MAX_HEADER} are read; save the file again without tags and cover pictures"
                )
            if 8 + length > size:
                raise AdapterError(f"{path.name}: the file is cut short: its header alone needs {8 + length} bytes")
            return handle.read(length), size - 8 - length
    except (OSError, ValueError) as error:
        if isinstance(error, AdapterError):
            raise
        why = reason(error, "read") if isinstance(error, OSError) else error
        raise AdapterError(f"{ascii(str(path))[:200]}: cannot be read ({why})") from error


def _metadata(path: Path, metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterError(f"{path.name}: the metadata is not a map of texts; the file is damaged")
    return metadata


def _check_tensor_name(file: str, name: str) -> None:
    """Words that people choose are in names, so a slash or two dots may be; what would climb as a path may not."""
    word = name.startswith(BUNDLED)  # then nothing but a word, which is looked at where words are
    bad = not name or len(name) > MAX_TENSOR_NAME or not (_has_no_controls(name) if word else name.isprintable())
    if bad or (not word and (name.startswith("/") or "\\" in name or ".." in name.split("/"))):
        raise AdapterError(f"{file}: tensor name {ascii(name)[:80]} is not a layer's name; the file is damaged")


def _has_no_controls(text: str) -> bool:
    return not any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in text)


def _entry(what: str, entry: object, dtypes: tuple[str, ...]) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, begin, end) of one header entry, consistent with each other."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise AdapterError(f"{what}: the header entry is not a dtype, a shape and two offsets; the file is damaged")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise AdapterError(f"{what}: dtype {ascii(dtype)[:40]} is not one that we read ({', '.join(dtypes)})")
    if not _whole_numbers(shape) or len(shape) > MAX_DIMENSIONS or not _whole_numbers(offsets) or len(offsets) != 2:
        raise AdapterError(f"{what}: shape or offsets are not whole numbers; the file is damaged")
    begin, end = offsets
    if end - begin != _size(dtype, shape):
        raise AdapterError(f"{what}: shape {shape} does not fit its {end - begin} bytes; the file is damaged")
    return dtype, tuple(shape), begin, end


def _size(dtype: str, shape: Sequence[int]) -> float:
    """Bytes."""
    return math.prod(shape) * BITS[dtype] / 8


def _check_spans(path: Path, spans: list[tuple[int, int, str]], data_size: int) -> None:
    """Tensors must lie end to end and fill the data exactly."""
    position = 0
    for begin, end, name in spans:
        if begin != position:
            kind = "overlaps another tensor" if begin < position else "leaves a hole before it"
            raise AdapterError(f"{path.name}: {printed(name)} {kind}; the file is damaged or was tampered with")
        position = end
    if position > data_size:
        raise AdapterError(f"{path.name}: the file is cut short: {position - data_size} bytes of tensors are missing")
    if position < data_size:
        raise AdapterError(f"{path.name}: {data_size - position} bytes follow the last tensor; the file is damaged")


def _whole_numbers(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**48 for value in values)
