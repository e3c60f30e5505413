"""What a picture's file would cost, asked before a decoder looks at it or makes room for it.

A decoder believes what a file says: it keeps a chunk of any length, looks for a JPEG's next marker byte by byte, and
goes over all pixels once for each scan.
"""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..errors import AdapterError
from ..storage.safetensors import check_fits

if TYPE_CHECKING:
    from PIL.Image import Image

WORKING = 12  # bytes for each pixel while a picture is decoded, turned and laid on white
# The most pixels that a byte of a file can stand for.  JPEG: a bit for each block of 8 x 8.  GIF: a code of 12 bits for
# 4096 pixels.  BMP: two bytes for a run of 255.
PIXELS_A_BYTE = {"JPEG": 512, "MPO": 512, "GIF": 4096, "BMP": 128, "WEBP": 1000, "TIFF": 8256}
DEFLATE = 1032  # bytes that one byte of a PNG can stand for
ROOM = {"WEBP": 2**24}  # one colour all over needs no bytes at all there
SPARE = 2**16
MOST_BYTES = 400_000_000  # of a file; the most pixels that are read take 360 million without any compression
MOST_CHUNK = 2**26  # bytes of a PNG's part that is no pixels
MOST_SCANS = 100  # of a JPEG, which has ten where it is progressive
MOST_PARTS = 20_000  # before a JPEG's first scan, and in a PNG
JUNK = 4096  # bytes between a JPEG's parts that belong to none
_PIXELS, _BLOCK = 4096, 2**16  # bytes of an IDAT at least, where there are many; of a JPEG that are looked at together
_MARK = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)
_ALONE = (0x01, 0xD8)  # marks without a length
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a PNG's colour types


def check_parts(path: Path) -> None:
    """Raise AdapterError for a file whose parts would take a decoder long, or much memory, before the first pixel."""
    size = os.path.getsize(path)
    if size > MOST_BYTES:
        raise AdapterError(f"{path}: {size:,} bytes are more than a picture takes; save it again, or make it smaller")
    with open(path, "rb") as file:
        start = file.read(16)
        if start.startswith(b"\xff\xd8"):
            _check_jpeg(path, file)
        elif start.startswith(b"\x89PNG"):
            _check_png(path, file, size)


def is_png(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"\x89PNG"


def without_tail(path: Path) -> Path | io.BytesIO:
    """What a decoder is given: of a WebP, which it would keep whole, no more than the picture says that it has."""
    with open(path, "rb") as file:
        start = file.read(12)
        end = int.from_bytes(start[4:8], "little") + 8
        if start[:4] != b"RIFF" or start[8:] != b"WEBP" or os.path.getsize(path) <= end:
            return path
        file.seek(0)
        return io.BytesIO(file.read(end))


def _check_png(path: Path, file: BinaryIO, size: int) -> None:
    place, beside = 8, 0
    for _ in range(MOST_PARTS + size // _PIXELS):
        if place >= size:
            return
        file.seek(place)
        head = file.read(8)
        length = int.from_bytes(head[:4], "big")
        if head[4:] == b"IEND":
            return
        if head[4:] not in (b"IDAT", b"fdAT"):
            beside += 1
            if beside > MOST_PARTS:
                break
            if length > MOST_CHUNK:
                raise AdapterError(
                    f"{path}: a part of it that is no pixels takes {length:,} bytes; save the picture again without it"
                )
        place += 12 + length
    raise _many_parts(path)


def _many_parts(path: Path) -> AdapterError:
    return AdapterError(f"{path}: it is in more than {MOST_PARTS:,} parts; save the picture again")


def _check_jpeg(path: Path, file: BinaryIO) -> None:
    """From mark to mark up to the picture's end; behind that may be a film, as phones have it, which nobody reads."""
    place, scans = 2, 0
    for _ in range(MOST_PARTS):
        mark = _next_mark(file, place, within=None if scans else JUNK)
        if mark is None and scans:
            return
        at, code = mark or (0, 0)
        if code == 0xD9:
            return
        scans += code == 0xDA
        if scans > MOST_SCANS:
            raise AdapterError(f"{path}: it comes in more than {MOST_SCANS} scans, and a JPEG has ten; save it again")
        file.seek(at + 2)
        length = 0 if code in _ALONE else int.from_bytes(file.read(2), "big")
        if mark is None or (length < 2 and code not in _ALONE):
            raise AdapterError(f"{path}: this is not a picture that can be read, or it is damaged")
        place = at + 2 + length
    raise _many_parts(path)


def _next_mark(file: BinaryIO, place: int, within: int | None) -> tuple[int, int] | None:
    """(where, code) of the first mark from `place` on; within: bytes that may lie before it.

    What a scan holds has none: there 0xFF is followed by 0, or by a number that starts it over.
    """
    file.seek(place)
    before = b""
    while block := file.read(min(within, _BLOCK) if within else _BLOCK):
        if match := _MARK.search(before + block):
            return place - len(before) + match.start(), match[0][-1]
        if within:
            return None
        place, before = place + len(block), block[-1:]
    return None


def check_promise(path: Path, image: Image, size: int | None = None) -> None:
    """Raise AdapterError for a small file that promises a large picture.

    image: opened and not yet decoded.  size: how many bytes of the file it is decoded from, if not from all.
    """
    size, pixels = os.path.getsize(path) if size is None else size, image.width * image.height
    if image.format == "PNG":
        holds = _png_bytes(path, image.width, image.height) <= DEFLATE * size + SPARE
    else:
        most = PIXELS_A_BYTE.get(image.format, DEFLATE) * size
        holds = pixels <= most + ROOM.get(image.format, SPARE)
    if not holds:
        raise AdapterError(
            f"{path}: {size} bytes are too few for the {image.width}×{image.height} pixels that it promises; the file "
            "is damaged, so save the picture again"
        )
    check_fits(path, WORKING * pixels)


def _png_bytes(path: Path, width: int, height: int) -> int:
    """What the rows of a PNG take, each with a byte that says how it was filtered."""
    with open(path, "rb") as file:
        header = file.read(26)
    depth, channels = header[24], _CHANNELS.get(header[25], 1)
    return height * (1 + -(-width * channels * depth // 8))
